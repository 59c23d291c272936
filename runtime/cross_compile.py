"""Compile a rendered Triton kernel for GPUs this machine does not have, and hold it against their limits.

No GPU and no CUDA or ROCm installation is needed: triton brings LLVM and ptxas. A kernel file says in its ``COMPILE``
table how each of its kernels is compiled; :func:`cross_compile` reads that table.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import fingerprint
from .errors import BadArgument, BuildError

_KIB = 1024


@dataclass(frozen=True)
class GpuTarget:
    """A GPU architecture and the limits a launch meets there.

    shared_bytes: most dynamic shared memory (LDS on AMD) of one block. registers: most 32-bit registers of one thread.
    Sources: CUDA C Programming Guide, technical specifications per compute capability ("maximum amount of shared
    memory per thread block"); AMD CDNA3 and CDNA4 instruction set guides (LDS per work-group; 256 vector plus 256
    accumulation registers).
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_bytes: int
    registers: int
    block_threads: int = 1024
    tensor_memory_columns: int = 0


GPU_TARGETS = {
    target.name: target
    for target in (
        GpuTarget("sm_80", "cuda", 80, 32, 163 * _KIB, 255),
        GpuTarget("sm_86", "cuda", 86, 32, 99 * _KIB, 255),
        GpuTarget("sm_89", "cuda", 89, 32, 99 * _KIB, 255),
        GpuTarget("sm_90", "cuda", 90, 32, 227 * _KIB, 255),
        GpuTarget("sm_100", "cuda", 100, 32, 227 * _KIB, 255, tensor_memory_columns=512),
        GpuTarget("sm_120", "cuda", 120, 32, 99 * _KIB, 255),
        GpuTarget("gfx942", "hip", "gfx942", 64, 64 * _KIB, 512),
        GpuTarget("gfx950", "hip", "gfx950", 64, 160 * _KIB, 512),
    )
}
# What every kernel is compiled for in the tests.
DEFAULT_TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950")


@dataclass(frozen=True)
class CompiledKernelInfo:
    """One kernel compiled for one GPU.

    shared_bytes: shared memory (LDS) of one block, static and dynamic.
    registers: 32-bit registers of one thread (AMD: vector registers, accumulation registers included), None when the
        binary does not say.
    stack_bytes: local memory of one thread; above zero means registers were spilled or an array is indexed by a
        run-time value.
    asm: each stage's text or binary by kind (``ttir``, ``ttgir``, ``llir``, ``ptx``, ``cubin``, ``amdgcn``, ``hsaco``).
    """

    kernel: str
    target: str
    shared_bytes: int
    registers: int | None
    stack_bytes: int | None
    num_warps: int
    num_stages: int
    asm: Mapping[str, str | bytes] = field(repr=False, compare=False)

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self.asm)


def cross_compile(kernel: Any, target: str, *, aligned: bool = True) -> list[CompiledKernelInfo]:
    """Compile every kernel of a rendered Triton file for the named GPU, which need not be here.

    kernel: the file's text, or a :class:`~.load.Kernel`. target: a key of :data:`GPU_TARGETS`.
    aligned: compile as Triton does when every pointer and integer argument is divisible by 16. Loads then are wide and
        pipelined through shared memory, so this is the case that needs the most of it; False is the general case. An
        entry of ``COMPILE`` may name under ``"unaligned"`` the arguments that never are divisible.

    Raises :class:`~.errors.BadArgument` for an unknown target; :class:`~.errors.BuildError`, naming kernel, target and
    limit, when a kernel does not compile or needs more than the target has;
    :class:`~.errors.MissingDependency` without triton.
    """
    if target not in GPU_TARGETS:
        raise BadArgument(f"unknown GPU target {target!r}: choose one of {', '.join(GPU_TARGETS)}")
    text = kernel if isinstance(kernel, str) else kernel.text
    from .targets.triton import import_text

    digest = fingerprint.sha256(text.encode())
    module = import_text(text, Path(f"<tilewright cross-compile {digest[:16]}>"), digest, interpret=False)
    return compile_module(module, target, aligned=aligned)


def compile_module(module: Any, target: str, *, aligned: bool = True) -> list[CompiledKernelInfo]:
    """:func:`cross_compile` for a kernel file that was already imported with its kernels in compiled form."""
    table = getattr(module, "COMPILE", None)
    if not isinstance(table, Iterable):
        raise BuildError("the kernel file has no COMPILE table, which says how its kernels are compiled")
    return [_compile(module, dict(entry), GPU_TARGETS[target], aligned) for entry in table]


