"""The rewrites, one a file, and the classes users write their own with."""

from .base import Builder, Decline, Exactness, NearMiss, Needs, Pass, Rewrite, SiteContext
from .block_sparse_attention import BlockSparseAttention
from .factor_keys import FactorKeys
from .focus_attention import FocusAttention
from .gear import GEAR
from .kv_cache import KVCache
from .lm_infinite import LMInfinite
from .quantize import Quantize
from .quantize_kv import QuantizeKV
from .routing_transformer import RoutingTransformer
from .sigmoid_attention import SigmoidAttention
from .streaming_cache import StreamingCache
from .two_pass_softmax import TwoPassSoftmax

# Name on the command line -> pass. A new pass is one more file and one more line here.
PASSES: dict[str, type[Pass]] = {
    cls.cli_name(): cls
    for cls in (
        TwoPassSoftmax,
        SigmoidAttention,
        BlockSparseAttention,
        LMInfinite,
        FocusAttention,
        RoutingTransformer,
        KVCache,
        FactorKeys,
        StreamingCache,
        QuantizeKV,
        GEAR,
        Quantize,
    )
}

__all__ = [
    "GEAR",
    "PASSES",
    "BlockSparseAttention",
    "Builder",
    "Decline",
    "Exactness",
    "FactorKeys",
    "FocusAttention",
    "KVCache",
    "LMInfinite",
    "NearMiss",
    "Needs",
    "Pass",
    "Quantize",
    "QuantizeKV",
    "Rewrite",
    "RoutingTransformer",
    "SigmoidAttention",
    "SiteContext",
    "StreamingCache",
    "TwoPassSoftmax",
]
