"""The benchmarks: one harness for every suite. ``tilewright bench SUITE`` runs it; docs/benchmarks.md says how.

    measure.py   interleaved timing, medians and quartiles, clocks of the devices
    machine.py   what the machine is, and its measured limits: read and copy bandwidth, matrix products
    harness.py   Suite, Case, Problem, Contender: from tensors to rows, within a time budget
    record.py    the JSON of a run: written after each row, read back strictly
    tables.py    tables of a run, on the terminal and in Markdown
    plots.py     pictures of a run, from its JSON
    peers.py     contenders from optional packages, left out with a word when these are missing
    suites/      one file a suite; a new suite is one new file

Imported as ``tilewright.benchmarks``. It may import every stage; of these only ``frontend/cli_bench.py`` imports it.
"""
