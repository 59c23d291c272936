"""The kernels of a dump: one folder each, which runs without Tilewright.

::

    kernel.py             the rendered source that runs, unchanged (Triton)
    kernel.cpp            the same for a native kernel; launcher.py and kernel.py build it and join it to torch
    spec.json             what it was rendered from
    inputs.safetensors    the tensors of one site that uses it
    call.json             how kernel.launch and the reference take them, and the tolerance
    reference.py          what is correct: plain torch code, traced from the op's definition for these inputs
    check.py              runs kernel.py on the inputs and compares; needs torch and triton, or a C++ compiler
    README.md             which lines of the model it belongs to

Inputs are recorded where kernels are launched, so nothing here knows any kernel's signature.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
import torch.fx

from ..passes.execute import Hook, run, undisturbed
from ..passes.site import get_site
from ..passes.view import arguments, value
from ..runtime import load
from ..runtime.ops import OPS, CanonicalOp
from .capture import copy_module
from .dump_cached import step_call
from .dump_native import native_files
from .dump_reference import differentiable_results, traced_reference
from .lower import KernelUse, set_target
from .page import template
from .report_print import group_sites

if TYPE_CHECKING:
    from .compiled import CompiledModule
    from .loaded import LoadedModule

Node = torch.fx.Node
_TRITON_WORDS = (
    "`python check.py` compares `kernel.py` with `reference.py` on them. It needs torch and triton, nothing else;",
    "where there is no GPU, Triton's interpreter runs the same text.",
)
_NATIVE_WORDS = (
    "`python check.py` builds `kernel.cpp` and compares it with `reference.py` on them. It needs torch and a C++",
    "compiler, nothing else.",
)
# Operands whose gradients a dump does not ask for: masks and biases are seldom trained, and a residual's is x's.
_NO_GRADIENT = ("bias", "shift", "residual")


@dataclass
class _Launch:
    """One recorded launch."""

    kernel: load.Kernel
    names: list[str]
    args: list[Any]


@dataclass
class _Example:
    """Arguments of one canonical op call, by schema name. origin: where they come from, in words."""

    arguments: dict[str, Any]
    origin: str


def kernel_folders(compiled: CompiledModule | LoadedModule, backward: bool) -> Iterator[tuple[str, str | bytes]]:
    """(path, content) of every file below ``kernels/``. Kernels are told apart by their digest."""
    uses: dict[str, list[KernelUse]] = {}
    for use in compiled.kernels:
        uses.setdefault(use.digest, []).append(use)
    yield "kernels/README.md", _overview(compiled)
    number = 0
    seen: set[str] = set()
    for shared in uses.values():
        first = shared[0]
        op = OPS[first.op]
        example = _example(compiled, first)
        cached = first.op == "cached_attention" and example is not None
        if cached and example is not None:
            op, arguments_of_step = step_call(op, example.arguments)
            example = _Example(arguments_of_step, f"the newest token of {example.origin}")
        forward, after, grads = (
            _record(op, example, first.target, backward and not cached) if example is not None else ([], [], {})
        )
        if cached and example is not None:
            # The kernel that appends gives no result; the one that attends finds the token's own key and value there.
            forward = [launch for launch in forward if launch.kernel.digest == first.digest]
            example.arguments = {n: item for n, item in example.arguments.items() if n not in ("k", "v")}
        launches = forward + after
        if not any(launch.kernel.digest == first.digest for launch in launches):
            # No inputs, or sizes seen at compile time ask for another kernel than the example's: text and spec only.
            yield from _text_only(f"kernels/{number:02d}-{first.name}", first, shared, example)
            seen.add(first.digest)
            number += 1
        for index, launch in enumerate(launches):
            if launch.kernel.digest in seen:
                continue
            seen.add(launch.kernel.digest)
            assert example is not None
            name = f"kernels/{number:02d}-{launch.kernel.spec.kind}-{launch.kernel.digest[:8]}"
            yield from _folder(name, launch, op, example, shared, grads if index >= len(forward) else None)
            number += 1


def _overview(compiled: CompiledModule | LoadedModule) -> str:
    lines = ["# Kernels", ""]
    lines.append("Each folder runs on its own: `python check.py` needs torch, and triton or a C++ compiler; no GPU.")
    reference: dict[tuple[str, str], int] = {}
    for row in compiled.report.kernels:
        if not row.digest:
            reference[row.op, row.reason] = reference.get((row.op, row.reason), 0) + 1
    if reference:
        lines += ["", "These ops run their reference form and have no folder:", ""]
        lines += [f"- {count} x {op}: {reason or 'asked for'}" for (op, reason), count in reference.items()]
    return "\n".join(lines) + "\n"


def _example(compiled: Any, use: KernelUse) -> _Example | None:
    """The arguments of the site's op: from the example inputs, else random ones of the captured shapes."""
    for record in compiled.records:
        node = next((n for n in record.lowered.graph.nodes if n.name == use.node and _is_use(n, use)), None)
        if node is None:
            continue
        if getattr(node.target, "_opname", "").endswith("_step"):
            return None  # of a graph with its cache lifted out: a store's contents are not known
        if record.example_values is not None:
            return _Example(_observe(record.lowered, use.node, record.example_values), "the model's example inputs")
        return _random(node)
    return None


