"""Launch of the ``attention_backward`` kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

ARGTYPES = (
    ctypes.c_int,  # threads
    ctypes.c_double,  # scale
    *(ctypes.c_void_p,) * 9,  # q, k, v, grad, out, bias, shift, lse, grad_lse
    *(ctypes.c_void_p,) * 3,  # counts_t, indices_t, table
    *(ctypes.c_void_p,) * 6,  # dq, dk, dv, dbias, dshift, layout
)
MAX_LAYOUTS = 1024

Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def make_launch(
    function: Any, spec: dict[str, Any], empty: Callable[[Sequence[int], torch.dtype], Tensor]
) -> Callable[..., Gradients]:
    """``launch(grad, q, k, v, bias, shift, out, lse, scale, grad_lse, counts, indices, counts_t, indices_t, table)``,
    which gives (dq, dk, dv, dbias, dshift).

    grad and out (B, Hq, Lq, Dv), lse (B, Hq, Lq) float32 from the forward (out and lse are unused by sigmoid); q, k, v,
    bias, shift as in the forward, any strides; grad_lse (B, Hq, Lq) float32 or None. counts_t (1 or B, 1 or Hq, NK) and
    indices_t (.., W) int32: the query blocks that list each key block, for kernels of block lists (counts and indices,
    the forward's, are not read); table (N,) int32, what the mask looks up. dq, dk, dv lie in memory as
    (B, L, H, D); dbias float32 (1 or B, 1 or Hq, 1 or Lq, Lk) and dshift float32 (B, Hq, Lq), or None.
    """
    dtype = getattr(torch, spec["dtype"])
    head_dim, value_dim, softmax = spec["head_dim"], spec["value_dim"], spec["normalizer"] == "softmax"
    bias_wanted, bias_rows, shift_wanted = spec["grad_bias"], spec["grad_bias_rows"], spec["grad_shift"]
    lists = spec["block_q"] > 0
    layouts: dict[Any, Any] = {}

    def heads_last(heads: int, length: int, dim: int) -> tuple[int, int, int, int]:
        return length * heads * dim, dim, heads * dim, 1

    def layout_of(tensors: Sequence[Tensor | None]) -> Any:
        grad, q, k, v, bias, shift, out, lse, grad_lse, counts, indices, table = tensors
        assert grad is not None and q is not None and k is not None and v is not None
        batch, heads, q_len, _ = q.shape
        k_heads, k_len = k.shape[1], k.shape[2]
        summed = [0, 0, 0] if bias is None else [bias.shape[0] != batch, bias.shape[1] != heads, not bias_rows]
        numbers = [batch, heads, q_len, k_len, *summed, *q.stride(), *k.stride(), *v.stride(), *grad.stride()]
        numbers += (0, 0, 0, 0) if out is None else out.stride()
        numbers += heads_last(heads, q_len, head_dim)
        numbers += heads_last(k_heads, k_len, head_dim)
        numbers += heads_last(k_heads, k_len, value_dim)
        for tensor, dims in ((bias, 4), (shift, 3), (lse, 3), (grad_lse, 3)):
            sizes, steps = ((1,) * dims, (0,) * dims) if tensor is None else (tensor.shape, tensor.stride())
            numbers += [0 if size == 1 else step for size, step in zip(sizes[:dims], steps[:dims], strict=True)]
        if counts is not None and indices is not None:
            apart = [0 if size == 1 else step for size, step in zip(counts.shape, counts.stride(), strict=True)]
            numbers += [*apart[:2], counts.shape[2], indices.shape[3]]
        else:
            numbers += [0, 0, 0, 0]
        numbers.append(0 if table is None else table.shape[0])
        if len(layouts) >= MAX_LAYOUTS:
            layouts.clear()
        return (ctypes.c_int64 * len(numbers))(*numbers)

    def launch(
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        shift: Tensor | None,
        out: Tensor | None,
        lse: Tensor | None,
        scale: float,
        grad_lse: Tensor | None = None,
        counts: Tensor | None = None,
        indices: Tensor | None = None,
        counts_t: Tensor | None = None,
        indices_t: Tensor | None = None,
        table: Tensor | None = None,
    ) -> Gradients:
        if not softmax:
            out = lse = grad_lse = None
        # The kernel reads lists and tables as they lie.
        counts_t = counts_t.contiguous() if lists and counts_t is not None else None
        indices_t = indices_t.contiguous() if lists and indices_t is not None else None
        table = None if table is None else table.contiguous()
        tensors = (grad, q, k, v, bias, shift, out, lse, grad_lse, counts_t, indices_t, table)
        key = tuple(None if tensor is None else (tensor.shape, tensor.stride()) for tensor in tensors)
        layout = layouts.get(key)
        if layout is None:
            layout = layouts[key] = layout_of(tensors)
        batch, heads, q_len, _ = q.shape
        k_heads, k_len = k.shape[1], k.shape[2]
        dq = empty((batch, q_len, heads, head_dim), dtype)
        dk = empty((batch, k_len, k_heads, head_dim), dtype)
        dv = empty((batch, k_len, k_heads, value_dim), dtype)
        dbias = dshift = None
        if bias_wanted and bias is not None:
            dbias = empty((bias.shape[0], bias.shape[1], q_len if bias_rows else 1, k_len), torch.float32)
        if shift_wanted:
            dshift = empty((batch, heads, q_len), torch.float32)
        inputs = (q, k, v, grad, out, bias, shift, lse, grad_lse, counts_t, indices_t, table)
        pointers = (*inputs, dq, dk, dv, dbias, dshift)
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in pointers]
        function(torch.get_num_threads(), scale, *addresses, layout)
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2), dbias, dshift

    return launch
