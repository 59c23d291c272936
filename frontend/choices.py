"""Names of targets, of what runs the rest of the graph, and of where its memory comes from."""

from typing import Literal

Target = Literal["auto", "triton", "triton-interpret", "cpp", "reference"]
Rest = Literal["inductor", "eager"]
Memory = Literal["system", "pool"]
