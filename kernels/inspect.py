"""Compile kernels for a GPU architecture without that GPU, and report registers, spills, shared memory and load widths.

Run as `tilewright bench inspect`. TRITON_INTERPRET must not be set, because it replaces the compiler.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .attention.choice import FORMS, use_attention_kernel
from .dispatch import HAS_TRITON, interpreting
from .launch import Launch, recording
from .op import ALL, DTYPES, Op, Sizes

# Launch arguments that are compiler options, not kernel arguments.
OPTIONS: Mapping[str, Any] = {"num_warps": 4, "num_stages": 3, "maxnreg": None}


@dataclass(frozen=True)
class KernelCase:
    """A kernel with the specialization of one launch."""

    name: str
    kernel: Any
    types: tuple[tuple[str, str], ...]
    """Triton type of each argument that is not a constant: "*bf16", "i64", ..."""
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    """Arguments that are multiples of 16."""
    num_warps: int = OPTIONS["num_warps"]
    num_stages: int = OPTIONS["num_stages"]
    maxnreg: int | None = OPTIONS["maxnreg"]


@dataclass(frozen=True)
class Architecture:
    """Resources of a multiprocessor of one GPU generation."""

    capability: int
    registers: int
    max_threads: int
    max_programs: int
    shared_bytes: int
    """Per multiprocessor."""
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
    """Resources and instructions of a compiled kernel."""

    name: str
    architecture: str
    registers: int
    """Per thread."""
    spilled_bytes: int
    """Local memory per thread."""
    shared_bytes: int
    programs_per_sm: int
    """Programs that a multiprocessor runs at once, as limited by registers and shared memory."""
    occupancy: float
    """Share of a multiprocessor's threads that run at once, as limited by registers and shared memory."""
    load_bytes: int
    """Widest load of a thread from global memory; 16, the maximum, for asynchronous tile copies."""
    matrix_instruction: str
    """`wgmma`, `tcgen05` or `mma`; empty without matrix instructions."""


_OTHER_TYPES = {
    torch.bool: "u1", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
}  # fmt: skip


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + (_OTHER_TYPES | DTYPES)[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    # A TMA descriptor of tiles; in Gluon its type includes the layout in shared memory.
    layout = f",{value.layout!r}" if hasattr(value, "layout") else ""
    return f"tensordesc<{DTYPES[value.base.dtype]}{list(value.block_shape)}{layout}>"


def kernel_case(launch: Launch, name: str) -> KernelCase:
    """Return what Triton would compile for a launch. It specializes integers on being 1 and on divisibility by 16."""
    kernel, options = launch.kernel, dict(launch.constants)
    compiler = {option: options.pop(option, default) for option, default in OPTIONS.items()}
    values = dict(zip(kernel.arg_names, launch.args, strict=False)) | options
    constants, types, aligned = {}, {}, []
    for parameter in kernel.params:
        value = values[parameter.name]
        specialises = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialises and type(value) is int and value == 1):
            constants[parameter.name] = value
            continue
        types[parameter.name] = _type_of(value)
        # Meta tensors have address 0, which is aligned like the 512-byte blocks of PyTorch's allocator.
        address = value.data_ptr() if isinstance(value, Tensor) else value
        if specialises and type(address) is int and address % 16 == 0:
            aligned.append(parameter.name)
    return KernelCase(name, kernel, tuple(types.items()), tuple(constants.items()), tuple(aligned), **compiler)


def launches(op: Op, sizes: Sizes, architecture: str) -> Iterator[KernelCase]:
    """Yield the kernels that a call and its backward pass launch on a GPU of `ARCHITECTURES`."""
    sizes = dict(sizes)
    name = op.label(sizes)
    with recording(divmod(ARCHITECTURES[architecture].capability, 10)) as recorded:
        positional, options = op.arguments(torch.device("meta"), sizes.pop("dtype"), **sizes)
        outputs = op.function(*positional, **options)
        outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y is not None and y.requires_grad]
        if outputs:
            torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])
    for launch in recorded:
        yield kernel_case(launch, f"{launch.kernel.__name__} {name}")


def distinct_cases(calls: Iterable[tuple[Op, Sizes]], architecture: str) -> Iterator[KernelCase]:
    """Yield each distinct kernel that calls (op, sizes with dtype) launch on one of `ARCHITECTURES`.

    Attention yields all forms of its kernels, because a GPU may choose any.
    """
    seen = set()
    for (op, sizes), form in product(calls, FORMS):
        with use_attention_kernel(form):
            cases = list(launches(op, sizes, architecture))
        for case in cases:
            compiled = replace(case, name="")
            if compiled not in seen:
                seen.add(compiled)
                yield case


