"""Compiles kernels for a named GPU without having one, and says what the compiler made of them.

Run as `tilewright bench inspect`. It needs a process without TRITON_INTERPRET, which replaces the compiler.
"""

import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .dispatch import HAS_TRITON, interpreting

OPS = ("rms_norm", "swiglu", "rope", "cross_entropy", "linear_cross_entropy", "attention.cases")


@dataclass(frozen=True)
class KernelCase:
    """A kernel with the launch configuration that ships for one shape and dtype."""

    name: str
    kernel: Any
    types: Mapping[str, str]
    """Triton type of each argument that is not a constant: "*bf16", "i64", ..."""
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int = 3
    aligned: tuple[str, ...] = field(default=())
    """Integer arguments that are multiples of 16, as Triton would find at launch."""
    architectures: tuple[str, ...] = ()
    """Those that the configuration ships for; none means all."""


@dataclass(frozen=True)
class Architecture:
    """What a multiprocessor of one GPU generation offers to its programs."""

    capability: int
    registers: int
    max_threads: int
    max_programs: int
    shared_bytes: int
    """Of a multiprocessor."""
    shared_bytes_per_program: int


# NVIDIA, CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability".
ARCHITECTURES = {
    "sm_80": Architecture(80, 65536, 2048, 32, 164 * 1024, 163 * 1024),
    "sm_86": Architecture(86, 65536, 1536, 16, 100 * 1024, 99 * 1024),
    "sm_90": Architecture(90, 65536, 2048, 32, 228 * 1024, 227 * 1024),
    "sm_100": Architecture(100, 65536, 2048, 32, 228 * 1024, 227 * 1024),
}


@dataclass(frozen=True)
class Report:
    """What the compiler made of a kernel."""

    name: str
    architecture: str
    registers: int
    """Of a thread."""
    spilled_bytes: int
    """Of a thread's local memory."""
    shared_bytes: int
    occupancy: float
    """Share of a multiprocessor's threads that registers and shared memory let run at once."""
    load_bytes: int
    """Widest load from global memory of one thread, or 16, the most there is, where tiles are copied asynchronously."""
    matrix_instruction: str
    """What multiplies matrices: `wgmma`, `tcgen05`, `mma`, or nothing."""


def all_cases(architecture: str) -> Iterator[KernelCase]:
    """Yield every kernel with every launch configuration that ships for one of `ARCHITECTURES` and matters."""
    for op in OPS:
        for case in importlib.import_module(f".{op}", __package__).compile_cases():
            if not case.architectures or architecture in case.architectures:
                yield case


def _occupancy(architecture: Architecture, registers: int, shared_bytes: int, num_warps: int) -> float:
    # Registers are handed out to warps in units of 256, shared memory in units of 128 bytes with 1 KB kept by the system.
    warp_registers = -(-registers * 32 // 256) * 256
    by_registers = architecture.registers // (warp_registers * num_warps)
    by_shared = architecture.shared_bytes // (-(-shared_bytes // 128) * 128 + 1024)
    by_threads = architecture.max_threads // (32 * num_warps)
    programs = min(by_registers, by_shared, by_threads, architecture.max_programs)
    return programs * 32 * num_warps / architecture.max_threads


def _load_bytes(ptx: str) -> int:
    # ld.global[.cache hints][.v4].b32: so many elements of so many bits.
    found = re.findall(r"ld\.global[\w:.]*?(?:\.v(\d))?\.[bfsu](\d+)\s", ptx)
    loaded = [int(elements or 1) * int(bits) // 8 for elements, bits in found]
    # Straight to shared memory: cp.async.cg.shared.global [to], [from], bytes; and whole tiles through descriptors.
    copied = [int(size) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^,]*,[^,]*, (?:0x)?(\d+)", ptx)]
    described = [16] if "cp.async.bulk.tensor" in ptx else []
    return max(loaded + copied + described, default=0)


def _matrix_instruction(ptx: str) -> str:
    kinds = {"wgmma": r"\bwgmma\.mma_async", "tcgen05": r"\btcgen05\.mma", "mma": r"\bmma\.sync"}
    return next((kind for kind, pattern in kinds.items() if re.search(pattern, ptx)), "")


def inspect(case: KernelCase, architecture_name: str) -> Report:
    """Compile `case` for one of `ARCHITECTURES` and read the result with the tools that Triton brings along."""
    if not HAS_TRITON or interpreting():
        raise RuntimeError(
            "kernels are compiled by Triton, which must be there and must not be interpreting (TRITON_INTERPRET)"
        )
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    architecture = ARCHITECTURES[architecture_name]
    names = case.kernel.arg_names
    missing = set(names) ^ (case.types.keys() | case.constants.keys())
    if missing:
        raise ValueError(f"{case.name}: types and constants differ from the kernel's arguments in {sorted(missing)}")
    signature = {name: case.types.get(name, "constexpr") for name in names}
    aligned = [i for i, name in enumerate(names) if signature[name].startswith("*") or name in case.aligned]
    source = ASTSource(
        fn=case.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in case.constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture.capability, 32), options=options)
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))  # pyright: ignore
    shared = compiled.metadata.shared
    return Report(
        case.name,
        architecture_name,
        registers,
        stack,
        shared,
        _occupancy(architecture, registers, shared, case.num_warps),
        _load_bytes(compiled.asm["ptx"]),
        _matrix_instruction(compiled.asm["ptx"]),
    )
