"""The emulator of Gluon kernels, on minimal kernels."""

import pytest
import torch

from tilewright.kernels.dispatch import HAS_TRITON
from tilewright.kernels.launch import Launch

if not HAS_TRITON:
    pytest.skip("Triton cannot be imported", allow_module_level=True)

from gluon_emulator import ORDERS, Deadlock, DType, emulate
from tilewright.kernels.attention.gluon import fence_async_shared, gl, gluon, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait


class Described:
    """Stand-in for a TMA descriptor in a launch."""

    def __init__(self, base, block_shape):
        self.base, self.block_shape = base, block_shape


@gluon.jit
def load(x, tile, ready, free, rows):
    for i in range(rows // 16):
        mbarrier.wait(free, i & 1 ^ 1)
        mbarrier.expect(ready, x.block_type.nbytes)
        tma.async_copy_global_to_shared(x, [i * 16, 0], ready, tile)


@gluon.jit
def total(y_ptr, tile, ready, free, rows, EARLY: gl.constexpr):
    sums = gl.zeros([16, 16], gl.float32, None)
    for i in range(rows // 16):
        mbarrier.wait(ready, i & 1)
        if EARLY:
            mbarrier.arrive(free)
        products = warpgroup_mma(tile, tile, sums, is_async=True)
        sums = warpgroup_mma_wait(0, (products,))
        if not EARLY:
            mbarrier.arrive(free)
    places = gl.arange(0, 16, None)[:, None] * 16 + gl.arange(0, 16, None)[None, :]
    gl.store(y_ptr + places, sums)


@gluon.jit
def sum_of_squares(x, y_ptr, rows, EARLY: gl.constexpr):
    tile = gl.allocate_shared_memory(x.dtype, [16, 16], None)
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    mbarrier.init(free, count=1)
    gl.warp_specialize([(total, (y_ptr, tile, ready, free, rows, EARLY)), (load, (x, tile, ready, free, rows))], [1], [24])


def squares(order, early, rows=64):
    torch.manual_seed(0)
    x, y = torch.randn(64, 16).bfloat16(), torch.full((16, 16), torch.nan)
    emulate(Launch(sum_of_squares, 1, (Described(x, [16, 16]), y, rows), {"EARLY": early}), order)
    return y, sum(tile.float() @ tile.float() for tile in x[:rows].split(16))


@pytest.mark.parametrize("order", ORDERS)
def test_products_of_tiles_in_a_ring_of_one_buffer(order):
    found, expected = squares(order, early=False)
    torch.testing.assert_close(found, expected)


def test_a_buffer_freed_early_gives_wrong_numbers_in_some_order():
    wrong = [not torch.allclose(*squares(order, early=True)) for order in ORDERS]
    assert any(wrong)


@gluon.jit
def wait_twice(ready):
    mbarrier.wait(ready, 0)


@gluon.jit
def wait_without_arrival(y_ptr):
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    gl.warp_specialize([(wait_twice, (ready,)), (wait_twice, (ready,))], [1], [24])


def test_a_deadlock_names_the_waiting_partitions():
    with pytest.raises(Deadlock, match="wait_twice 0 waits for the end of phase 0 of a barrier; wait_twice 1 waits"):
        emulate(Launch(wait_without_arrival, 1, (torch.zeros(1),), {}), "random")


@gluon.jit
def store_and_copy(x, FENCE: gl.constexpr, WAIT: gl.constexpr):
    tile = gl.allocate_shared_memory(x.dtype, [16, 16], None)
    tile.store(gl.full([16, 16], 1.0, gl.float32, None))
    if FENCE:
        fence_async_shared()
    tma.async_copy_shared_to_global(x, [8, 0], tile)
    if WAIT:
        tma.store_wait(0)


def test_a_store_from_shared_memory_needs_a_fence_and_a_wait_and_stays_in_bounds():
    x = torch.zeros(20, 16).bfloat16()

    def run(**constants):
        emulate(Launch(store_and_copy, 1, (Described(x, [16, 16]),), constants), "late")

    run(FENCE=True, WAIT=True)
    assert x[:8].sum() == 0
    assert x[8:].eq(1).all()
    with pytest.raises(AssertionError, match="without fence_async_shared"):
        run(FENCE=False, WAIT=True)
    with pytest.raises(AssertionError, match="a program ends before its copies"):
        run(FENCE=True, WAIT=False)


@gluon.jit
def use_before_wait(y_ptr):
    tile = gl.allocate_shared_memory(gl.bfloat16, [16, 16], None)
    zeros = gl.zeros([16, 16], gl.float32, None)
    products = warpgroup_mma(tile, tile, zeros, is_async=True)
    gl.store(y_ptr + gl.arange(0, 16, None), gl.max(zeros + products, 1))


def test_a_result_needs_a_wait():
    with pytest.raises(AssertionError, match="not waited for"):
        emulate(Launch(use_before_wait, 1, (torch.zeros(16),), {}), "late")


@gluon.jit
def turns_done(counter_ptr):
    return gl.inline_asm_elementwise("ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [counter_ptr], gl.int32, False, 1)


@gluon.jit
def write_in_turn(y_ptr, counter_ptr, LAST_FIRST: gl.constexpr):
    turn = gl.program_id(0)
    if LAST_FIRST:
        turn = gl.num_programs(0) - 1 - turn
    done = turns_done(counter_ptr)
    while done != turn:
        done = turns_done(counter_ptr)
    gl.store(y_ptr + done, gl.program_id(0))
    gl.atomic_add(counter_ptr, 1, sem="release")


@pytest.mark.parametrize("order", ORDERS)
def test_a_program_must_not_wait_for_one_that_starts_later(order):
    def written(last_first, at_once):
        y, counter = torch.full((2, 5), -1, dtype=torch.int32)
        counter.zero_()
        emulate(Launch(write_in_turn, 5, (y, counter), {"LAST_FIRST": last_first}), order, at_once=at_once)
        return y.tolist()

    assert written(False, at_once=1) == written(False, at_once=3) == [0, 1, 2, 3, 4]
    assert written(True, at_once=5) == [4, 3, 2, 1, 0]
    with pytest.raises(Deadlock, match="programs wait for one another, or for one that starts later"):
        written(True, at_once=4)


def test_half_precision_rounds_to_nearest_even():
    halves = torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -70000.0])
    assert DType("bfloat16", 16).round(halves.numpy()).tolist() == halves.bfloat16().float().tolist()
    assert DType("float16", 16).round(halves.numpy()).tolist() == halves.half().float().tolist()
