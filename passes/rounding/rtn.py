"""Round to nearest: no calibration, and the yardstick for all methods that need it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Calibration, Method, each
from .grid import QuantizedWeight


@dataclass(frozen=True)
class RTN(Method):
    """Each weight to the nearest level of its group's grid, which reaches to the group's largest weight.

    clip: look for the range with the least squared error instead (20 ranges, from the whole one to 0.4 of it; symmetric
    grids of up to 4 bits with either sign of the scale, whose negative side has a level more). With calibration inputs
    the error of each column counts by its input's second moment, which makes it the expected squared error of the
    layer's output where inputs are uncorrelated.
    """

    name: ClassVar[str] = "rtn"

    clip: bool = False

    def round(self, work: Calibration) -> dict[str, QuantizedWeight]:
        return {site.id: work.nearest(site.id, clip=self.clip) for site in each(work, work.leaders(), "rounding")}
