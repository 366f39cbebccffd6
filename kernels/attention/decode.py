"""The forward pass for few queries and many keys: split the keys over programs, then combine the partial results.

With one query a head, a GPU is mostly idle if one program owns all keys of a head. Here each program owns a part of the keys
of a key-value head, for all query heads that share it ("Flash-Decoding", Dao, Haziza, Massa & Sizov 2023). The kernel is
memory-bound and reads keys and values once.
"""

import torch
from torch import Tensor

from .. import shared
from ..device import num_sms
from ..dispatch import jit, tl
from ..launch import launch
from .configurations import launch_config
from .forward import add_tile
from .intervals import keys_of, mask_of
from .isolated import ROWS, has_nan, isolated_output, later_zero
from .operands import aligned, load_strides
from .options import Options
from .scores import lse_in_bits
from .tiles import SIZES, load_base, load_tile, stride_unit

# Minimum number of keys a split: with fewer, combining costs more than splitting saves.
MIN_KEYS = 256
# Enough loads in flight to saturate the memory: a program of 4 warps prefetches two tiles of keys and two of values.
PROGRAMS_PER_SM = 3
# Number of splits that one loop iteration combines.
BLOCK_SPLITS = 16


@jit
def group_rows(rows, kv_head, group_size, num_queries):
    """Return (head, query, present) for rows of a program, which owns all queries of all query heads of a key-value head."""
    return kv_head * group_size + rows // num_queries, rows % num_queries, rows < group_size * num_queries


@jit
def rows_offset(head, query, head_stride, token_stride):
    """Return the offset of rows within a sequence, in units of the strides."""
    return tl.cast(head, tl.int64) * head_stride + query * token_stride


@jit
def store_group(rows, tile, present, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr):
    """Store each row of a tile (M, V) at its pointer in `rows`."""
    columns = tl.arange(0, BLOCK_V)
    mask = present[:, None] & (columns < VALUE_DIM)[None, :]
    tl.store(rows[:, None] + columns[None, :], tile.to(rows.dtype.element_ty), mask=mask)


@jit
def split_of(program, num_splits, num_kv_heads):
    """Return (split, batch, kv_head) of a program."""
    row = program // num_splits
    return program % num_splits, row // num_kv_heads, row % num_kv_heads


