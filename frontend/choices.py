"""Names of targets, of what runs the rest of the graph, and of where its memory comes from."""

from typing import Literal

Target = Literal["auto", "triton", "triton-interpret", "cpp", "reference"]
Rest = Literal["auto", "inductor", "eager"]
"""``auto``: Inductor, but eager for decoders on the CPU that are little but kernels; see :func:`.policy.runs_alone`."""
Memory = Literal["system", "pool"]
