"""Shared code of RMSNorm and LayerNorm: the row computations of a program, launch configurations and checks.

RMSNorm is LayerNorm without a mean. The kernels of both call one function per direction, with None for an argument that
an op lacks; Triton compiles it away. Registers hold a row as PARTS blocks of BLOCK_WIDTH columns, so that widths such as
5,120 = 5 * 1024 leave no lane idle. A row that is too wide for registers has PARTS = 0 and is read twice.
"""

# Type checkers do not understand loops that Triton unrolls, nor the tuples that grow in them.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

from functools import cache

import torch
from torch import Tensor

from .checks import FLOATING, check_device, check_dtype, check_number
from .dispatch import jit, tl

# Not specialized: it changes from call to call, and its divisibility does not affect the width of loads.
SIZES = ("num_rows",)


@jit
def _load(ptr, rows, row_stride, columns, mask):
    return tl.load(ptr + rows * row_stride + columns, mask=mask, other=0.0).to(tl.float32)


@jit
def _store(ptr, rows, row_stride, columns, values, mask):
    tl.store(ptr + rows * row_stride + columns, values.to(ptr.dtype.element_ty), mask=mask)


@jit
def _columns(part, BLOCK_WIDTH: tl.constexpr):
    return part * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)[None, :]


@jit
def _load_row(ptr, rows, row_stride, row_mask, width, BLOCK_WIDTH: tl.constexpr, PARTS: tl.constexpr):
    # Issue all loads before their first use, so that they are in flight together.
    parts = ()
    for part in tl.static_range(PARTS):
        columns = _columns(part, BLOCK_WIDTH)
        parts += (_load(ptr, rows, row_stride, columns, row_mask & (columns < width)),)
    return parts


@jit
def _load_vector(ptr, columns, width, offset: tl.constexpr):
    return tl.load(ptr + columns, mask=columns < width, other=0.0).to(tl.float32) + offset


@jit
def _store_total(total_ptr, x, residual, rows, width, columns, mask):
    # Normalize the rounded sum, because the backward pass reads the stored one.
    total = (x + residual).to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + rows * width + columns, total, mask=mask)
    return total.to(tl.float32)


@jit
def _store_output(
    y_ptr, weight_ptr, bias_ptr, x_hat, rows, width, columns, mask, offset: tl.constexpr, ROUND_FIRST: tl.constexpr
):
    if ROUND_FIRST:
        x_hat = x_hat.to(y_ptr.dtype.element_ty).to(tl.float32)
    if weight_ptr is not None:
        x_hat *= _load_vector(weight_ptr, columns, width, offset)
    if bias_ptr is not None:
        x_hat += _load_vector(bias_ptr, columns, width, 0.0)
    _store(y_ptr, rows, width, columns, x_hat, mask)