@jit
def keys_of_split(
    split, num_splits, mask, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Return the (start, end) of one split of the keys that the queries of a sequence see."""
    first_low, _ = keys_of(0, mask, CAUSAL, WINDOW, DOCUMENTS)
    _, last_high = keys_of(mask[0] - 1, mask, CAUSAL, WINDOW, DOCUMENTS)
    tiles = tl.cdiv(tl.cdiv(tl.maximum(last_high - first_low, 0), BLOCK_N), num_splits)
    start = first_low + split * tiles * BLOCK_N
    return start, tl.minimum(start + tiles * BLOCK_N, last_high)


@jit
def store_isolated_group(
    again, split, batch, kv_head, q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, begins_ptr, ends_ptr, lengths_ptr,
    q_batch_stride, q_head_stride, q_token_stride, k_batch_stride, k_head_stride, k_token_stride,
    v_batch_stride, v_head_stride, v_token_stride, o_batch_stride, o_head_stride, o_token_stride, document_stride,
    num_heads, group_size, num_queries, num_keys, window_left, window_right, num_splits,
    scale: tl.constexpr, softcap: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr,
    LENGTHS: tl.constexpr, SPLIT: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Recompute and overwrite the output of a program (see `isolated.py`). `again` is 1, but must be opaque to the compiler."""
    mask = mask_of(
        batch, num_queries, num_keys, window_left, window_right, begins_ptr, ends_ptr, document_stride, lengths_ptr, LENGTHS
    )
    start, end = keys_of_split(split, num_splits, mask, CAUSAL, WINDOW, DOCUMENTS, BLOCK_N)
    q_base = q_ptr + tl.cast(batch, tl.int64) * q_batch_stride * stride_unit(q_ptr)
    k_base = load_base(k_ptr, batch, kv_head, k_batch_stride, k_head_stride, False)
    v_base = load_base(v_ptr, batch, kv_head, v_batch_stride, v_head_stride, False)
    # Other threads wrote the output that is overwritten here.
    tl.debug_barrier()
    for m in tl.range(0, BLOCK_M, ROWS, num_stages=1):  # pyright: ignore[reportGeneralTypeIssues]
        head, query, present = group_rows(m + tl.arange(0, ROWS), kv_head, group_size, num_queries)
        low, high = keys_of(query, mask, CAUSAL, WINDOW, DOCUMENTS)
        q = q_base + rows_offset(head, query, q_head_stride, q_token_stride) * stride_unit(q_ptr)
        part = ((tl.cast(batch, tl.int64) * num_heads + head) * num_queries + query) * num_splits + split
        lse = tl.load(lse_ptr + part, mask=present, other=float("inf"))
        o = isolated_output(
            q, present, lse_in_bits(lse), low, high, k_base, v_base, k_token_stride, v_token_stride,
            start, end, end, HEAD_DIM * again, scale, softcap, PRECISION, VALUE_DIM, BLOCK_V,
        )  # fmt: skip
        if SPLIT:
            offsets = part * VALUE_DIM
        else:
            offsets = tl.cast(batch, tl.int64) * o_batch_stride + rows_offset(head, query, o_head_stride, o_token_stride)
        store_group(o_ptr + offsets, o, present, VALUE_DIM, BLOCK_V)


@jit(do_not_specialize=SIZES)
def attention_decode(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, sinks_ptr, begins_ptr, ends_ptr, lengths_ptr,
    q_batch_stride, q_head_stride, q_token_stride, k_batch_stride, k_head_stride, k_token_stride,
    v_batch_stride, v_head_stride, v_token_stride, o_batch_stride, o_head_stride, o_token_stride, document_stride,
    num_heads, group_size, num_queries, num_keys, window_left, window_right, num_splits,
    scale: tl.constexpr, softcap: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr,
    LENGTHS: tl.constexpr, SINKS: tl.constexpr, SPLIT: tl.constexpr, ONE_QUERY: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write o and lse of all query heads of one key-value head.

    If SPLIT, cover one split of the keys and ignore sinks; o is (B, H, T, splits, V) float32 and lse (B, H, T, splits), both
    contiguous.
    """
    split, batch, kv_head = split_of(tl.program_id(0), num_splits, num_heads // group_size)
    mask = mask_of(
        batch, num_queries, num_keys, window_left, window_right, begins_ptr, ends_ptr, document_stride, lengths_ptr, LENGTHS
    )

    head, query, present = group_rows(tl.arange(0, BLOCK_M), kv_head, group_size, num_queries)
    low, high = keys_of(query, mask, CAUSAL, WINDOW, DOCUMENTS)
    start, end = keys_of_split(split, num_splits, mask, CAUSAL, WINDOW, DOCUMENTS, BLOCK_N)

    q_base = q_ptr + tl.cast(batch, tl.int64) * q_batch_stride * stride_unit(q_ptr)
    q_rows = q_base + rows_offset(head, query, q_head_stride, q_token_stride) * stride_unit(q_ptr)
    columns = tl.arange(0, BLOCK_K)[None, :]
    q = tl.load(q_rows[:, None] + columns, mask=present[:, None] & (columns < HEAD_DIM), other=0.0)
    k_base = load_base(k_ptr, batch, kv_head, k_batch_stride, k_head_stride, False)
    v_base = load_base(v_ptr, batch, kv_head, v_batch_stride, v_head_stride, False)
    accumulator = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    if SINKS and not SPLIT:
        row_sum = tl.full((BLOCK_M,), 1.0, tl.float32)
        row_max = tl.load(sinks_ptr + head, mask=present, other=0.0).to(tl.float32) * shared.LOG2_E
    else:
        row_sum = tl.zeros((BLOCK_M,), tl.float32)
        row_max = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    for n in range(start, end, BLOCK_N):
        k = load_tile(k_base, batch, kv_head, n, end, k_token_stride, HEAD_DIM, BLOCK_N, BLOCK_K, False, True)
        v = load_tile(v_base, batch, kv_head, n, end, v_token_stride, VALUE_DIM, BLOCK_N, BLOCK_V, False, True)
        accumulator, row_sum, row_max = add_tile(
            q, k, v, accumulator, row_sum, row_max, n, low, high, scale, softcap, PRECISION, True
        )
    # With one query, all rows see the same keys and the program loads only those, so no mask can be violated.
    again = 0 if ONE_QUERY else has_nan(accumulator)
    zero = later_zero(again)
    split, batch, kv_head = split_of(tl.program_id(0) | zero, num_splits, num_heads // group_size)
    head, query, present = group_rows(tl.arange(0, BLOCK_M) | zero, kv_head, group_size, num_queries)
    accumulator = accumulator * (1.0 / tl.where(row_sum == 0.0, 1.0, row_sum))[:, None]
    part = ((tl.cast(batch, tl.int64) * num_heads + head) * num_queries + query) * num_splits + split
    if SPLIT:
        offsets = part * VALUE_DIM
    else:
        offsets = tl.cast(batch, tl.int64) * o_batch_stride + rows_offset(head, query, o_head_stride, o_token_stride)
    store_group(o_ptr + offsets, accumulator, present, VALUE_DIM, BLOCK_V)
    tl.store(lse_ptr + part, (row_max + tl.log2(row_sum)) * shared.LN_2, mask=present)
    if not ONE_QUERY:  # noqa: SIM102 - a constant condition, which the compiler removes
        if again > 0:
            store_isolated_group(
                again, split, batch, kv_head, q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, begins_ptr, ends_ptr, lengths_ptr,
                q_batch_stride, q_head_stride, q_token_stride, k_batch_stride, k_head_stride, k_token_stride,
                v_batch_stride, v_head_stride, v_token_stride, o_batch_stride, o_head_stride, o_token_stride, document_stride,
                num_heads, group_size, num_queries, num_keys, window_left, window_right, num_splits,
                scale, softcap, CAUSAL, WINDOW, DOCUMENTS, LENGTHS, SPLIT, HEAD_DIM, VALUE_DIM, PRECISION,
                BLOCK_M, BLOCK_N, BLOCK_V,
            )  # fmt: skip


@jit(do_not_specialize=SIZES)
def attention_combine(
    part_ptr, part_lse_ptr, o_ptr, lse_ptr, sinks_ptr, o_batch_stride, o_head_stride, o_token_stride,
    num_heads, num_queries, num_splits,
    SINKS: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_SPLITS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Combine the splits of one query of one head into o and lse, BLOCK_SPLITS at a time."""
    row = tl.cast(tl.program_id(0), tl.int64)
    query = row % num_queries
    head = row // num_queries % num_heads
    batch = row // num_queries // num_heads
    columns = tl.arange(0, BLOCK_V)
    if SINKS:
        row_max = tl.load(sinks_ptr + head).to(tl.float32) * shared.LOG2_E
        row_sum = tl.cast(1.0, tl.float32)
    else:
        row_max = tl.cast(-float("inf"), tl.float32)
        row_sum = tl.cast(0.0, tl.float32)
    accumulator = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, num_splits, BLOCK_SPLITS):
        splits = start + tl.arange(0, BLOCK_SPLITS)
        present = splits < num_splits
        lses = tl.load(part_lse_ptr + row * num_splits + splits, mask=present, other=-float("inf")) * shared.LOG2_E
        parts = tl.load(
            part_ptr + (row * num_splits + splits)[:, None] * VALUE_DIM + columns[None, :],
            mask=present[:, None] & (columns < VALUE_DIM)[None, :], other=0.0,
        )  # fmt: skip
        new_max = tl.maximum(row_max, tl.max(lses, 0))
        reference = tl.where(new_max == -float("inf"), 0.0, new_max)
        weights = tl.exp2(lses - reference)
        rescale = tl.exp2(row_max - reference)
        row_sum = row_sum * rescale + tl.sum(weights, 0)
        accumulator = accumulator * rescale + tl.sum(parts * weights[:, None], 0)
        row_max = new_max
    o = accumulator / tl.where(row_sum == 0.0, 1.0, row_sum)
    o_row = o_ptr + batch * o_batch_stride + head * o_head_stride + query * o_token_stride
    tl.store(o_row + columns, o.to(o_ptr.dtype.element_ty), mask=columns < VALUE_DIM)
    tl.store(lse_ptr + row, (row_max + tl.log2(row_sum)) * shared.LN_2)


def fits_decode(q: Tensor, k: Tensor, options: Options) -> bool:
    """Whether to split the keys: one program can hold all queries of a key-value head, and there are more keys than queries."""
    rows = q.shape[1] // k.shape[1] * q.shape[2]
    return q.shape[2] < k.shape[2] and rows <= launch_config("decode", (q,), options).block_m


def splits_of(num_rows: int, num_keys: int, device: torch.device) -> int:
    """Return the number of programs over which to split the keys of each of `num_rows` key-value heads."""
    wanted = -(-PROGRAMS_PER_SM * num_sms(device) // num_rows)
    return max(1, min(wanted, num_keys // MIN_KEYS))


def launch_decode(q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, sinks: Tensor | None, options: Options) -> None:
    """Fill o and lse as `launch_forward` does; requires `fits_decode`."""
    batch, num_heads, num_queries, _ = q.shape
    num_kv_heads, num_keys = k.shape[1:3]
    group_size = num_heads // num_kv_heads
    q, k, v = map(aligned, (q, k, v))
    config = launch_config("decode", (q, k, v), options)
    left, right = options.window_of(num_queries, num_keys)
    visible = num_keys if options.window is None else min(num_keys, left + (0 if options.causal else right) + num_queries)
    num_splits = splits_of(batch * num_kv_heads, visible, q.device)
    # A single split writes o and lse directly. Several splits write float32 buffers, which `attention_combine` reduces.
    part, part_lse = o, lse
    if num_splits > 1:
        part = torch.empty(*o.shape[:3], num_splits, o.shape[3], dtype=torch.float32, device=q.device)
        part_lse = torch.empty(part.shape[:-1], dtype=torch.float32, device=q.device)
    blocks = {**config.blocks(q, v), "BLOCK_M": max(16, 1 << (group_size * num_queries - 1).bit_length())}
    of_sinks = q if sinks is None else sinks
    launch(
        attention_decode, batch * num_kv_heads * num_splits,
        q, k, v, part, part_lse, of_sinks, *options.mask_tensors(q),
        *load_strides(q), *load_strides(k), *load_strides(v), *o.stride()[:3], options.document_stride,
        num_heads, group_size, num_queries, num_keys, left, right, num_splits,
        **options.constants(), SINKS=sinks is not None, SPLIT=num_splits > 1, ONE_QUERY=num_queries == 1, **blocks,
    )  # fmt: skip
    if num_splits > 1:
        launch(
            attention_combine, batch * num_heads * num_queries,
            part, part_lse, o, lse, of_sinks, *o.stride()[:3], num_heads, num_queries, num_splits,
            SINKS=sinks is not None, VALUE_DIM=o.shape[3], BLOCK_SPLITS=BLOCK_SPLITS, BLOCK_V=blocks["BLOCK_V"], num_warps=4,
        )  # fmt: skip
