"""The canonical ops. Importing this package registers them under ``torch.ops.tilewright``."""

from .registry import HELPERS, OPS, CanonicalOp, Tolerance, canonical, is_canonical

# Each module registers its op on import; a new op is one more file and one more name here.
from . import attention, attention_parts, gated_mlp, layer_norm, linear, rms_norm, rope, softmax, visible_keys  # isort: skip
from . import cached_attention, streaming_attention  # isort: skip
from . import attention_lse, block_attention, block_lists, block_states, merge_attention  # isort: skip
from . import block_scores, select_blocks  # isort: skip
from . import gated_attention, group_attention, routed_attention  # isort: skip
from . import add_layer_norm, add_rms_norm, linear_fused  # isort: skip
from . import quantized_embedding, quantized_linear  # isort: skip

__all__ = [
    "HELPERS",
    "OPS",
    "CanonicalOp",
    "Tolerance",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "attention_lse",
    "attention_parts",
    "block_attention",
    "block_lists",
    "block_scores",
    "block_states",
    "cached_attention",
    "canonical",
    "gated_attention",
    "gated_mlp",
    "group_attention",
    "is_canonical",
    "layer_norm",
    "linear",
    "linear_fused",
    "merge_attention",
    "quantized_embedding",
    "quantized_linear",
    "rms_norm",
    "rope",
    "routed_attention",
    "select_blocks",
    "softmax",
    "streaming_attention",
    "visible_keys",
]