def _is_use(node: Node, use: KernelUse) -> bool:
    return get_site(node) == use.site


def _observe(lowered: torch.fx.GraphModule, name: str, inputs: Any) -> dict[str, Any]:
    """Run the graph in its reference form and take the arguments of one node on the way."""
    module = copy_module(lowered)
    for node in module.graph.nodes:
        if "target" in arguments(node) and str(node.target).startswith("tilewright."):
            set_target(node, "reference")
    module.recompile()
    node = next(n for n in module.graph.nodes if n.name == name)
    given = arguments(node)
    needs = tuple(dict.fromkeys(node.all_input_nodes))
    seen: dict[Node, Any] = {}

    def keep(values: list[Any], result: Any) -> Any:
        seen.update(zip(needs, values, strict=True))
        return result

    run(module, inputs, {node: Hook(needs, keep)})
    named = {key: torch.fx.node.map_arg(item, seen.__getitem__) for key, item in given.items()}
    return {k: v.detach().clone() if _fresh(v) else v for k, v in named.items()}


def _fresh(item: Any) -> bool:
    # Expanded tensors stay expanded: a clone would have the expanded size.
    return isinstance(item, torch.Tensor) and all(stride > 0 or size <= 1 for size, stride in _dims(item))


def _dims(tensor: torch.Tensor) -> list[tuple[int, int]]:
    return list(zip(tensor.shape, tensor.stride(), strict=True))


def _random(node: Node) -> _Example | None:
    """Normal values of the shapes seen when compiling; None when these are not known (a loaded module)."""
    generator = torch.Generator().manual_seed(0)

    def make(item: Node) -> Any:
        fake = value(item)
        if not isinstance(fake, torch.Tensor):
            return _hint(fake)
        shape, stride = [_hint(s) for s in fake.shape], [_hint(s) for s in fake.stride()]
        if fake.dtype == torch.bool:
            data = torch.rand(shape, generator=generator) < 0.9
        elif fake.dtype.is_floating_point:
            data = torch.randn(shape, generator=generator).to(fake.dtype)
        else:
            data = torch.zeros(shape, dtype=fake.dtype)
        narrow = data[tuple(slice(0, 1) if step == 0 else slice(None) for step in stride)]
        strided = torch.empty_strided(narrow.shape, stride, dtype=fake.dtype).copy_(narrow)
        return strided.expand(shape).to(fake.device)

    if any(value(producer) is None for producer in node.all_input_nodes):
        return None
    named = {key: torch.fx.node.map_arg(item, make) for key, item in arguments(node).items()}
    return _Example(named, "random values of the captured shapes (no example inputs were kept)")


def _hint(size: Any) -> Any:
    return size.node.hint if isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool) else size


