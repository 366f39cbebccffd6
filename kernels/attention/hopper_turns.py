"""The order of `hopper_backward`: its programs, their tiles of queries, and the turns in which programs add to dQ.

The sums of dQ are a float32 workspace in the register layout of the threads. Programs add to them in a fixed order, last keys
first, so that equal inputs give equal bits. A turn covers a block of as many queries as a program has keys. One counter per
block counts the programs that have added to it. One warp polls the counter before a turn and another increments it afterwards,
so that the groups that multiply never wait for memory. The first program stores its part, so the sums need no zeroing. There is
no deadlock: a program waits only for programs of later keys, which start first because a GPU starts programs in order.
"""

from ..dispatch import tl
from .gluon import gl, gluon, mbarrier
from .hopper_tiles import stage_of
from .tiles import program_of


@gluon.jit
def place_of(program, sizes, BLOCK_N: tl.constexpr):
    """Return the (first key, row of the first query head, first query head, kv_head, batch) of a program."""
    num_rows, num_kv_heads, num_parts, group_size, num_tokens, rows_at_once = sizes
    tile, row = program_of(program, gl.cdiv(num_tokens, BLOCK_N), num_rows, rows_at_once, True)
    kv_head = row // num_parts % num_kv_heads
    batch = row // num_parts // num_kv_heads
    # A row is (batch, key-value head, part); the query heads of a part are contiguous.
    return tile * BLOCK_N, row * group_size, (kv_head * num_parts + row % num_parts) * group_size, kv_head, batch


@gluon.jit
def num_tiles_of(first, sizes, BLOCK_M: tl.constexpr):
    """Return the number of tiles of queries of a head that see the keys from `first` on."""
    return gl.cdiv(sizes[4] - first, BLOCK_M)


@gluon.jit
def tile_at(i, first, num_tiles, BLOCK_M: tl.constexpr):
    """Return the head within its part and the first query of the i-th tile, in order of heads."""
    return i // num_tiles, first + i % num_tiles * BLOCK_M


@gluon.jit
def sum_offsets(channel, query):
    """Return the offset of an element of dQ^T among the sums of 64 channels of a tile, in the layout of a wgmma accumulator.

    A thread holds two adjacent queries, four threads hold eight, and a warp holds sixteen channels in two halves (PTX ISA,
    "Register Fragments for wgmma.mma_async.m64nNk16"). Each instruction of a warp therefore adds to 256 contiguous bytes.
    """
    return query % 8 + channel % 8 * 8 + channel // 16 * 64 + channel % 16 // 8 * 256 + query // 8 * 512


@gluon.jit
def add_dq(i, dq, sums_ptr, dq_free, dq_done, is_first):
    """Wait for the turn, then add a part of dQ^T (64 channels, M) to the sums of its tile; the first program stores it."""
    LAYOUT: tl.constexpr = dq.type.layout
    channel = gl.arange(0, dq.shape[0], gl.SliceLayout(1, LAYOUT))[:, None]
    query = gl.arange(0, dq.shape[1], gl.SliceLayout(0, LAYOUT))[None, :]
    slot, phase = stage_of(i, 2)
    mbarrier.wait(dq_free.index(slot), phase)
    if is_first:
        gl.store(sums_ptr + sum_offsets(channel, query), dq)
    else:
        gl.atomic_add(sums_ptr + sum_offsets(channel, query), dq, sem="relaxed")
    # One arrival signals that all threads of the group are done.
    tl.debug_barrier()
    mbarrier.arrive(dq_done.index(slot))


@gluon.jit
def turns_done(counter_ptr):
    """Return how many programs have added to the sums, with acquire semantics: their additions are visible afterwards."""
    return gl.inline_asm_elementwise("ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [counter_ptr], gl.int32, False, 1)


@gluon.jit
def counter_at(counters_ptr, row, m, sizes, BLOCK_N: tl.constexpr):
    """Return the turn counter for query `m` of a row (batch and head)."""
    return counters_ptr + row * gl.cdiv(sizes[4], BLOCK_N) + m // BLOCK_N


@gluon.jit
def begin_turns(counters_ptr, barriers, sizes, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Release the groups to add to a tile's sums after all programs of later keys have added theirs."""
    dq_free = barriers[4]
    BLOCK_N: tl.constexpr = 64 * GROUPS
    first, first_row, first_head, kv_head, batch = place_of(gl.program_id(0), sizes, BLOCK_N)
    num_tiles = num_tiles_of(first, sizes, BLOCK_M)
    for i in range(num_tiles * sizes[3]):
        head, m = tile_at(i, first, num_tiles, BLOCK_M)
        slot, phase = stage_of(i, 2)
        # Arrive at a barrier again only after its previous phase has ended.
        if i >= 2:
            mbarrier.wait(dq_free.index(slot), phase ^ 1)
        if m % BLOCK_N == 0:
            counter = counter_at(counters_ptr, first_row + head, m, sizes, BLOCK_N)
            done = turns_done(counter)
            while done != (m - first) // BLOCK_N:
                done = turns_done(counter)
        mbarrier.arrive(dq_free.index(slot))


@gluon.jit
def end_turns(counters_ptr, barriers, sizes, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Increment the counter of a turn after all groups have added to all of its sums."""
    dq_free, dq_done = barriers[4], barriers[5]
    BLOCK_N: tl.constexpr = 64 * GROUPS
    first, first_row, first_head, kv_head, batch = place_of(gl.program_id(0), sizes, BLOCK_N)
    num_tiles = num_tiles_of(first, sizes, BLOCK_M)
    steps = num_tiles * sizes[3]
    for i in range(steps + 2):
        slot, phase = stage_of(i, 2)
        if i >= 2:
            mbarrier.wait(dq_done.index(slot), phase ^ 1)
            head, m = tile_at(i - 2, first, num_tiles, BLOCK_M)
            if (m % BLOCK_N + BLOCK_M == BLOCK_N) | (m + BLOCK_M >= sizes[4]):
                gl.atomic_add(counter_at(counters_ptr, first_row + head, m, sizes, BLOCK_N), 1, sem="release")
        if i < steps:
            # Keeps the groups at most two tiles ahead, so that this warp observes every phase of `dq_done`.
            mbarrier.arrive(dq_free.index(slot))
