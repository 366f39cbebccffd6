"""A linear layer in chunks of rows: the logits of one chunk at a time, and from their gradient those of the layer."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

# Rows of a chunk come in tiles of the matrix product, and rows of the buffer begin on a cache line whatever the vocabulary.
TILE_ROWS = 128
ROW_ALIGNMENT = 64


def chunk_shape(num_rows: int, vocabulary: int, itemsize: int, memory_budget: int) -> tuple[int, int]:
    """Return the rows and columns of the buffer of logits: at most `memory_budget` bytes, but one row at least."""
    columns = -(-vocabulary // ROW_ALIGNMENT) * ROW_ALIGNMENT
    limit = max(1, memory_budget // (columns * itemsize))
    if limit > TILE_ROWS:
        limit = limit // TILE_ROWS * TILE_ROWS
    num_chunks = max(1, -(-num_rows // limit))
    rows = -(-num_rows // num_chunks)  # chunks of one size: a short last one would leave the GPU idle
    if num_chunks > 1:
        rows = min(limit, -(-rows // TILE_ROWS) * TILE_ROWS)
    return rows, columns


@cache
def _adds_to_float32(device: torch.device) -> bool:
    # Whether this PyTorch adds a product of half precision to a float32 matrix; older ones refuse the dtype of the sum.
    half, wide = torch.zeros(8, 8, dtype=torch.float16, device=device), torch.zeros(8, 8, device=device)
    try:
        torch.ops.aten.addmm.dtype_out(wide, half, half, torch.float32, out=wide)
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError:
        return False
    return True


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    # total (M, N) = a (M, K) b (K, N), or += after the first; products of half precision are summed in the dtype of total.
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
    """Call `process(logits, rows)` for each chunk, and multiply the gradient that it leaves in `logits` by weight and x.

    x (..., D), weight (V, D), bias (V) -> dx (..., D), dw (V, D), db (V), each empty where it is not `wanted`. Rows of weight
    from `num_classes` on are padding: whole tiles of the products, but no logits.
    """
    # The dtype of x is what is multiplied. A cast weight is not kept for the backward pass: it would be as large as the
    # gradient, to save one pass over weight beside three products with it.
    rows, weight = x.reshape(-1, x.shape[-1]), weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    want_dx, want_dw, want_db = wanted
    num_rows, vocabulary = rows.shape[0], weight.shape[0]
    dx = torch.empty(x.shape if want_dx else 0, dtype=x.dtype, device=x.device)
    sum_dtype = torch.float32 if accumulate_in_float32 else x.dtype
    # Without rows no chunk writes it.
    allocate = torch.empty if num_rows > 0 else torch.zeros
    dw = allocate(weight.shape if want_dw else 0, dtype=sum_dtype, device=x.device)
    db = torch.zeros(vocabulary if want_db else 0, dtype=torch.float32, device=x.device)
    chunk_rows, columns = chunk_shape(num_rows, vocabulary, x.element_size(), memory_budget)
    buffer = torch.empty(chunk_rows, columns, dtype=x.dtype, device=x.device)
    # PyTorch's float16 product on CPUs multiplies what lies between the rows by 0, which leaves a NaN a NaN.
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
