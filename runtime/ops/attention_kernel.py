"""The kernel ops below ``tilewright::attention``, opaque to compilers: ``attention_forward``, ``attention_backward``.

They choose a kernel spec from the tensors, load the kernel of the target and launch it. Gradients of gradients are not
defined: use ``target="reference"`` for those.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ...codegen import symbols
from ...codegen.attention import (
    CPP_TILES,
    INTERPRETER_TILES,
    MAX_HEAD_DIM,
    AttentionBackwardSpec,
    AttentionSpec,
    Tiles,
    default_tiles,
)
from .. import fast_call
from ..autotune import load_best
from ..errors import UnsupportedKernel
from .block_lists import transposed_lists
from .registry import LIBRARY


def spec(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    *,
    mask: str,
    normalizer: str,
    target: str,
    blocks: tuple[int, int] = (0, 0),
) -> AttentionSpec:
    """The forward kernel for a checked call, from tensors or fake tensors. blocks: block_q and block_k of its lists.

    Raises :class:`~tilewright.runtime.errors.UnsupportedKernel` with the reason when ``target`` has none.
    """
    if target not in _DEVICES:
        raise UnsupportedKernel(f"there is no attention kernel for target {target!r}")
    for name, tensor in (("q", q), ("k", k), ("v", v), ("bias", bias), ("shift", shift)):
        if tensor is not None and tensor.device.type != _DEVICES[target]:
            raise UnsupportedKernel(
                f"{target} kernels take {_DEVICES[target]} tensors, and {name} is on {tensor.device.type}"
            )
    if q.dtype not in _DTYPE_NAMES:
        raise UnsupportedKernel(f"attention kernels compute float32, bfloat16 and float16, not {q.dtype}")
    bias_kind = "none"
    if bias is not None:
        if bias.dtype != torch.bool and bias.dtype not in _DTYPE_NAMES:
            raise UnsupportedKernel(
                f"attention kernels take a bias of bool, {', '.join(_DTYPE_NAMES.values())}, not {bias.dtype}"
            )
        bias_kind = "bool" if bias.dtype == torch.bool else _DTYPE_NAMES[bias.dtype]
        bias = four_dimensional(bias)
    return _forward_spec(
        _dim("q", q),
        _dim("v", v),
        _DTYPE_NAMES[q.dtype],
        normalizer,
        mask,
        bias_kind,
        # A native kernel reads every stride when it runs: one text serves what triton needs several for.
        bias is None or target == "cpp" or _varies(bias, 2),
        shift is not None,
        q.shape[1] // k.shape[1] if k.shape[1] else 1,
        target != "cpp" and _wide(q, k, v, bias),
        target,
        large_shared_memory(q.device) if target == "triton" else False,
        blocks,
    )


FEW_QUERIES, MANY_KEYS = 16, 1024
"""So few queries of so many keys are too little work for a GPU when each program walks over all keys."""
_DEVICES = {"triton": "cuda", "triton-interpret": "cpu", "cpp": "cpu"}
_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def _dim(name: str, tensor: Tensor) -> int:
    size = tensor.shape[3]
    if not isinstance(size, int):
        raise UnsupportedKernel(f"attention kernels need a fixed number of channels, and that of {name} is symbolic")
    if not 1 <= size <= MAX_HEAD_DIM:
        raise UnsupportedKernel(f"attention kernels take 1 to {MAX_HEAD_DIM} channels, and {name} has {size}")
    return size


def four_dimensional(tensor: Tensor) -> Tensor:
    """The tensor with leading dimensions of size 1 up to four."""
    return tensor.reshape((1,) * (4 - tensor.dim()) + tuple(tensor.shape)) if tensor.dim() < 4 else tensor


def _varies(tensor: Tensor, dim: int) -> bool:
    """Whether elements along ``dim`` can differ: neither of size 1 nor expanded."""
    return not (statically_known_true(tensor.shape[dim] == 1) or statically_known_true(tensor.stride(dim) == 0))


def _wide(*tensors: Tensor | None) -> bool:
    """Whether an offset inside a tile (at most 256 rows, 256 channels or keys) may not fit 31 bits."""
    strides = [tensor.stride(d) for tensor in tensors if tensor is not None for d in (2, 3)]
    return not all(statically_known_true(stride < 2**22) for stride in strides)


@functools.cache
def large_shared_memory(device: torch.device) -> bool:
    if not torch.cuda.is_available():  # fake tensors of a device that is not here
        return False
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 0) >= 160 * 1024


@functools.lru_cache(maxsize=1024)
def _forward_spec(
    head_dim: int,
    value_dim: int,
    dtype: str,
    normalizer: str,
    mask: str,
    bias: str,
    bias_rows: bool,
    shift: bool,
    group: int,
    wide: bool,
    target: str,
    large: bool,
    blocks: tuple[int, int],
) -> AttentionSpec:
    expression = symbols.parse_mask(mask)
    if expression == sympy.false:
        raise UnsupportedKernel(f"the mask {mask!r} hides every pair, so there is nothing to compute")
    tiles = CPP_TILES if target == "cpp" else INTERPRETER_TILES
    if target == "triton":
        tiles = default_tiles(head_dim, value_dim, dtype, backward=False, large=large)
    return AttentionSpec(
        head_dim=head_dim,
        value_dim=value_dim,
        dtype=dtype,
        normalizer=normalizer,
        mask=symbols.mask_text(expression),
        bias=bias,
        bias_rows=bias_rows,
        shift=shift,
        group=group,
        wide=wide,
        block_q=blocks[0],
        block_k=blocks[1],
    ).with_tiles(tiles if target == "cpp" else _within(tiles, blocks))


def _within(tiles: Tiles, blocks: tuple[int, int]) -> Tiles:
    """Tiles no larger than the blocks of the lists."""
    if not blocks[0]:
        return tiles
    return dataclasses.replace(tiles, block_m=min(tiles.block_m, blocks[0]), block_n=min(tiles.block_n, blocks[1]))


def backward_spec(
    forward: AttentionSpec, *, grad_bias: bool, grad_bias_rows: bool, grad_shift: bool, target: str, large: bool = False
) -> AttentionBackwardSpec:
    """The backward kernel that belongs to a forward one."""
    return _backward_spec(forward, grad_bias, grad_bias_rows, grad_shift, target, large)


@functools.lru_cache(maxsize=1024)
def _backward_spec(
    forward: AttentionSpec, grad_bias: bool, grad_bias_rows: bool, grad_shift: bool, target: str, large: bool
) -> AttentionBackwardSpec:
    tiles = CPP_TILES if target == "cpp" else INTERPRETER_TILES
    if target == "triton":
        tiles = default_tiles(forward.head_dim, forward.value_dim, forward.dtype, backward=True, large=large)
    return AttentionBackwardSpec(
        **dataclasses.asdict(forward),
        grad_bias=grad_bias,
        grad_bias_rows=grad_bias_rows or not grad_bias,
        grad_shift=grad_shift,
    ).with_tiles(tiles if target == "cpp" else _within(tiles, (forward.block_q, forward.block_k)))


LIBRARY.define(
    "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? shift, Tensor? counts=None, "
    "Tensor? indices=None, Tensor? table=None, *, float scale, str mask, str normalizer, int block_q=0, "
    "int block_k=0, str target) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
LIBRARY.define(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? shift, Tensor out, "
    "Tensor lse, Tensor? grad_lse, Tensor? counts=None, Tensor? indices=None, Tensor? counts_t=None, "
    "Tensor? indices_t=None, Tensor? table=None, *, float scale, str mask, str normalizer, int block_q=0, "
    "int block_k=0, str target, bool grad_bias, bool grad_shift) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


def _forward_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    counts: Tensor | None = None,
    indices: Tensor | None = None,
    table: Tensor | None = None,
    *,
    scale: float,
    mask: str,
    normalizer: str,
    block_q: int = 0,
    block_k: int = 0,
    target: str,
) -> fast_call.Launch:
    """The launch that gives out (B, Hq, Lq, Dv) and lse (B, Hq, Lq) float32 (sigmoid: (B, Hq, 0)).

    bias and shift have four dimensions. counts, indices: the block lists of block_q and block_k, see
    block_lists.py; table: what the mask looks up, int32, one-dimensional.
    """
    blocks = (block_q, block_k)
    chosen = spec(q, k, v, bias, shift, mask=mask, normalizer=normalizer, target=target, blocks=blocks)
    if target != "cpp" and q.shape[2] <= FEW_QUERIES and k.shape[2] >= MANY_KEYS:
        chosen = chosen.for_few_queries()
    return load_best(chosen, target, lambda: (q, k, v, bias, shift, scale, counts, indices, table)).launch


def _backward_kernel(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    counts: Tensor | None = None,
    indices: Tensor | None = None,
    counts_t: Tensor | None = None,
    indices_t: Tensor | None = None,
    table: Tensor | None = None,
    *,
    scale: float,
    mask: str,
    normalizer: str,
    block_q: int = 0,
    block_k: int = 0,
    target: str,
    grad_bias: bool,
    grad_shift: bool,
) -> fast_call.Launch:
    """The launch that gives dq, dk, dv in the inputs' dtype, dbias of bias's shape and dshift (B, Hq, Lq), float32.

    What is not wanted has shape (0,). The bias's gradient has the bias's own shape, nothing larger: where the bias is
    broadcast over batch, heads or queries, the kernel sums over them. counts_t, indices_t: the lists of query blocks
    that list each key block.
    """
    blocks = (block_q, block_k)
    forward = spec(q, k, v, bias, shift, mask=mask, normalizer=normalizer, target=target, blocks=blocks)
    chosen = backward_spec(
        forward,
        grad_bias=grad_bias,
        grad_bias_rows=bias is not None and bias.shape[2] != 1,
        grad_shift=grad_shift,
        target=target,
        large=large_shared_memory(q.device) if target == "triton" else False,
    )
    lists = (counts, indices, counts_t, indices_t, table)
    inputs = (grad, q, k, v, bias, shift, out, lse, scale, grad_lse, *lists)
    kernel = load_best(chosen, target, lambda: inputs).launch

    def launch(grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        dq, dk, dv, dbias, dshift = kernel(grad, *rest)
        # An operator returns tensors only, and none twice.
        empty = functools.partial(torch.empty, 0, dtype=torch.float32, device=grad.device)
        return dq, dk, dv, empty() if dbias is None else dbias, empty() if dshift is None else dshift

    return launch


_INPUTS = ("q", "k", "v", "bias", "shift")
fast_call.implement("attention_forward", _forward_kernel, passes=(*_INPUTS, "scale", "counts", "indices", "table"))
fast_call.implement(
    "attention_backward",
    _backward_kernel,
    passes=(
        *("grad", *_INPUTS, "out", "lse", "scale", "grad_lse"),
        *("counts", "indices", "counts_t", "indices_t", "table"),
    ),
)


def _heads_last(like: Tensor, heads: Any, length: Any, dim: Any) -> Tensor:
    return like.new_empty((like.shape[0], length, heads, dim)).transpose(1, 2)


@torch.library.register_fake("tilewright::attention_forward", lib=LIBRARY)
def _forward_fake(q, k, v, bias, shift, *lists, normalizer, **options):
    lse_len = q.shape[2] if normalizer == "softmax" else 0
    out = _heads_last(q, q.shape[1], q.shape[2], v.shape[3])
    return out, q.new_empty((q.shape[0], q.shape[1], lse_len), dtype=torch.float32)


@torch.library.register_fake("tilewright::attention_backward", lib=LIBRARY)
def _backward_fake(grad, q, k, v, bias, shift, out, lse, grad_lse, *lists, grad_bias, grad_shift, **options):
    def like(tensor: Tensor) -> Tensor:
        return _heads_last(tensor, tensor.shape[1], tensor.shape[2], tensor.shape[3])

    dbias = q.new_empty(bias.shape if grad_bias else (0,), dtype=torch.float32)
    dshift = q.new_empty(tuple(q.shape[:3]) if grad_shift else (0,), dtype=torch.float32)
    return like(q), like(k), like(v), dbias, dshift


def _save(ctx: Any, inputs: tuple, keyword_only_inputs: dict, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bias, shift, *lists = inputs
    counts, indices, table = (*lists, None, None, None)[:3]
    ctx.save_for_backward(q, k, v, bias, shift, *output, counts, indices, table)
    ctx.options, ctx.given = keyword_only_inputs, len(inputs)
    ctx.bias_wanted = bias is not None and bias.dtype != torch.bool and ctx.needs_input_grad[3]
    ctx.shift_wanted = shift is not None and ctx.needs_input_grad[4]


def _differentiate(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, bias, shift, out, lse, counts, indices, table = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(out)
    if ctx.options["normalizer"] == "sigmoid":
        grad_lse = None
    lists: tuple[Tensor | None, ...] = ()
    if counts is not None:
        blocks = -(-k.shape[2] // ctx.options["block_k"])
        lists = (counts, indices, *transposed_lists(counts, indices, blocks), table)
    dq, dk, dv, dbias, dshift = torch.ops.tilewright.attention_backward(
        grad, q, k, v, bias, shift, out, lse, grad_lse, *lists,
        grad_bias=ctx.bias_wanted, grad_shift=ctx.shift_wanted, **ctx.options,
    )  # fmt: skip
    return (
        dq,
        dk,
        dv,
        dbias.to(bias.dtype) if ctx.bias_wanted else None,
        dshift[..., None].sum_to_size(shift.shape) if ctx.shift_wanted else None,
        *([None] * (ctx.given - 5)),
    )


torch.library.register_autograd("tilewright::attention_forward", _differentiate, setup_context=_save, lib=LIBRARY)
