"""What the ops whose only kernels are native C++ share: what a kernel takes, and gradients of gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import UnsupportedKernel

DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def check_native(name: str, target: str, **tensors: Tensor | None) -> None:
    """Raise :class:`UnsupportedKernel` unless ``target`` is ``cpp`` and these are CPU tensors of dtypes it computes.

    name: the op's.
    """
    if target != "cpp":
        raise UnsupportedKernel(f"{name} has no kernel for target {target!r}: call it with target='reference'")
    for key, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            raise UnsupportedKernel(f"target cpp runs on cpu tensors, but {key} is on {tensor.device}")
        if tensor.dtype not in DTYPE_NAMES:
            found = str(tensor.dtype).removeprefix("torch.")
            raise UnsupportedKernel(f"{key} is {found}; kernels compute float32, bfloat16 and float16")


def dtype_name(tensor: Tensor | None) -> str:
    """The name a spec has for the tensor's dtype, ``"none"`` without a tensor."""
    return "none" if tensor is None else DTYPE_NAMES[tensor.dtype]


def result_dtype(a: Tensor, b: Tensor) -> str:
    """The name of the dtype that PyTorch promotes a and b to."""
    return DTYPE_NAMES[torch.result_type(a, b)]


def differentiate(
    function: Callable[..., Sequence[Tensor | None]],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of plain PyTorch code with respect to its inputs, None for those it does not depend on.

    function: takes ``inputs``, gives as many results as there are ``grads``. For gradients that are seldom asked for.
    """
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
        pairs = [
            (result, grad)
            for result, grad in zip(function(*leaves), grads, strict=True)
            if result is not None and grad is not None and result.requires_grad
        ]
        wanted = [leaf for leaf in leaves if leaf is not None]
        results, vectors = [r for r, _ in pairs], [g.to(r.dtype) for r, g in pairs]
        found = iter(torch.autograd.grad(results, wanted, vectors, allow_unused=True))
    return [None if leaf is None else next(found) for leaf in leaves]