def all_cases(architecture: str, ops: Iterable[Op] | None = None) -> Iterator[KernelCase]:
    """Yield each distinct kernel case of the `compiled` calls of ops on one of `ARCHITECTURES`."""
    supported = (op for op in (ALL.values() if ops is None else ops) if ARCHITECTURES[architecture].capability >= op.capability)
    yield from distinct_cases(((op, sizes) for op in supported for sizes in op.compiled), architecture)


def _load_bytes(ptx: str) -> int:
    # ld.global[.cache hints][.v4].b32: number of elements, bits of each.
    found = re.findall(r"ld\.global[\w:.]*?(?:\.v(\d))?\.[bfsu](\d+)\s", ptx)
    loaded = [int(elements or 1) * int(bits) // 8 for elements, bits in found]
    # Copies to shared memory: cp.async.cg.shared.global [to], [from], bytes; and tiles through TMA descriptors.
    copied = [int(size) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^,]*,[^,]*, (?:0x)?(\d+)", ptx)]
    described = [16] if "cp.async.bulk.tensor" in ptx else []
    return max(loaded + copied + described, default=0)


def _matrix_instruction(ptx: str) -> str:
    kinds = {"wgmma": r"\bwgmma\.mma_async", "tcgen05": r"\btcgen05\.mma", "mma": r"\bmma\.sync"}
    return next((kind for kind, pattern in kinds.items() if re.search(pattern, ptx)), "")


def inspect(case: KernelCase, architecture_name: str) -> Report:
    """Compile `case` for one of `ARCHITECTURES` and report on the binary."""
    return report_on(case, architecture_name, compile_case(case, architecture_name))


def programs_per_sm(architecture: Architecture, registers: int, shared_bytes: int, num_warps: int) -> int:
    """Return how many programs a multiprocessor runs at once."""
    # Registers are allocated per warp in units of 256, shared memory in units of 128 bytes; the system reserves 1 KB a program.
    warp_registers = -(-registers * 32 // 256) * 256
    by_registers = architecture.registers // (warp_registers * num_warps)
    by_shared = architecture.shared_bytes // (-(-shared_bytes // 128) * 128 + 1024)
    by_threads = architecture.max_threads // (32 * num_warps)
    return min(by_registers, by_shared, by_threads, architecture.max_programs)


def report_on(case: KernelCase, architecture_name: str, compiled: Any) -> Report:
    """Report on the result of `compile_case`."""
    architecture = ARCHITECTURES[architecture_name]
    usage = tool("cuobjdump", compiled.asm["cubin"], "-res-usage")
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))  # pyright: ignore
    shared, ptx = compiled.metadata.shared, compiled.asm["ptx"]
    num_warps = num_warps_of(ptx)
    programs = programs_per_sm(architecture, registers, shared, num_warps)
    return Report(
        case.name,
        architecture_name,
        registers,
        stack,
        shared,
        programs,
        programs * num_warps * 32 / architecture.max_threads,
        _load_bytes(ptx),
        _matrix_instruction(ptx),
    )


def _attributes(case: KernelCase) -> dict[tuple[int, ...], list[list[Any]]]:
    """Return the attributes of the arguments exactly as a launch has them, so that a launch finds the code in Triton's cache.

    Specialized arguments that are not multiples of 16 have an empty list. So do constants: in Triton 3.6 only strings, later
    all.
    """
    import triton

    all_constants = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)
    types, constants = dict(case.types), dict(case.constants)
    attributes = {}
    for i, parameter in enumerate(case.kernel.params):
        name, type_ = parameter.name, types.get(parameter.name, "")
        specialized = not parameter.do_not_specialize and type_.startswith(("*", "i"))
        if specialized or (name in constants and (all_constants or isinstance(constants[name], str))):
            attributes[i,] = [["tt.divisibility", 16]] if name in case.aligned else []
    return attributes


def compile_case(case: KernelCase, architecture_name: str) -> Any:
    """Compile a case for one of `ARCHITECTURES`; return Triton's compiled kernel, with `metadata` and `asm`."""
    if not HAS_TRITON or interpreting():
        raise RuntimeError("cannot compile kernels: Triton is not installed, or TRITON_INTERPRET is set")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    names = case.kernel.arg_names
    signature = dict.fromkeys(names, "constexpr") | dict(case.types)
    source = (GluonASTSource if case.kernel.is_gluon() else ASTSource)(
        fn=case.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in case.constants},
        attrs=_attributes(case),
    )
    options = {option: getattr(case, option) for option in OPTIONS}
    return triton.compile(source, target=GPUTarget("cuda", ARCHITECTURES[architecture_name].capability, 32), options=options)


def tool(name: str, cubin: bytes, *arguments: str) -> str:
    """Return the output of a binary tool that ships with Triton, such as cuobjdump."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name, *arguments, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def num_warps_of(ptx: str) -> int:
    """Return the number of warps of a program, including all warp-specialized partitions."""
    found = re.search(r"\.reqntid (\d+)", ptx)
    assert found is not None
    return int(found[1]) // 32