@jit
def normalise_rows(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    total_ptr,
    mean_ptr,
    rstd_ptr,
    x_row_stride,
    residual_row_stride,
    num_rows,
    width,
    eps,
    offset: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Write the normalized rows of one tile, their sums with the residual stream, and their statistics."""
    rows = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    row_mask = rows < num_rows
    if PARTS > 0:
        x = _load_row(x_ptr, rows, x_row_stride, row_mask, width, BLOCK_WIDTH, PARTS)
        if residual_ptr is not None:
            residual = _load_row(residual_ptr, rows, residual_row_stride, row_mask, width, BLOCK_WIDTH, PARTS)
            total = ()
            for part in tl.static_range(PARTS):
                columns = _columns(part, BLOCK_WIDTH)
                mask = row_mask & (columns < width)
                total += (_store_total(total_ptr, x[part], residual[part], rows, width, columns, mask),)
            x = total
        if mean_ptr is not None:
            sums = x[0]
            for part in tl.static_range(1, PARTS):
                sums += x[part]
            mean = tl.sum(sums, axis=1)[:, None] / width
            tl.store(mean_ptr + rows, mean, mask=row_mask)
            # Use the deviations: the mean of squares minus the squared mean cancels for a large mean.
            centred = ()
            for part in tl.static_range(PARTS):
                centred += (tl.where(_columns(part, BLOCK_WIDTH) < width, x[part] - mean, 0.0),)
            x = centred
        # Begin sums with their first term, because the compiler does not remove an addition of zero.
        squares = x[0] * x[0]
        for part in tl.static_range(1, PARTS):
            squares += x[part] * x[part]
        rstd = tl.rsqrt(tl.sum(squares, axis=1)[:, None] / width + eps)
        # Stored here or at the end, whichever ptxas compiles without a spill.
        if mean_ptr is not None:
            tl.store(rstd_ptr + rows, rstd, mask=row_mask)
        for part in tl.static_range(PARTS):
            columns = _columns(part, BLOCK_WIDTH)
            mask = row_mask & (columns < width)
            _store_output(y_ptr, weight_ptr, bias_ptr, x[part] * rstd, rows, width, columns, mask, offset, ROUND_FIRST)
        if mean_ptr is None:
            tl.store(rstd_ptr + rows, rstd, mask=row_mask)
    else:
        # For a mean: count, mean and sum of squared deviations of each lane's own elements (Welford 1962).
        counts = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), tl.float32)
        means = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), tl.float32)
        squares = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), tl.float32)
        for start in range(0, width, BLOCK_WIDTH):
            columns = start + _columns(0, BLOCK_WIDTH)
            mask = row_mask & (columns < width)
            x = _load(x_ptr, rows, x_row_stride, columns, mask)
            if residual_ptr is not None:
                residual = _load(residual_ptr, rows, residual_row_stride, columns, mask)
                x = _store_total(total_ptr, x, residual, rows, width, columns, mask)
            if mean_ptr is not None:
                counts += tl.where(columns < width, 1.0, 0.0)
                deviation = tl.where(columns < width, x - means, 0.0)
                means += deviation * (1.0 / (start // BLOCK_WIDTH + 1))
                squares += deviation * tl.where(columns < width, x - means, 0.0)
            else:
                squares += x * x
        mean = tl.zeros((BLOCK_ROWS, 1), tl.float32)
        if mean_ptr is not None:
            mean = tl.sum(counts * means, axis=1)[:, None] / width
            tl.store(mean_ptr + rows, mean, mask=row_mask)
            squares += counts * (means - mean) * (means - mean)
        rstd = tl.rsqrt(tl.sum(squares, axis=1)[:, None] / width + eps)
        tl.store(rstd_ptr + rows, rstd, mask=row_mask)
        # A thread may read a total that another thread stored.
        tl.debug_barrier()
        for start in range(0, width, BLOCK_WIDTH):
            columns = start + _columns(0, BLOCK_WIDTH)
            mask = row_mask & (columns < width)
            if residual_ptr is not None:
                x = _load(total_ptr, rows, width, columns, mask)
            else:
                x = _load(x_ptr, rows, x_row_stride, columns, mask)
            if mean_ptr is not None:
                x -= mean
            _store_output(y_ptr, weight_ptr, bias_ptr, x * rstd, rows, width, columns, mask, offset, ROUND_FIRST)


@jit
def _gradient_of_normalised(dy, weight_ptr, columns, width, offset: tl.constexpr):
    if weight_ptr is not None:
        dy *= _load_vector(weight_ptr, columns, width, offset)
    return dy


@jit
def _store_gradients(dx_ptr, d_residual_ptr, dx, rows, width, columns, mask):
    if dx_ptr is not None:
        _store(dx_ptr, rows, width, columns, dx, mask)
    if d_residual_ptr is not None:
        _store(d_residual_ptr, rows, width, columns, dx, mask)


@jit
def _add_to_partial(partial_ptr, values, width, columns):
    # In the looped form the sum is too wide for registers. It is kept in memory, and only this program adds to it.
    pointers = partial_ptr + tl.program_id(0).to(tl.int64) * width + columns
    before = tl.load(pointers, mask=columns < width, other=0.0)
    tl.store(pointers, before + tl.sum(values, axis=0)[None, :], mask=columns < width)


@jit
def _store_partial(partial_ptr, sums, width, BLOCK_WIDTH: tl.constexpr, PARTS: tl.constexpr):
    for part in tl.static_range(PARTS):
        columns = _columns(part, BLOCK_WIDTH)
        pointers = partial_ptr + tl.program_id(0).to(tl.int64) * width + columns
        tl.store(pointers, tl.sum(sums[part], axis=0)[None, :], mask=columns < width)


@jit
def differentiate_rows(
    dy_ptr,
    d_total_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    d_residual_ptr,
    dw_partial_ptr,
    db_partial_ptr,
    dy_row_stride,
    d_total_row_stride,
    x_row_stride,
    num_rows,
    width,
    offset: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Write dx for the rows of this program, and their partial sums of dw and db."""
    # With xhat = (x - mean) * rstd and g = dy * weight: dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), without the means
    # of x and g for RMSNorm; dw = sum over rows of dy * xhat, db = sum over rows of dy.
    # Persistent: each program loops over many row tiles and writes one partial sum, so that the final sum is short and its
    # order fixed.
    dw = ()
    db = ()
    for _part in tl.static_range(PARTS):
        dw += (tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), tl.float32),)
        db += (tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), tl.float32),)
    for start_row in range(tl.program_id(0) * BLOCK_ROWS, num_rows, BLOCK_ROWS * tl.num_programs(0)):
        row_numbers = start_row + tl.arange(0, BLOCK_ROWS)
        rows = row_numbers.to(tl.int64)[:, None]
        row_mask = rows < num_rows
        rstd = tl.load(rstd_ptr + row_numbers, mask=row_numbers < num_rows, other=0.0)[:, None]
        mean = tl.zeros((BLOCK_ROWS, 1), tl.float32)
        if mean_ptr is not None:
            mean = tl.load(mean_ptr + row_numbers, mask=row_numbers < num_rows, other=0.0)[:, None]
        mean_g = tl.zeros((BLOCK_ROWS, 1), tl.float32)
        if PARTS > 0:
            x_hat = ()
            for part in tl.static_range(PARTS):
                columns = _columns(part, BLOCK_WIDTH)
                x = _load(x_ptr, rows, x_row_stride, columns, row_mask & (columns < width))
                x_hat += ((x - mean) * rstd,)
            dy = _load_row(dy_ptr, rows, dy_row_stride, row_mask, width, BLOCK_WIDTH, PARTS)
            g = ()
            for part in tl.static_range(PARTS):
                g += (_gradient_of_normalised(dy[part], weight_ptr, _columns(part, BLOCK_WIDTH), width, offset),)
            if d_total_ptr is not None:
                d_total = _load_row(d_total_ptr, rows, d_total_row_stride, row_mask, width, BLOCK_WIDTH, PARTS)
            new_dw = ()
            new_db = ()
            for part in tl.static_range(PARTS):
                new_dw += (dw[part] + dy[part] * x_hat[part] if dw_partial_ptr is not None else dw[part],)
                new_db += (db[part] + dy[part] if db_partial_ptr is not None else db[part],)
            dw = new_dw
            db = new_db
            # Begin sums with their first term, because the compiler does not remove an addition of zero.
            products = g[0] * x_hat[0]
            sums = g[0]
            for part in tl.static_range(1, PARTS):
                products += g[part] * x_hat[part]
                sums += g[part]
            projection = tl.sum(products, axis=1)[:, None] / width
            if mean_ptr is not None:
                mean_g = tl.sum(sums, axis=1)[:, None] / width
            for part in tl.static_range(PARTS):
                columns = _columns(part, BLOCK_WIDTH)
                dx = rstd * (g[part] - mean_g - x_hat[part] * projection)
                if d_total_ptr is not None:
                    dx += d_total[part]
                _store_gradients(dx_ptr, d_residual_ptr, dx, rows, width, columns, row_mask & (columns < width))
        else:
            products = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), tl.float32)
            sums = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), tl.float32)
            for start in range(0, width, BLOCK_WIDTH):
                columns = start + _columns(0, BLOCK_WIDTH)
                mask = row_mask & (columns < width)
                x_hat = (_load(x_ptr, rows, x_row_stride, columns, mask) - mean) * rstd
                dy = _load(dy_ptr, rows, dy_row_stride, columns, mask)
                g = _gradient_of_normalised(dy, weight_ptr, columns, width, offset)
                products += g * x_hat
                sums += g
            projection = tl.sum(products, axis=1)[:, None] / width
            if mean_ptr is not None:
                mean_g = tl.sum(sums, axis=1)[:, None] / width
            for start in range(0, width, BLOCK_WIDTH):
                columns = start + _columns(0, BLOCK_WIDTH)
                mask = row_mask & (columns < width)
                x_hat = (_load(x_ptr, rows, x_row_stride, columns, mask) - mean) * rstd
                dy = _load(dy_ptr, rows, dy_row_stride, columns, mask)
                g = _gradient_of_normalised(dy, weight_ptr, columns, width, offset)
                dx = rstd * (g - mean_g - x_hat * projection)
                if d_total_ptr is not None:
                    dx += _load(d_total_ptr, rows, d_total_row_stride, columns, mask)
                _store_gradients(dx_ptr, d_residual_ptr, dx, rows, width, columns, mask)
                if dw_partial_ptr is not None:
                    _add_to_partial(dw_partial_ptr, dy * x_hat, width, columns)
                if db_partial_ptr is not None:
                    _add_to_partial(db_partial_ptr, dy, width, columns)
    if dw_partial_ptr is not None:
        _store_partial(dw_partial_ptr, dw, width, BLOCK_WIDTH, PARTS)
    if db_partial_ptr is not None:
        _store_partial(db_partial_ptr, db, width, BLOCK_WIDTH, PARTS)


