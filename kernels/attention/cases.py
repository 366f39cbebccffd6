"""The kernels as they ship, to be compiled for GPUs that are not here."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args

from ..inspect import ARCHITECTURES, KernelCase
from .backward import attention_backward_kv, attention_backward_q
from .configurations import WITHOUT_TMA, Kernel, Kind, LaunchConfig, block_k_of, key_of, read_configurations
from .decode import BLOCK_SPLITS, attention_combine, attention_decode
from .forward import attention_forward

KERNELS: dict[Kernel, Any] = {
    "forward": attention_forward,
    "backward_q": attention_backward_q,
    "backward_kv": attention_backward_kv,
    "decode": attention_decode,
}
COMPILED: dict[Kind, tuple[int, ...]] = {
    "half": (16, 32, 64, 80, 96, 128, 192, 256), "half_softcap": (128, 256), "tf32": (64, 128), "ieee": (64, 128),
}  # fmt: skip
# The pointers that are not to elements of the dtype.
_TYPES: dict[str, str] = {}
_TYPES |= dict.fromkeys(("begins_ptr", "ends_ptr", "lengths_ptr"), "*i32")
_TYPES |= dict.fromkeys(("lse_ptr", "dlse_ptr", "delta_ptr", "sinks_ptr", "part_ptr", "part_lse_ptr"), "*fp32")


def _types(
    names: list[str], constants: dict[str, Any], dtype: str, tiles: dict[str, int], block_k: int | None
) -> dict[str, str]:
    def type_of(name: str) -> str:
        if name in tiles and block_k is not None:
            return f"tensordesc<{dtype}[1, 1, {tiles[name]}, {block_k}]>"
        if name in tiles or name.endswith("_ptr"):
            return _TYPES.get(name, f"*{dtype}")
        return "i32"

    return {name: type_of(name) for name in names if name not in constants}


def kernel_case(
    architecture: str,
    kernel: Kernel,
    kind: Kind,
    head_dim: int,
    config: LaunchConfig,
    *,
    causal: bool = True,
    window: bool = False,
    documents: bool = False,
    softcap: float | None = None,
    sinks: bool = False,
    grouped: bool = False,
) -> KernelCase:
    """Return a kernel as a launch would compile it; `grouped` with more query heads than key-value heads."""
    function = KERNELS[kernel]
    half = kind in ("half", "half_softcap")
    dtype = "bf16" if half else "fp32"
    softcap = 50.0 if kind == "half_softcap" else softcap
    constants: dict[str, Any] = {
        "scale": head_dim**-0.5, "softcap": softcap, "CAUSAL": causal, "WINDOW": window, "DOCUMENTS": documents, "SINKS": sinks,
        "DLSE": False, "GROUPED": grouped, "PRECISION": "tf32" if kind == "tf32" else "ieee", "TMA": config.tma,
        "HEAD_DIM": head_dim, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "group_size": 1,
        "LENGTHS": False, "SPLIT": True, "ONE_QUERY": True, "VALUE_DIM": head_dim, "BLOCK_V": config.block_k,
    }  # fmt: skip
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    if grouped:
        del constants["group_size"]
    tiles = {"q": config.block_m, "do": config.block_m, "k": config.block_n, "v": config.block_n}
    types = _types(function.arg_names, constants, dtype, tiles, config.block_k if config.tma else None)
    if kernel == "decode":
        # Of several splits, whose parts are combined.
        types["o_ptr"] = "*fp32"
    options = {"causal": causal, "window": window, "documents": documents, "softcap": softcap is not None}
    options |= {"sinks": sinks, "grouped": grouped}
    shown = " ".join(name for name, on in options.items() if on)
    # Strides of tensors in half precision come in units of 16 bytes.
    divisible = ("o_", "dq_", "dk_", "dv_", "part_") if half else ("",)
    return KernelCase(
        name=f"attention {kernel} {head_dim} {dtype if half else kind} {'tma ' if config.tma else ''}{shown}".rstrip(),
        kernel=function,
        types=types,
        constants=constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        aligned=tuple(name for name in types if name.endswith("_stride") and name.startswith(divisible)),
        architectures=(architecture,),
    )


def shipped_cases(architecture: str, kernel: Kernel, kind: Kind, head_dim: int, config: LaunchConfig) -> Iterator[KernelCase]:
    """Yield what ships of one configuration: causal attention and, at the head dim of most models, every option together."""
    yield kernel_case(architecture, kernel, kind, head_dim, config)
    if kernel == "decode" and config.block_m > 16:
        # One query of a few heads is the common step.
        yield kernel_case(architecture, kernel, kind, head_dim, replace(config, block_m=16))
    if kind == "half" and head_dim in (64, 128):
        options = {"causal": False, "window": True, "documents": True, "sinks": True, "grouped": True}
        yield kernel_case(architecture, kernel, kind, head_dim, config, **options)


def compile_cases() -> Iterator[KernelCase]:
    """Yield every kernel with every configuration that ships."""
    configurations = read_configurations()
    for architecture in ARCHITECTURES:
        for kernel in get_args(Kernel):
            for kind, head_dims in COMPILED.items():
                for head_dim in head_dims:
                    config = configurations[key_of(architecture, kernel, kind, block_k_of(head_dim))]
                    yield from shipped_cases(architecture, kernel, kind, head_dim, config)
                    if config.tma and head_dim in (64, 128):
                        fallback = configurations[key_of(WITHOUT_TMA, kernel, kind, block_k_of(head_dim))]
                        yield kernel_case(architecture, kernel, kind, head_dim, fallback)
    for head_dim in (64, 128):
        types = {"part_ptr": "*fp32", "part_lse_ptr": "*fp32", "o_ptr": "*bf16", "lse_ptr": "*fp32", "sinks_ptr": "*fp32"}
        constants = {"SINKS": False, "VALUE_DIM": head_dim, "BLOCK_SPLITS": BLOCK_SPLITS, "BLOCK_V": block_k_of(head_dim)}
        sizes = {name: "i32" for name in attention_combine.arg_names if name not in types and name not in constants}
        yield KernelCase(f"attention combine {head_dim} bf16", attention_combine, types | sizes, constants, 4)
