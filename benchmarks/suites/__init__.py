"""One file a suite. A file defines ``SUITE``, a :class:`~tilewright.benchmarks.harness.Suite`; that is all."""
