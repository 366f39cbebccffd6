"""A linear layer in chunks of rows: the logits of one chunk at a time, and the gradients of the layer."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

# Chunks have a multiple of TILE_ROWS rows, the tile of the matrix product. Rows of the buffer are padded to cache lines.
TILE_ROWS = 128
ROW_ALIGNMENT = 64


def chunk_shape(num_rows: int, vocabulary: int, itemsize: int, memory_budget: int) -> tuple[int, int]:
    """Return the shape of the logits buffer: at most `memory_budget` bytes, but at least one row."""
    columns = -(-vocabulary // ROW_ALIGNMENT) * ROW_ALIGNMENT
    limit = max(1, memory_budget // (columns * itemsize))
    if limit > TILE_ROWS:
        limit = limit // TILE_ROWS * TILE_ROWS
    num_chunks = max(1, -(-num_rows // limit))
    rows = -(-num_rows // num_chunks)  # equal chunks, because a short last one would leave the GPU idle
    if num_chunks > 1:
        rows = min(limit, -(-rows // TILE_ROWS) * TILE_ROWS)
    return rows, columns


@cache
def _adds_to_float32(device: torch.device) -> bool:
    # Whether this PyTorch version can add a half-precision product to a float32 matrix; older versions reject the dtype.
    half, wide = torch.zeros(8, 8, dtype=torch.float16, device=device), torch.zeros(8, 8, device=device)
    try:
        torch.ops.aten.addmm.dtype_out(wide, half, half, torch.float32, out=wide)
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError:
        return False
    return True


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    # total (M, N) = a (M, K) b (K, N) for the first chunk, += for others; half-precision products sum in the dtype of total.
    if total.dtype != a.dtype and not a.is_cuda:
        a, b = a.to(total.dtype), b.to(total.dtype)
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=0 if first else 1, out=total)
    elif first:
        torch.ops.aten.mm.dtype_out(a, b, total.dtype, out=total)
    elif _adds_to_float32(a.device):
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    else:
        for part, a_part in zip(total.split(8192), a.split(8192), strict=True):
            part += torch.ops.aten.mm.dtype(a_part, b, total.dtype)


def over_chunks(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    process: Callable[[Tensor, slice], None],
    memory_budget: int,
    accumulate_in_float32: bool,
    num_classes: int,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Call `process(logits, rows)` for each chunk; it overwrites `logits` with a gradient, which is multiplied by weight and x.

    x (..., D), weight (V, D), bias (V) -> dx (..., D), dw (V, D), db (V), each empty if it is not `wanted`. Rows of weight from
    `num_classes` on are padding: they complete tiles of the products, and `process` does not see them.
    """
    # Products are computed in the dtype of x. The cast weight is not saved for the backward pass: it is as large as the
    # gradient, and would save only one pass over weight, little next to three products.
    rows, weight = x.reshape(-1, x.shape[-1]), weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    want_dx, want_dw, want_db = wanted
    num_rows, vocabulary = rows.shape[0], weight.shape[0]
    dx = torch.empty(x.shape if want_dx else 0, dtype=x.dtype, device=x.device)
    sum_dtype = torch.float32 if accumulate_in_float32 else x.dtype
    # Without rows, no chunk writes dw.
    allocate = torch.empty if num_rows > 0 else torch.zeros
    dw = allocate(weight.shape if want_dw else 0, dtype=sum_dtype, device=x.device)
    db = torch.zeros(vocabulary if want_db else 0, dtype=torch.float32, device=x.device)
    chunk_rows, columns = chunk_shape(num_rows, vocabulary, x.element_size(), memory_budget)
    buffer = torch.empty(chunk_rows, columns, dtype=x.dtype, device=x.device)
    # PyTorch's float16 product on CPUs multiplies the padding by 0, which keeps a NaN.
    buffer[:, vocabulary:].zero_()
    for start in range(0, num_rows, max(1, chunk_rows)):
        chunk = rows[start : start + chunk_rows]
        logits = buffer[: chunk.shape[0], :vocabulary]
        if bias is None:
            torch.mm(chunk, weight.t(), out=logits)
        else:
            torch.addmm(bias, chunk, weight.t(), out=logits)
        process(logits[:, :num_classes], slice(start, start + chunk.shape[0]))
        logits[:, num_classes:].zero_()
        if want_dx:
            torch.mm(logits, weight, out=dx.view(rows.shape)[start : start + chunk.shape[0]])
        if want_dw:
            _add_product(dw, logits.t(), chunk, first=start == 0)
        if want_db:
            db += logits.sum(dim=0, dtype=torch.float32)
    return dx, dw, db
