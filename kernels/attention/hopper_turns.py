"""The order of `hopper_backward`: its programs, their tiles of queries, and how programs add to the sums of dQ in turn.

The sums are float32 in a workspace, whose elements stand as the threads hold them. So that equal inputs give equal bits,
programs add to them in turn, the last keys first; a turn is for as many queries as a program has keys. A counter for each says
whose turn it is. One warp reads it before a turn and another advances it after, so that no group that multiplies waits for
memory. The first in turn stores, and nothing needs to be zero before. Nobody waits for a program that begins later: those of
the last keys begin first, and a GPU begins programs in order.
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
    # Rows are batch, key-value head and part, and the query heads of a part follow one another.
    return tile * BLOCK_N, row * group_size, (kv_head * num_parts + row % num_parts) * group_size, kv_head, batch


@gluon.jit
def num_tiles_of(first, sizes, BLOCK_M: tl.constexpr):
    """Return how many tiles of queries of a head see the keys from `first` on."""
    return gl.cdiv(sizes[4] - first, BLOCK_M)


@gluon.jit
def tile_at(i, first, num_tiles, BLOCK_M: tl.constexpr):
    """Return the head within its part, and the first query, of the i-th tile: head by head."""
    return i // num_tiles, first + i % num_tiles * BLOCK_M


@gluon.jit
def sum_offsets(channel, query):
    """Return where an element of dQ^T stands among the sums of 64 channels of a tile: as a product of warp groups leaves it.

    A thread holds two neighbours, four threads eight, and a warp sixteen channels in two halves (PTX ISA, "Register Fragments
    for wgmma.mma_async.m64nNk16"), so that each instruction of a warp adds to 256 bytes in a row.
    """
    return query % 8 + channel % 8 * 8 + channel // 16 * 64 + channel % 16 // 8 * 256 + query // 8 * 512


@gluon.jit
def add_dq(i, dq, sums_ptr, dq_free, dq_done, is_first):
    """Add a part of dQ^T (64 channels, M) to the sums of its tile, or store it as the first of them, when it is the turn."""
    LAYOUT: tl.constexpr = dq.type.layout
    channel = gl.arange(0, dq.shape[0], gl.SliceLayout(1, LAYOUT))[:, None]
    query = gl.arange(0, dq.shape[1], gl.SliceLayout(0, LAYOUT))[None, :]
    slot, phase = stage_of(i, 2)
    mbarrier.wait(dq_free.index(slot), phase)
    if is_first:
        gl.store(sums_ptr + sum_offsets(channel, query), dq)
    else:
        gl.atomic_add(sums_ptr + sum_offsets(channel, query), dq, sem="relaxed")
    # The arrival is for all threads of the group.
    tl.debug_barrier()
    mbarrier.arrive(dq_done.index(slot))


@gluon.jit
def turns_done(counter_ptr):
    """Return how many programs have added to some sums; what they added comes before what follows."""
    return gl.inline_asm_elementwise("ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [counter_ptr], gl.int32, False, 1)


@gluon.jit
def counter_at(counters_ptr, row, m, sizes, BLOCK_N: tl.constexpr):
    """Return the counter of the turns of the sums of a row (batch and head) that hold query `m`."""
    return counters_ptr + row * gl.cdiv(sizes[4], BLOCK_N) + m // BLOCK_N


@gluon.jit
def begin_turns(counters_ptr, barriers, sizes, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Let the groups add to the sums of a tile when all programs of later keys have."""
    dq_free = barriers[4]
    BLOCK_N: tl.constexpr = 64 * GROUPS
    first, first_row, first_head, kv_head, batch = place_of(gl.program_id(0), sizes, BLOCK_N)
    num_tiles = num_tiles_of(first, sizes, BLOCK_M)
    for i in range(num_tiles * sizes[3]):
        head, m = tile_at(i, first, num_tiles, BLOCK_M)
        slot, phase = stage_of(i, 2)
        # A barrier is arrived at again only when its phase before has ended.
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
    """Count a turn when all groups have added to all of its sums."""
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
            # So the groups are at most two tiles ahead of this warp, and end no phase of `dq_done` twice before it looks.
            mbarrier.arrive(dq_free.index(slot))
