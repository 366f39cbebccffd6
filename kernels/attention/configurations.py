"""Launch configurations from `configurations.json`, keyed by GPU generation, kernel, kind of product and head dim."""

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

# From the kind of a portable kernel to the kind of its Gluon counterpart.
GLUON_KINDS: Mapping[Kind, Kind] = {"half": "gluon", "half_softcap": "gluon_softcap"}
CONFIGURATIONS = Path(__file__).parent / "configurations.json"
MAX_HEAD_DIM = 256
# Fallback where TMA descriptors cannot be used: these configurations need the least shared memory, so they run on every GPU.
WITHOUT_TMA: Generation = "sm_86"


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes of a program: block_m queries, block_n keys, and at most block_k channels."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool
    """Load tiles through TMA descriptors where the tensors' addresses and strides allow it."""
    gluon: bool = False
    """Whether `auto` selects a Gluon kernel. Under a portable kernel's key: use the Gluon counterpart, which has its own entry.
    Under the fused backward kernel's key: use the fused kernel in place of two. Always true under other Gluon keys."""

    def blocks(self, q: Tensor, v: Tensor) -> dict[str, int]:
        """Return the launch arguments of a portable kernel for q (B, H, T, K) and v (B, Hkv, S, V)."""
        head_dim, value_dim = q.shape[-1], v.shape[-1]
        dims = {"HEAD_DIM": head_dim, "VALUE_DIM": value_dim}
        widths = {"BLOCK_K": block_k_of(head_dim), "BLOCK_V": block_k_of(value_dim)}
        blocks = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, **widths}
        return {**dims, **blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}

    def gluon_blocks(self, q: Tensor, v: Tensor, kept: str) -> dict[str, int]:
        """Return the launch arguments of a Gluon kernel, in which each group of four warps owns 64 queries (m) or keys (n)."""
        rows, looped = (self.block_m, "BLOCK_N") if kept == "m" else (self.block_n, "BLOCK_M")
        shape = {"GROUPS": rows // 64, looped: self.block_n if kept == "m" else self.block_m, "STAGES": self.num_stages}
        # All warps, including those that load, start with an equal share of the registers; the kernel reallocates them later.
        registers = 2**16 // (128 * (rows // 64 + 1)) // 8 * 8
        return {"HEAD_DIM": q.shape[-1], "VALUE_DIM": v.shape[-1], **shape, "num_warps": self.num_warps, "maxnreg": registers}


def generation_of(capability: tuple[int, int]) -> Generation:
    """Return the generation whose configurations a GPU of this compute capability uses.

    Generations differ in matrix instructions and in shared memory per program. GeForce and L4 / L40S (8.6, 8.9, 12.x) share one
    generation: they have 99 KiB and no warp-group instruction.
    """
    major, minor = capability
    if major < 8:
        raise RuntimeError(
            f"compute capability is {major}.{minor}: the attention kernels need 8.0 or newer; use the 'reference' backend"
        )
    if major == 8:
        return "sm_80" if minor == 0 else "sm_86"
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_86")  # pyright: ignore[reportReturnType]


def kind_of(dtype: torch.dtype, options: Options) -> Kind:
    """Return the kind of matrix product. A softcap needs more registers, so it is a kind of its own."""
    if dtype.itemsize == 2:
        return "half" if options.softcap is None else "half_softcap"
    return options.precision


def key_of(generation: str, kernel: Kernel, kind: Kind, block_k: int) -> str:
    """Return the key of a configuration in the file."""
    return f"{generation} {kernel} {kind} {block_k}"


def gluon_key(key: str) -> str:
    """Return the key of the Gluon counterpart of a portable kernel's key."""
    generation, kernel, kind, block_k = key.split()
    return " ".join((generation, kernel, GLUON_KINDS[kind], block_k))  # pyright: ignore[reportArgumentType]


def _is_gluon(key: str) -> bool:
    return key.split()[2] in GLUON_KINDS.values()


def _gluon_by_default(key: str) -> bool:
    # For the fused backward kernel, `gluon` in the file records whether it is the default, since it is always a Gluon kernel.
    return _is_gluon(key) and key.split()[1] != "backward_fused"


@cache
def read_configurations() -> dict[str, LaunchConfig]:
    """Return all shipped configurations, keyed by `key_of`."""
    entries = json.loads(CONFIGURATIONS.read_text())
    keys = {key: {"block_k": int(key.split()[-1]), "gluon": _gluon_by_default(key)} for key in entries}
    return {key: LaunchConfig(**keys[key] | entry) for key, entry in entries.items()}


def write_configurations(configurations: Mapping[str, LaunchConfig]) -> None:
    """Replace the shipped configurations, keyed by `key_of`. Writes one sorted entry a line, so that diffs are small."""
    lines = []
    for key, config in sorted(configurations.items()):
        entry = {name: value for name, value in asdict(config).items() if name != "block_k"}
        if entry["gluon"] == _gluon_by_default(key):
            del entry["gluon"]
        lines.append(f" {json.dumps(key)}: {json.dumps(entry)}")
    write_text(CONFIGURATIONS, "{\n" + ",\n".join(lines) + "\n}\n")
    read_configurations.cache_clear()


def shipped_configuration(key: str) -> LaunchConfig:
    """Return the default configuration for `key`: the Gluon counterpart's where that kernel is the default."""
    config = read_configurations()[key]
    return read_configurations()[gluon_key(key)] if config.gluon and not _is_gluon(key) else config


def with_configuration(key: str, config: LaunchConfig) -> dict[str, LaunchConfig]:
    """Return the entries to change so that `config` becomes the default for `key`.

    A Gluon configuration under a portable key changes two entries: the flag of the portable key and the Gluon entry.
    """
    if not config.gluon or _is_gluon(key):
        return {key: config}
    return {key: replace(read_configurations()[key], gluon=True), gluon_key(key): config}


@contextmanager
def use_configuration(key: str, config: LaunchConfig) -> Iterator[None]:
    """Use `config`, portable or Gluon, as the default for `key` within a `with` block."""
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
    """Return the generation whose configurations `device` uses. Interpreted kernels use Hopper's, including TMA descriptors."""
    recorded = recorded_capability()
    return _generation_at(device) if recorded is None else generation_of(recorded)


@cache
def _generation_at(device: torch.device) -> Generation:
    return generation_of(torch.cuda.get_device_capability(device)) if device.type == "cuda" else "sm_90"


def launch_config(kernel: Kernel, tensors: Sequence[Tensor], options: Options, output: Tensor | None = None) -> LaunchConfig:
    """Return the configuration for the GPU, dtype and head dim of the tensors (B, H, T, K), and the options.

    Returns a Gluon configuration where Gluon is selected and supports the tensors and the `output` that it writes. Triton's
    interpreter does not run Gluon. Returns the configuration of `WITHOUT_TMA` if a descriptor cannot describe one of the
    tensors, such as an expanded gradient.
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
    # All tensors need a TMA descriptor with tiles of the same width. A recorded launch does not run in the interpreter.
    described = all(block_k_of(t.shape[-1]) == block_k and fits_tma(t) for t in tensors)
    return described and (output is None or is_aligned(output)) and (is_recording() or not interpreting())


def fused_config(tensors: Sequence[Tensor], options: Options) -> LaunchConfig | None:
    """Return the configuration of the fused backward kernel for q, k, v and do (B, H, T, K), or None if two kernels run.

    The fused kernel supports causal attention with as many queries as keys and no window, documents, cache lengths or softcap.
    """
    q, k = tensors[:2]
    block_k = block_k_of(max(t.shape[-1] for t in tensors))
    config = read_configurations().get(key_of(generation_at(q.device), "backward_fused", "gluon", block_k))
    if config is None or options.kernel not in ("auto", "fused") or (options.kernel == "auto" and not config.gluon):
        return None
    masks = (options.window, options.begins, options.lengths, options.softcap)
    is_plain = options.causal and q.shape[2] == k.shape[2] and all(mask is None for mask in masks)
    # A program indexes the dQ sums of all heads of its group with an int32.
    counted = (q.shape[1] // k.shape[1] + 1) * (q.shape[2] + config.block_m) * block_k
    serves = is_plain and counted < 2**31 and q.element_size() == 2 and _serves(block_k, tensors, None)
    return config if serves else None


def rows_at_once(x: Tensor, heads: float, num_rows: int) -> int:
    """Return how many of `num_rows` rows to process at a time so that the tensors they load fit in half of the L2 cache.

    A row loads `heads` heads of x (B, H, S, K) and of a second tensor of its size. `heads` is below 1 where several rows share
    a head.
    """
    bytes_of_row = 2 * heads * x.shape[2] * x.shape[3] * x.element_size()
    return min(max(1, int(l2_bytes(x.device) / 2 / max(bytes_of_row, 1))), num_rows)