# Elements of a tile if a row is one block; narrow rows share a tile, so that every warp issues 16-byte loads.
FORWARD_TILE = 4096
BACKWARD_TILE = 2048
# Elements of one block if a row has several.
PART_TILE = 1024
# The widest row, by the bytes of its widest element, that registers hold without a spill on sm_80 to sm_100 with Triton 3.6
# and 3.7. A wider row is read twice.
FORWARD_WIDTH = {2: 32 * 1024, 4: 24 * 1024}
# The same limit for the backward pass, in bytes of all inputs; it also holds the sums for dw and db.
BACKWARD_ROW_BYTES = 96 * 1024
LOOPED = {"BLOCK_ROWS": 1, "BLOCK_WIDTH": 4096, "PARTS": 0, "num_warps": 8}
# Per multiprocessor, on all supported architectures.
REGISTERS = 65536


def _power_of_2(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _blocks(width: int, most_parts: int) -> tuple[int, int]:
    # Returns the number and the width of a row's blocks with the fewest idle lanes; a block has at least 32 columns.
    sizes = [(parts, _power_of_2(-(-width // parts))) for parts in range(1, most_parts + 1, 2)]
    return min(((p, block) for p, block in sizes if p == 1 or block >= 32), key=lambda size: (size[0] * size[1], size[0]))


@cache
def forward_config(width: int, *element_sizes: int) -> dict[str, int]:
    """Return the launch configuration for rows of `width` elements; `element_sizes` has the bytes of each input."""
    parts, block_width = _blocks(width, 7 if len(element_sizes) == 1 else 5)
    if parts * block_width > FORWARD_WIDTH[max(element_sizes)]:
        return dict(LOOPED)
    if parts == 1:
        tile = max(block_width, FORWARD_TILE)
        # A 16-byte load has 8 half-precision or 4 float32 elements: 4 loads a thread for either, and for two tensors.
        thread_elements = 32 if sum(element_sizes) <= 2 else 16
        if element_sizes == (4,) and tile == 8192:
            # With 16, ptxas spills a few bytes on sm_90 to fit one more program; with 8, all programs fit.
            thread_elements = 8
    else:
        tile, thread_elements = max(block_width, PART_TILE), 16 // min(element_sizes)
    num_warps = min(tile // (32 * thread_elements), 32)
    return {"BLOCK_ROWS": tile // block_width, "BLOCK_WIDTH": block_width, "PARTS": parts, "num_warps": num_warps}


@cache
def backward_config(width: int, *element_sizes: int, num_sums: int = 1) -> tuple[dict[str, int], int]:
    """Return the launch configuration and its programs per multiprocessor; `num_sums` is 2 for dw and db."""
    parts, block_width = _blocks(width, 5)
    row_bytes = sum(element_sizes)
    if parts == 1:
        tile = max(block_width, BACKWARD_TILE)
        # 32 elements a thread need the fewest registers in total. Registers suffice for only 16 with float32 inputs, a second
        # sum or several rows, and for only 8 with three float32 tensors in several rows.
        if tile > BACKWARD_TILE and row_bytes <= 6 and num_sums == 1:
            thread_elements = 32
        else:
            thread_elements = 8 if block_width < tile and row_bytes > 8 else 16
    else:
        tile, thread_elements = max(block_width, PART_TILE), 16 // max(element_sizes)
    num_warps = min(tile // (32 * thread_elements), 16)
    # The maximum of a thread on any architecture, which depends on its sums.
    sums = parts * tile // (32 * num_warps) * num_sums
    registers = 128 if sums <= 32 else 168 if sums <= 40 else 256
    programs = REGISTERS // (32 * num_warps * registers)
    if programs == 0 or parts * block_width * row_bytes > BACKWARD_ROW_BYTES:
        # A second sum halves the block, and so the registers; twice as many programs keep the same bytes in flight.
        return {**LOOPED, "BLOCK_WIDTH": LOOPED["BLOCK_WIDTH"] // num_sums}, 2 * num_sums
    config = {"BLOCK_ROWS": tile // block_width, "BLOCK_WIDTH": block_width, "PARTS": parts, "num_warps": num_warps}
    return config, programs


def empty_gradient(like: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Allocate a gradient; an empty tensor if `dtype` is None, because nothing needs it."""
    return torch.empty(0 if dtype is None else like.shape, dtype=dtype, device=like.device)


def check_norm(x: Tensor, eps: float, residual: Tensor | None = None, **vectors: Tensor | None) -> None:
    """Raise unless x is (..., D), residual has its shape, and vectors are (D), all floating point and on one device."""
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}: expected (..., D) with D of 1 or more")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}: expected {tuple(x.shape)}, the shape of x")
    for name, vector in vectors.items():
        if vector is not None and vector.shape != x.shape[-1:]:
            raise ValueError(f"{name} has shape {tuple(vector.shape)}: expected {tuple(x.shape[-1:])}, the last dimension of x")
    check_number("eps", eps, 0)
    check_dtype(FLOATING, x=x, residual=residual, **vectors)
    check_device(x=x, residual=residual, **vectors)


def result_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of x, or float32 under autocast, as PyTorch's norms do."""
    # `torch.rms_norm` gives float32 under CUDA autocast since PyTorch 2.13; ours does on 2.11 too, without a copy of x.
    return torch.float32 if x.is_cuda and torch.is_autocast_enabled("cuda") else x.dtype


# Widths to compile: a head, GPT-2 small and XL, Llama 3 8B and 405B, 5 * 1024, both sides of each configuration change.
COMPILED_WIDTHS = (64, 768, 1600, 2048, 4096, 5120, 8192, 16384, 32768, 65536)
