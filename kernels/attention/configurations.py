"""Launch configurations, from `configurations.json`: by GPU generation, kernel, kind of product and head dim."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ...files import write_text
from ..device import l2_bytes
from ..dispatch import interpreting
from ..launch import is_recording, recorded_capability
from .operands import block_k_of, fits_tma, is_aligned
from .options import Options

Kernel = Literal["forward", "backward_q", "backward_kv", "backward_fused", "decode"]
Kind = Literal["half", "half_softcap", "tf32", "ieee", "gluon", "gluon_softcap"]
Generation = Literal["sm_80", "sm_86", "sm_90", "sm_100"]

# What the kernels in Gluon compute, by what the portable ones do.
GLUON_KINDS: Mapping[Kind, Kind] = {"half": "gluon", "half_softcap": "gluon_softcap"}
CONFIGURATIONS = Path(__file__).parent / "configurations.json"
MAX_HEAD_DIM = 256
# Whose configurations serve where descriptors cannot: those with the least shared memory, which run everywhere.
WITHOUT_TMA: Generation = "sm_86"


@dataclass(frozen=True)
class LaunchConfig:
    """The shape of a program: tiles of block_m queries and block_n keys, at most block_k channels wide."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool
    """Whether tiles come through TMA descriptors where the tensors' addresses and strides allow it."""
    gluon: bool = False
    """Whether this is for the kernel in Gluon; of a portable kernel's, whether that one, by its own, ships in its place, and of
    the fused backward kernel's, whether it ships in the place of two."""

    def blocks(self, q: Tensor, v: Tensor) -> dict[str, int]:
        """Return the arguments of a launch with q (B, H, T, K) and v (B, Hkv, S, V)."""
        head_dim, value_dim = q.shape[-1], v.shape[-1]
        dims = {"HEAD_DIM": head_dim, "VALUE_DIM": value_dim}
        widths = {"BLOCK_K": block_k_of(head_dim), "BLOCK_V": block_k_of(value_dim)}
        blocks = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, **widths}
        return {**dims, **blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}

    def gluon_blocks(self, q: Tensor, v: Tensor, kept: str) -> dict[str, int]:
        """Return the arguments of a launch in Gluon, whose groups of four warps keep 64 queries (m) or keys (n) each."""
        rows, looped = (self.block_m, "BLOCK_N") if kept == "m" else (self.block_n, "BLOCK_M")
        shape = {"GROUPS": rows // 64, looped: self.block_n if kept == "m" else self.block_m, "STAGES": self.num_stages}
        # All warps begin with an equal share of the registers, those that load among them; then the groups divide them anew.
        registers = 2**16 // (128 * (rows // 64 + 1)) // 8 * 8
        return {"HEAD_DIM": q.shape[-1], "VALUE_DIM": v.shape[-1], **shape, "num_warps": self.num_warps, "maxnreg": registers}


def generation_of(capability: tuple[int, int]) -> Generation:
    """Return whose configurations serve a GPU of this compute capability.

    What sets generations apart is the matrix instruction and the shared memory of a program: GeForce and L4 / L40S (8.6, 8.9,
    12.x) have 99 KiB and no warp-group instruction, whatever their year.
    """
    major, minor = capability
    if major < 8:
        raise RuntimeError(
            f"compute capability {major}.{minor}: attention's kernels need 8.0 or more; choose backend 'reference'"
        )
    if major == 8:
        return "sm_80" if minor == 0 else "sm_86"
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_86")  # pyright: ignore[reportReturnType]


def kind_of(dtype: torch.dtype, options: Options) -> Kind:
    """Return which products a kernel computes, and whether a softcap takes registers from them."""
    if dtype.itemsize == 2:
        return "half" if options.softcap is None else "half_softcap"
    return options.precision


def key_of(generation: str, kernel: Kernel, kind: Kind, block_k: int) -> str:
    """Return the name of a configuration in the file."""
    return f"{generation} {kernel} {kind} {block_k}"


def gluon_key(key: str) -> str:
    """Return the name of the configuration of the kernel in Gluon that may ship in the place of another's."""
    generation, kernel, kind, block_k = key.split()
    return " ".join((generation, kernel, GLUON_KINDS[kind], block_k))  # pyright: ignore[reportArgumentType]


def _is_gluon(key: str) -> bool:
    return key.split()[2] in GLUON_KINDS.values()


def _gluon_by_default(key: str) -> bool:
    # Of the fused backward kernel the file says that it ships, not that it is one in Gluon.
    return _is_gluon(key) and key.split()[1] != "backward_fused"


@cache
def read_configurations() -> dict[str, LaunchConfig]:
    """Return all shipped configurations by `key_of`."""
    entries = json.loads(CONFIGURATIONS.read_text())
    keys = {key: {"block_k": int(key.split()[-1]), "gluon": _gluon_by_default(key)} for key in entries}
    return {key: LaunchConfig(**keys[key] | entry) for key, entry in entries.items()}


def write_configurations(configurations: Mapping[str, LaunchConfig]) -> None:
    """Replace the shipped configurations by these, by `key_of`: one a line, sorted, so that a change shows as one line."""
    lines = []
    for key, config in sorted(configurations.items()):
        entry = {name: value for name, value in asdict(config).items() if name != "block_k"}
        if entry["gluon"] == _gluon_by_default(key):
            del entry["gluon"]
        lines.append(f" {json.dumps(key)}: {json.dumps(entry)}")
    write_text(CONFIGURATIONS, "{\n" + ",\n".join(lines) + "\n}\n")
    read_configurations.cache_clear()


def shipped_configuration(key: str) -> LaunchConfig:
    """Return what ships under `key`: of a portable kernel in whose place one in Gluon ships, the configuration of that."""
    config = read_configurations()[key]
    return read_configurations()[gluon_key(key)] if config.gluon and not _is_gluon(key) else config


def with_configuration(key: str, config: LaunchConfig) -> dict[str, LaunchConfig]:
    """Return which shipped configurations change where another ships under `key`: of one in Gluon two, that it does and how."""
    if not config.gluon or _is_gluon(key):
        return {key: config}
    return {key: replace(read_configurations()[key], gluon=True), gluon_key(key): config}


@contextmanager
def use_configuration(key: str, config: LaunchConfig) -> Iterator[None]:
    """Run a block with another configuration, portable or in Gluon, in the place of a shipped one."""
    configurations, changed = read_configurations(), with_configuration(key, config)
    shipped = {key: configurations.get(key) for key in changed}
    configurations.update(changed)
    try:
        yield
    finally:
        for key, before in shipped.items():
            if before is None:
                del configurations[key]
            else:
                configurations[key] = before


def generation_at(device: torch.device) -> Generation:
    """Return whose configurations serve `device`: interpreted kernels run with those of Hopper, descriptors included."""
    recorded = recorded_capability()
    return _generation_at(device) if recorded is None else generation_of(recorded)


@cache
def _generation_at(device: torch.device) -> Generation:
    return generation_of(torch.cuda.get_device_capability(device)) if device.type == "cuda" else "sm_90"


def launch_config(kernel: Kernel, tensors: Sequence[Tensor], options: Options, output: Tensor | None = None) -> LaunchConfig:
    """Return the configuration for the GPU, dtype and head dim of the tensors (B, H, T, K), and the options.

    It is that of the kernel in Gluon where that is chosen and can serve, which writes `output`; Triton's interpreter does not
    run Gluon. Where a descriptor cannot describe one of the tensors, as an expanded gradient, it is that of the GPUs without
    descriptors.
    """
    q = tensors[0]
    configurations = read_configurations()
    generation, kind = generation_at(q.device), kind_of(q.dtype, options)
    block_k = block_k_of(max(t.shape[-1] for t in tensors))
    config = configurations[key_of(generation, kernel, kind, block_k)]
    if config.tma and not all(map(fits_tma, tensors)):
        return configurations[key_of(WITHOUT_TMA, kernel, kind, block_k)]
    if options.kernel in ("gluon", "fused") or (options.kernel == "auto" and config.gluon):
        in_gluon = configurations.get(key_of(generation, kernel, GLUON_KINDS[kind], block_k)) if kind in GLUON_KINDS else None
        if in_gluon is not None and _serves(block_k, tensors, output):
            return in_gluon
    return replace(config, gluon=False) if config.gluon else config


def _serves(block_k: int, tensors: Sequence[Tensor], output: Tensor | None) -> bool:
    # Descriptors have to describe all tensors, in tiles of one width. What is written down or emulated is not interpreted.
    described = all(block_k_of(t.shape[-1]) == block_k and fits_tma(t) for t in tensors)
    return described and (output is None or is_aligned(output)) and (is_recording() or not interpreting())


def fused_config(tensors: Sequence[Tensor], options: Options) -> LaunchConfig | None:
    """Return the configuration of the one kernel for all gradients of q, k, v and do (B, H, T, K), or None where two run.

    It is for causal attention of equal lengths without window, documents, lengths of a cache or softcap.
    """
    q, k = tensors[:2]
    block_k = block_k_of(max(t.shape[-1] for t in tensors))
    config = read_configurations().get(key_of(generation_at(q.device), "backward_fused", "gluon", block_k))
    if config is None or options.kernel not in ("auto", "fused") or (options.kernel == "auto" and not config.gluon):
        return None
    masks = (options.window, options.begins, options.lengths, options.softcap)
    is_plain = options.causal and q.shape[2] == k.shape[2] and all(mask is None for mask in masks)
    # A program counts the sums of dq, of all heads of its group, in an int32.
    counted = (q.shape[1] // k.shape[1] + 1) * (q.shape[2] + config.block_m) * block_k
    serves = is_plain and counted < 2**31 and q.element_size() == 2 and _serves(block_k, tensors, None)
    return config if serves else None


def rows_at_once(x: Tensor, heads: float, num_rows: int) -> int:
    """Return how many of `num_rows` rows to work on at a time, so that what they load fits in half of the L2 cache.

    A row loads `heads` heads of x (B, H, S, K) and of its like; a part of one where several rows load the same.
    """
    bytes_of_row = 2 * heads * x.shape[2] * x.shape[3] * x.element_size()
    return min(max(1, int(l2_bytes(x.device) / 2 / max(bytes_of_row, 1))), num_rows)
