"""``nn.Linear`` and ``nn.Embedding`` whose weights are packed low-bit codes.

Models of imported checkpoints are made of them. Their forward is one canonical op, which ``torch.export`` and Dynamo
keep, so such a model is compiled like any other; uncompiled it runs the op's reference form.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..codegen.weight_format import WeightFormat
from ..runtime.errors import BadArgument
from ..runtime.ops import quantized_weight


class PackedWeight(nn.Module):
    """A weight of N rows and K columns as codes, scales and zeros, in buffers.

    codes, scale, zero: as ``format`` says (:mod:`tilewright.codegen.weight_format`), layout ``plain``; zero is None
    where the format has none. A weight that two modules share (a tied head and embedding) is one set of tensors.
    Raises :class:`~tilewright.runtime.errors.BadArgument` for tensors that do not fit the format.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(
        self, codes: Tensor, scale: Tensor, zero: Tensor | None, *, rows: int, columns: int, format: WeightFormat
    ) -> None:
        super().__init__()
        given = {"codes": codes, "scale": scale} | ({} if zero is None else {"zero": zero})
        wanted = format.shapes(rows, columns)
        found = {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in given.items()}
        if found != wanted:
            raise BadArgument(f"a packed weight ({rows}, {columns}) of {format.text()} needs {wanted}, not {found}")
        self.rows, self.columns, self.format = rows, columns, format
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """``.to(device)`` moves everything; ``.to(dtype)`` leaves scales and zeros as the format has them."""
        kept = {name: held for name, held in self._buffers.items() if held is not None and held.is_floating_point()}
        for name in kept:
            self._buffers[name] = None
        super()._apply(fn, recurse)
        self._buffers.update({name: held.to(self.codes.device) for name, held in kept.items()})
        return self

    @property
    def weight_bytes(self) -> int:
        """Bytes of codes, scales and zeros."""
        return sum(t.nbytes for t in (self.codes, self.scale, self.zero) if t is not None)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (N, K) as numbers."""
        form = (self.format, self.rows, self.columns)
        return quantized_weight.dequantize(self.codes, self.scale, self.zero, *form, dtype)


class QuantizedLinear(PackedWeight):
    """``y = x @ W.T + b`` for x (..., K) of any floating dtype; y (..., N) has x's dtype.

    order: int64 (K,) or None. Column j of the packed weight belongs to input feature ``order[j]``: how GPTQ keeps
    columns of one group side by side that were not neighbours.
    """

    order: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        rows: int,
        columns: int,
        format: WeightFormat,
        order: Tensor | None = None,
    ) -> None:
        super().__init__(codes, scale, zero, rows=rows, columns=columns, format=format)
        self.in_features, self.out_features = columns, rows
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.register_buffer("order", order)

    def forward(self, x: Tensor) -> Tensor:
        if self.order is not None:
            x = x.index_select(-1, self.order)
        zeros = [] if self.zero is None else [self.zero]
        weight = ([self.codes], [self.scale], zeros, [self.bias])
        return torch.ops.tilewright.quantized_linear(x, *weight, rows=[self.rows], format=self.format.text())

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        weight = super().dequantized(dtype)
        return weight if self.order is None else weight[:, torch.argsort(self.order)]

    def extra_repr(self) -> str:
        order = ", permuted input" if self.order is not None else ""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.format.text()}{order}"


class QuantizedEmbedding(PackedWeight):
    """A table of N rows of K numbers: ids of any shape in, (*ids.shape, K) of ``dtype`` out."""

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None = None,
        *,
        rows: int,
        columns: int,
        format: WeightFormat,
        dtype: torch.dtype = torch.float32,
        padding_idx: int | None = None,
    ) -> None:
        super().__init__(codes, scale, zero, rows=rows, columns=columns, format=format)
        self.num_embeddings, self.embedding_dim = rows, columns
        self.dtype, self.padding_idx = dtype, padding_idx

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        return super()._apply(fn, recurse)

    def forward(self, ids: Tensor) -> Tensor:
        shape = {"rows": self.rows, "columns": self.columns, "format": self.format.text(), "dtype": self.dtype}
        return torch.ops.tilewright.quantized_embedding(ids, self.codes, self.scale, self.zero, **shape)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.format.text()}"


def replace(model: nn.Module, name: str, packed: PackedWeight) -> None:
    """Put ``packed`` where the linear layer or embedding ``name`` stands, in its training mode."""
    packed.training = model.get_submodule(name).training
    model.set_submodule(name, packed)