def _compile(module: Any, entry: dict[str, Any], gpu: GpuTarget, aligned: bool) -> CompiledKernelInfo:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend

    from .targets.triton_language import compile_mode

    missing = [key for key in ("kernel", "signature", "constexprs") if key not in entry]
    if missing:
        raise BuildError(f"an entry of the COMPILE table lacks {missing[0]!r}: {entry}")
    name, signature = entry["kernel"], dict(entry["signature"])
    function = getattr(module, name, None)
    if function is None:
        raise BuildError(f"COMPILE names the kernel {name!r}, which the file does not define")
    unknown = sorted(set(signature) ^ set(function.arg_names))
    if unknown:
        raise BuildError(f"COMPILE's signature of {name} and the kernel disagree about the argument {unknown[0]!r}")
    options = {key: entry[key] for key in ("num_warps", "num_stages") if key in entry} | dict(entry.get("options", {}))
    gpu_target = GPUTarget(gpu.backend, gpu.arch, gpu.warp_size)
    attributes: dict[tuple[int, ...], Any] = {}
    if aligned:
        divisible = make_backend(gpu_target).parse_attr("D")
        unaligned = set(entry.get("unaligned", ()))
        for index, argument in enumerate(function.arg_names):
            kind = signature[argument]
            if argument not in unaligned and (kind.startswith("*") or kind in ("i32", "i64", "u32", "u64")):
                attributes[(index,)] = divisible
    ordered = {argument: signature[argument] for argument in function.arg_names}
    where = f"kernel {name} for {gpu.name}"
    try:
        with compile_mode():
            source = ASTSource(function, signature=ordered, constexprs=dict(entry["constexprs"]), attrs=attributes)
            compiled = triton.compile(source, target=gpu_target, options=options)
            asm = {kind: compiled.asm[kind] for kind in compiled.asm if kind != "source"}
    except Exception as error:  # Triton, LLVM and ptxas each raise their own classes; to the user it is one failure
        raise BuildError(f"{where} does not compile: {type(error).__name__}: {error}") from error
    metadata = compiled.metadata
    registers, stack = _usage(asm)
    info = CompiledKernelInfo(
        name, gpu.name, metadata.shared, registers, stack, metadata.num_warps, metadata.num_stages, asm
    )
    _check(info, gpu, getattr(metadata, "tmem_size", 0) or 0, where)
    return info


def _check(info: CompiledKernelInfo, gpu: GpuTarget, tensor_memory: int, where: str) -> None:
    """Raise :class:`~.errors.BuildError` for the first limit of the GPU that the kernel breaks."""
    limits = (
        (info.shared_bytes, gpu.shared_bytes, "bytes of shared memory", "use smaller blocks or fewer stages"),
        (info.num_warps * gpu.warp_size, gpu.block_threads, "threads in a block", "use fewer warps"),
        (tensor_memory, gpu.tensor_memory_columns, "columns of tensor memory", "use smaller blocks"),
    )
    for needed, limit, what, remedy in limits:
        if needed > limit:
            raise BuildError(f"{where} needs {needed} {what}, and {gpu.name} has {limit}: {remedy}")


def _usage(asm: Mapping[str, str | bytes]) -> tuple[int | None, int | None]:
    """Registers and bytes of local memory of a thread, from the compiled binary or its assembly."""
    if isinstance(binary := asm.get("cubin"), bytes):
        return cubin_usage(binary)
    if isinstance(text := asm.get("amdgcn"), str):
        found = dict(re.findall(r"^\s*\.(vgpr_count|private_segment_fixed_size):\s*(\d+)", text, re.MULTILINE))
        registers, stack = found.get("vgpr_count"), found.get("private_segment_fixed_size")
        return (int(registers) if registers else None, int(stack) if stack else None)
    return None, None


_REGISTER_COUNT, _FRAME_SIZE = 0x2F, 0x11


def cubin_usage(cubin: bytes) -> tuple[int | None, int | None]:
    """Registers and stack bytes of a thread from an NVIDIA binary with one kernel; None for what it does not say.

    The ``.nv.info`` section of the ELF file is a list of records: a format byte (4: a 16-bit size and as many bytes
    of payload), an attribute byte, then the size. ``EIATTR_REGCOUNT`` and ``EIATTR_FRAME_SIZE`` have the payload
    (symbol index, value). Checked against what ``ptxas -v`` prints in the tests.
    """
    if cubin[:5] != b"\x7fELF\x02":
        return None, None
    table = struct.unpack_from("<Q", cubin, 0x28)[0]
    entry_size, count, names_index = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", cubin, table + i * entry_size) for i in range(count)]
    names = sections[names_index][4]
    values: dict[int, int] = {}
    for section in sections:
        start = names + section[0]
        if cubin[start : cubin.index(b"\0", start)] != b".nv.info":
            continue
        position, end = section[4], section[4] + section[5]
        while position + 4 <= end:
            form, attribute, payload = struct.unpack_from("<BBH", cubin, position)
            position += 4
            if form == 4:
                if payload == 8:
                    values[attribute] = max(values.get(attribute, 0), struct.unpack_from("<II", cubin, position)[1])
                position += payload
    return values.get(_REGISTER_COUNT), values.get(_FRAME_SIZE)
