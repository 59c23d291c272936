"""Every error Tilewright raises on purpose: one class a mistake, with the remedy in the sentence.

All derive from :class:`TilewrightError`, which appends where in the user's model the mistake is, when that is known.
"""

from __future__ import annotations


class TilewrightError(Exception):
    """Base class. ``site`` is a module path of the user's model, ``source`` a ``file:line`` in it."""

    def __init__(self, message: str, *, site: str | None = None, source: str | None = None) -> None:
        where = ", ".join(part for part in (site, source) if part)
        super().__init__(f"{message} [{where}]" if where else message)
        self.site = site
        self.source = source


# What the user asked for.
class UnknownPass(TilewrightError):
    """A pass name that no pass has."""


class BadPassOption(TilewrightError):
    """A pass option that does not exist or whose value is out of range."""


class IllegalPassCombination(TilewrightError):
    """Passes that exclude each other or cannot be ordered."""


class PassChangedNothing(TilewrightError):
    """``strict=True`` and a requested pass matched no site."""


class BadArgument(TilewrightError, ValueError):
    """An argument of a public function that makes no sense."""


class BadExampleInputs(TilewrightError):
    """Example inputs the model itself does not accept."""


class CalibrationNeeded(TilewrightError):
    """A pass measures activations and got no calibration inputs."""


class UnknownModel(TilewrightError):
    """A model named on the command line that cannot be found or loaded."""


# What could not be done with the model.
class CaptureError(TilewrightError):
    """Neither door could capture the model."""


class ValidationError(TilewrightError):
    """An exact or reassociated rewrite changed a site's output by more than its tolerance."""


class BadPass(TilewrightError):
    """A pass built an illegal graph."""


class NotADecoder(TilewrightError):
    """A KV cache was asked for, and part of the model cannot run token by token with one."""


# Calls of a module with a KV cache.
class CacheFull(TilewrightError, ValueError):
    """A call would hold more tokens than the KV cache has room for. Nothing was written."""


class CacheMismatch(TilewrightError, ValueError):
    """A KV cache that is none of ours, comes from another compilation or does not fit the call."""


# What the machine lacks, and kernels.
class UnsupportedKernel(TilewrightError):
    """No kernel of this target computes the site (dtype, head dim, device ...): the site falls back to reference."""


class BadSpec(TilewrightError, ValueError):
    """A kernel spec with a field out of range."""


class MissingDependency(TilewrightError):
    """An optional package is needed and not installed."""


class MissingCompiler(TilewrightError):
    """The target's compiler is not on this machine."""


class BuildError(TilewrightError):
    """A kernel did not build."""


class NotBuilt(TilewrightError):
    """``load`` was asked for a kernel that is not in the cache while building is forbidden."""


class CacheError(TilewrightError):
    """The cache folder cannot be written or read."""


class TuningError(TilewrightError):
    """Tuning cannot go on: a loss that is not finite, or a checkpoint that is damaged or of another run."""


class QuantizationError(TilewrightError):
    """Weights that cannot be rounded: numbers that are not finite, settings that differ, or a damaged checkpoint."""


class SaveError(TilewrightError):
    """A compiled module that cannot be saved, or a file that is not a saved one."""


class CheckpointError(TilewrightError):
    """A quantized checkpoint that is damaged, or of a kind that cannot be imported."""


class TilewrightWarning(UserWarning):
    """Something the user should know that stops nothing, such as a fallback to the reference form."""
