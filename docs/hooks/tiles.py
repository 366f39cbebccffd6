"""Draw tiles as SVG: of attention's masks with the kernels' interval functions, of other ops from their launches."""

from dataclasses import dataclass
from itertools import accumulate
from types import FunctionType, SimpleNamespace

import numpy as np
import ops
import svg
import torch

from tilewright.kernels import documents
from tilewright.kernels.attention import intervals
from tilewright.kernels.attention.packing import cross_intervals
from tilewright.kernels.op import ALL

BLOCK = 128
WIDTHS = (768, 1600, 4096, 16384)


class _Pointer:
    """A pointer to the elements of an array, as `tl.load` takes it."""

    def __init__(self, array, offsets=0):
        self.array, self.offsets = array, offsets

    def __add__(self, offsets):
        return _Pointer(self.array, self.offsets + offsets)


def _load(pointer, mask=True, other=0):
    inside = np.where(mask, pointer.offsets, 0)
    return np.where(mask, pointer.array[inside], other)


_NUMPY = SimpleNamespace(minimum=np.minimum, maximum=np.maximum, cdiv=lambda a, b: -(-a // b), load=_load, constexpr=None)


def _on_the_host(name: str) -> FunctionType:
    # The Python function behind a device function of `intervals`, with NumPy in the place of `triton.language`.
    function = getattr(intervals, name)
    code = getattr(function, "fn", function).__code__
    called = {other: _on_the_host(other) for other in code.co_names if other in vars(intervals) and other != "tl"}
    return FunctionType(code, {"tl": _NUMPY, **called}, name)


keys_of, query_tiles, key_tiles = (_on_the_host(name) for name in ("keys_of", "query_tiles", "key_tiles"))


@dataclass(frozen=True)
class Mask:
    """A mask as `attention` takes it."""

    title: str
    num_queries: int = 2048
    num_keys: int = 2048
    causal: bool = True
    window: tuple[int, int] | None = None
    """Keys before a query's own and after it."""
    document_lengths: tuple[int, ...] | None = None
    key_lengths: tuple[int, ...] | None = None
    cache_length: int | None = None

    def arguments(self) -> tuple[tuple, dict]:
        """Return the tuple `mask` and the constants of the functions of `intervals`, as seen from a query."""
        causal, window, documents_kind = self.causal, self.window, 0
        begins = ends = np.zeros(1, dtype=np.int64)
        if self.document_lengths is not None:
            cu_seqlens = torch.tensor([0, *accumulate(self.document_lengths)])
            if self.key_lengths is None:
                found, documents_kind = documents(cu_seqlens=cu_seqlens, batch=1, num_keys=self.num_keys), 1
            else:
                cu_seqlens_k = torch.tensor([0, *accumulate(self.key_lengths)])
                visible = (-1, 0) if causal else (-1, -1)
                found = cross_intervals(cu_seqlens, cu_seqlens_k, 1, self.num_queries, self.num_keys, visible)
                causal, documents_kind = False, 2
            begins, ends = (t[0].numpy().astype(np.int64) for t in found[:2])
        num_keys = self.num_keys if self.cache_length is None else self.cache_length
        left, right = window or (0, 0)
        mask = (self.num_queries, num_keys, left, right, _Pointer(begins), _Pointer(ends))
        return mask, {"CAUSAL": causal, "WINDOW": window is not None, "DOCUMENTS": documents_kind}

    def kinds(self, block_m: int = BLOCK, block_n: int = BLOCK) -> np.ndarray:
        """Return (query tiles, key tiles): 2 for a tile computed without a mask, 1 with a mask, 0 skipped."""
        mask, constants = self.arguments()
        kinds = np.zeros((-(-self.num_queries // block_m), -(-self.num_keys // block_n)), dtype=int)
        for tile in range(len(kinds)):
            found = query_tiles(tile * block_m, mask, **constants, BLOCK_M=block_m, BLOCK_N=block_n)
            start, left, full_start, full_end, masked = (int(value) for value in found)
            first, full, end = start // block_n, full_start // block_n, full_end // block_n
            kinds[tile, first : first + left] = 1
            kinds[tile, full:end] = 2
            kinds[tile, end : end + masked - left] = 1
        return kinds

    def edges(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the first key that each query sees, and the one after the last."""
        mask, constants = self.arguments()
        return keys_of(np.arange(self.num_queries), mask, **constants)


MASKS = {
    "full": Mask("Full attention: causal=False", causal=False),
    "causal": Mask("Causal attention: causal=True"),
    "window": Mask("Causal attention with window=512", window=(511, 0)),
    "sides": Mask("window=(512, 256), causal=False", causal=False, window=(512, 256)),
    "documents": Mask("Causal attention in packed documents of 700, 300 and 1,048 tokens", document_lengths=(700, 300, 1048)),
    "cache": Mask("512 queries at the end of 2,048 keys", num_queries=512),
    "lengths": Mask("512 queries, cache_lengths of 1,400 in a cache of 2,048", num_queries=512, cache_length=1400),
    "cross": Mask(
        "cu_seqlens of 300, 450, 274 queries and cu_seqlens_k of 900, 600, 548 keys",
        num_queries=1024,
        document_lengths=(300, 450, 274),
        key_lengths=(900, 600, 548),
    ),
}


def mask(name: str) -> str:
    """Return the picture of one of `MASKS`, with a caption that counts its tiles."""
    found = MASKS[name]
    kinds = found.kinds()
    full, partial = int((kinds == 2).sum()), int((kinds == 1).sum())
    caption = (
        f"{found.title}. Of {kinds.size} tiles of {BLOCK} queries and {BLOCK} keys, {full} are computed without a mask, "
        f"{partial} with one, and {kinds.size - full - partial} are skipped."
    )
    return svg.figure([svg.mask_panel(kinds, found.edges(), BLOCK, BLOCK, found.num_keys)], caption, svg.MASK_LEGEND)


def _attention() -> str:
    op = ALL["attention"]
    by_name = {launch.kernel.__name__: launch.constants for launch in ops.recorded(op, op.shapes[0])}
    causal = MASKS["causal"]
    panels = []
    for kernel, title in (("attention_forward", "forward and dQ"), ("attention_backward_kv", "dK and dV")):
        block_m, block_n = by_name[kernel]["BLOCK_M"], by_name[kernel]["BLOCK_N"]
        kinds = causal.kinds(block_m, block_n)
        program = ("row", len(kinds) * 5 // 8) if kernel == "attention_forward" else ("column", kinds.shape[1] * 3 // 8)
        panels.append(svg.mask_panel(kinds, causal.edges(), block_m, block_n, causal.num_keys, title, program))
    caption = (
        "Tiles of one head, 2,048 tokens, causal, head dim 64, bfloat16, H100. The outlined band is the work of one program: "
        "forward and for dQ it keeps a tile of queries and loops over tiles of keys; for dK and dV it keeps a tile of keys and "
        "loops over tiles of queries."
    )
    return svg.figure(panels, caption, svg.MASK_LEGEND)


def _constants(name: str, sizes: dict, kernel: int = 0) -> dict:
    return dict(ops.recorded(ALL[name], sizes)[kernel].constants)


def _rows(name: str) -> str:
    # RMSNorm and LayerNorm: a program takes whole rows, in PARTS blocks, or in a loop over blocks where PARTS is 0.
    op, panels = ALL[name], []
    for sizes in sorted((sizes for sizes in op.shapes if sizes["width"] in WIDTHS), key=lambda sizes: sizes["width"]):
        width = sizes["width"]
        found = _constants(name, sizes)
        loop = found["PARTS"] == 0
        panels.append(
            svg.grid_panel(
                f"width {width:,}: {found['BLOCK_ROWS']} x {found['BLOCK_WIDTH']:,}" + (", in a loop" if loop else ""),
                sizes["rows"], width, found["BLOCK_ROWS"], found["BLOCK_WIDTH"], whole_rows=True,
            )
        )  # fmt: skip
    caption = "Forward pass in bfloat16. The first program computes the filled blocks; hatched columns are masked."
    return svg.figure(panels, caption)


def _gated(name: str) -> str:
    op, panels = ALL[name], []
    for sizes in op.shapes[:2]:
        found = _constants(name, sizes)
        title = f"width {sizes['width']:,}: {found['BLOCK_ROWS']} x {found['BLOCK_WIDTH']:,}"
        panels.append(svg.grid_panel(title, sizes["rows"], sizes["width"], found["BLOCK_ROWS"], found["BLOCK_WIDTH"]))
    return svg.figure(panels, "Forward and backward pass in bfloat16. The first program computes the filled block.")


def _cross_entropy() -> str:
    op = ALL["cross_entropy"]
    sizes = op.shapes[0]
    panels = []
    for kernel, title, whole in (
        (0, "forward: a loop over a row", True),
        (1, "backward: one block", False),
    ):
        block = _constants("cross_entropy", sizes, kernel)["BLOCK"]
        panels.append(svg.grid_panel(title, sizes["rows"], sizes["vocab_size"], 1, block, "logits", whole_rows=whole))
    return svg.figure(panels, "Logits in bfloat16. The first program computes the filled blocks; hatched columns are masked.")


def _linear_cross_entropy() -> str:
    op = ALL["linear_cross_entropy"]
    sizes = op.shapes[0]
    first = ops.recorded(op, sizes)[0]
    panel = svg.grid_panel(
        f"chunks of {first.num_programs:,} rows", sizes["rows"], sizes["vocab_size"], first.num_programs,
        sizes["vocab_size"], "logits",
    )  # fmt: skip
    size = first.num_programs * sizes["vocab_size"] * 2 / 2**20
    caption = f"Only the filled chunk of logits is in memory at a time, {size:,.0f} MiB; each chunk reuses the buffer."
    return svg.figure([panel], caption)


def _rope(name: str) -> str:
    op, panels = ALL[name], []
    sizes = op.shapes[0]
    found = _constants(name, sizes)
    tensors = {"q": sizes["num_heads"], "k": sizes["num_kv_heads"], "v": sizes["num_kv_heads"] if name == "rope_qkv" else 0}
    for tensor, heads in tensors.items():
        if heads:
            blocks = found["BLOCK_TOKENS"], found["BLOCK_HEADS"]
            title = f"{tensor}: {blocks[0]} tokens x {blocks[1]} heads"
            panels.append(svg.grid_panel(title, sizes["num_tokens"], heads, *blocks, "heads", "tokens"))
    caption = (
        f"{name} in bfloat16, head dim {sizes['head_dim']}: a block has all channels of its heads. The first program of each "
        "tensor computes the filled block; hatched heads are masked."
    )
    return svg.figure(panels, caption)


def _fp8_linear() -> str:
    op = ALL["fp8_linear"]
    sizes = op.shapes[0]
    found = next(dict(x.constants) for x in ops.recorded(op, sizes) if x.kernel.__name__ == "fp8_linear_cast")
    title = f"cast of x: {found['BLOCK_ROWS']} x {found['BLOCK_COLUMNS']}"
    panel = svg.grid_panel(title, sizes["rows"], sizes["d_in"], found["BLOCK_ROWS"], found["BLOCK_COLUMNS"], "d_in")
    return svg.figure([panel], "The first program computes the filled block; it writes x in 8 bits and its transpose.")


def tiles(name: str) -> str:
    """Return the picture of the tiles of an op."""
    if name == "attention":
        return _attention()
    if name in ("rms_norm", "add_rms_norm", "layer_norm"):
        return _rows(name)
    if name in ("swiglu", "geglu"):
        return _gated(name)
    if name.startswith("rope"):
        return _rope(name)
    return {"cross_entropy": _cross_entropy, "linear_cross_entropy": _linear_cross_entropy, "fp8_linear": _fp8_linear}[name]()
