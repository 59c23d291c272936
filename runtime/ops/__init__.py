"""The canonical ops. Importing this package registers them under ``torch.ops.tilewright``."""

from .registry import HELPERS, OPS, CanonicalOp, Tolerance, canonical, is_canonical

# Each module registers its op on import; a new op is one more file and one more name here.
from . import attention, attention_parts, gated_mlp, layer_norm, linear, rms_norm, rope, softmax, visible_keys  # isort: skip
from . import block_lists  # isort: skip
from . import add_layer_norm, add_rms_norm, linear_fused  # isort: skip

__all__ = [
    "HELPERS",
    "OPS",
    "CanonicalOp",
    "Tolerance",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "attention_parts",
    "block_lists",
    "canonical",
    "gated_mlp",
    "is_canonical",
    "layer_norm",
    "linear",
    "linear_fused",
    "rms_norm",
    "rope",
    "softmax",
    "visible_keys",
]