def _differentiable(op: CanonicalOp, example: Mapping[str, Any]) -> list[str]:
    """Names of the operands whose gradients are asked for, in the schema's order."""
    return [
        argument.name
        for argument in op.overload._schema.arguments
        if isinstance(example.get(argument.name), torch.Tensor)
        and example[argument.name].dtype.is_floating_point
        and argument.name not in _NO_GRADIENT
    ]


def _call(op: CanonicalOp, named: Mapping[str, Any], **changes: Any) -> Any:
    merged = {**named, **changes}
    schema = op.overload._schema.arguments
    args = [merged[a.name] for a in schema if not a.kwarg_only]
    return op.overload(*args, **{a.name: merged[a.name] for a in schema if a.kwarg_only and a.name in merged})


def _record(
    op: CanonicalOp, example: _Example, target: str, backward: bool
) -> tuple[list[_Launch], list[_Launch], dict[str, torch.Tensor]]:
    """Call the op on its kernel target: (launches of the forward, those of the backward, gradients it was given)."""
    named = dict(example.arguments)
    grads: dict[str, torch.Tensor] = {}
    with undisturbed():
        _call(op, named, target=target)  # loads every kernel that the call needs
        with _listening() as forward:
            _call(op, named, target=target)
    leaves: list[torch.Tensor] = []
    for name in _differentiable(op, named) if backward else ():
        named[name] = named[name].detach().requires_grad_(True)
        leaves.append(named[name])
    if not leaves:
        return forward, [], grads

    def once(launches: list[_Launch]) -> int:
        result = _call(op, named, target=target)
        before = len(launches)
        generator = torch.Generator().manual_seed(1)
        results = differentiable_results(result)
        for index, one in enumerate(results):
            grads[f"grad_{index}"] = torch.randn(one.shape, generator=generator).to(one)
        torch.autograd.grad(results, leaves, list(grads.values()), allow_unused=True)
        return before

    with undisturbed(), torch.enable_grad():
        once([])
        with _listening() as launches:
            before = once(launches)
    return forward + launches[:before], launches[before:], grads


