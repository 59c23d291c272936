"""Names of targets and of what runs the rest of the graph."""

from typing import Literal

Target = Literal["auto", "triton", "triton-interpret", "cpp", "reference"]
Rest = Literal["inductor", "eager"]