@contextlib.contextmanager
def _listening() -> Iterator[list[_Launch]]:
    """Note every launch of a loaded kernel. The kernels themselves are put back afterwards."""
    launches: list[_Launch] = []

    def listen(kernel: load.Kernel) -> load.Kernel:
        signature = inspect.signature(kernel.launch)

        def launch(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            kept = [a.detach() if isinstance(a, torch.Tensor) else a for a in bound.arguments.values()]
            launches.append(_Launch(kernel, list(bound.arguments), kept))
            return kernel.launch(*args, **kwargs)

        return dataclasses.replace(kernel, launch=launch)

    original = dict(load._kernels)
    for key, kernel in original.items():
        load._kernels[key] = listen(kernel)
    load.launches_changed()
    try:
        yield launches
    finally:
        load._kernels.update(original)
        load.launches_changed()


def _provenance(uses: list[KernelUse]) -> list[str]:
    rows = [_SiteRow(use.site.id, use.site.source) for use in uses]
    return [f"{g.count} x {g.site} ({g.rows[0].source})" for g in group_sites(rows, lambda row: row.source)]


@dataclass
class _SiteRow:
    site: str
    source: str


def _text_only(
    folder: str, use: KernelUse, uses: list[KernelUse], example: _Example | None
) -> Iterator[tuple[str, str | bytes]]:
    name = "kernel.cpp" if use.target == "cpp" else "kernel.py"
    why = (
        "There are no inputs: the module was loaded from a file, which keeps none."
        if example is None
        else "There are no inputs: on the example's sizes another kernel of the op runs."
    )
    yield f"{folder}/{name}", use.text
    yield f"{folder}/spec.json", json.dumps(use.spec.to_dict(), indent=1, sort_keys=True) + "\n"
    lines = [f"# {use.name}", "", f"Runs `tilewright::{use.op}` on target {use.target} at:", ""]
    yield f"{folder}/README.md", "\n".join([*lines, *(f"- {row}" for row in _provenance(uses)), "", why]) + "\n"


def _folder(
    folder: str,
    launch: _Launch,
    op: CanonicalOp,
    example: _Example,
    uses: list[KernelUse],
    grads: Mapping[str, torch.Tensor] | None,
) -> Iterator[tuple[str, str | bytes]]:
    """grads: what a backward kernel's reference takes; None for a forward kernel."""
    kernel = launch.kernel
    is_backward = grads is not None
    store = _TensorStore()
    launch_args = [store.put(name, item) for name, item in zip(launch.names, launch.args, strict=True)]
    if grads is not None:
        wrt = _differentiable(op, example.arguments)
        tensors, source = traced_reference(op, {**example.arguments, **grads}, wrt)
    else:
        tensors, source = traced_reference(op, example.arguments, None)
        returns = op.overload._schema.returns
        wrt = ["out"] if len(returns) == 1 else [one.name or f"out{i}" for i, one in enumerate(returns)]
    dtype = next(t for t in tensors.values() if t.dtype.is_floating_point).dtype
    tolerance = op.tolerance[dtype]
    call = {
        "kernel": kernel.spec.kind,
        "digest": kernel.digest,
        "launch": launch_args,
        "reference": [store.put(name, tensor) for name, tensor in tensors.items()],
        "outputs": wrt,
        # Sums cancel in a gradient, so its error is absolute also where the output's is relative.
        "tolerance": {
            "atol": max(tolerance.atol, tolerance.rtol) if is_backward else tolerance.atol,
            "rtol": tolerance.rtol,
        },
        # A gradient goes through the forward's arithmetic and about as much again, twice.
        "factor": 4.0 if is_backward else 1.0,
    }
    what = "the gradient of " if is_backward else ""
    native = kernel.target == "cpp"
    for name, text in native_files(kernel) if native else [("kernel.py", kernel.text)]:
        yield f"{folder}/{name}", text
    yield f"{folder}/spec.json", json.dumps(kernel.spec.to_dict(), indent=1, sort_keys=True) + "\n"
    yield f"{folder}/inputs.safetensors", safetensors.torch.save(store.tensors)
    yield f"{folder}/call.json", json.dumps(call, indent=1) + "\n"
    yield f"{folder}/reference.py", source
    yield (
        f"{folder}/check.py",
        template("check.py.jinja").render(kind=kernel.spec.kind, digest=kernel.digest[:8], native=native),
    )
    readme = [
        f"# {kernel.spec.kind}-{kernel.digest[:8]}",
        "",
        f"Computes {what}`tilewright::{op.name}` at these sites of the model:",
        "",
        *(f"- {row}" for row in _provenance(uses)),
        "",
        f"`inputs.safetensors` holds the arguments of the first site, from {example.origin}.",
        *(_NATIVE_WORDS if native else _TRITON_WORDS),
        "",
    ]
    yield f"{folder}/README.md", "\n".join(readme)


class _TensorStore:
    """Tensors by name, each once; expanded dims are stored with size 1 and strides beside."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._keys: dict[Any, str] = {}

    def put(self, name: str, item: Any) -> Any:
        """How call.json writes an argument: ``{"tensor", "shape", "stride"}``, or a JSON value."""
        if isinstance(item, torch.dtype):
            return {"dtype": str(item).removeprefix("torch.")}
        if isinstance(item, list | tuple):
            return [self.put(f"{name}_{index}", one) for index, one in enumerate(item)]
        if callable(item):  # a service of the runtime, which a launch does without
            return None
        if not isinstance(item, torch.Tensor):
            return item
        same = (item.data_ptr(), tuple(item.shape), item.stride(), item.dtype)
        key = self._keys.get(same) if item.numel() else None
        if key is None:
            key = name if name not in self.tensors else f"{name}_{len(self.tensors)}"
            self._keys[same] = key
            narrow = item[tuple(slice(0, 1) if step == 0 and size > 1 else slice(None) for size, step in _dims(item))]
            self.tensors[key] = narrow.detach().cpu().contiguous().clone()
        return {"tensor": key, "shape": list(item.shape), "stride": list(item.stride())}
