"""The builtins of Gluon and Triton, on NumPy arrays.

To add a builtin of `gl` or `tl`, add an entry to `_language`; for one that kernels import by name, add it to `BUILTINS`. A
builtin unwraps its arguments with `raw` and returns a `Value`. Put an asynchronous operation as a function into the program's
`copies` or `products`. Call `give_way` after every visible effect, with a condition and a reason if the builtin waits. Call
`check_fences` where the hardware reads shared memory, and `Grid.before_write` before a write to global memory. Add a test to
`test_gluon_emulator.py` that leaves out the necessary wait.
"""

import types
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .grid import Grid
from .program import Barrier, Product, Program, Shared
from .values import DTYPES, OF_TORCH, DType, Pointer, Value, function, load, raw, reduction, store


def _warpgroup_mma(a: Any, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> Any:
    # Operands in registers are copied now; operands in shared memory are read when the product runs.
    held = None if isinstance(a, Shared) else a.data.copy()
    before = acc if use_acc else None

    def compute() -> Value:
        left = a.read_by_hardware() if held is None else held
        start = 0.0 if before is None else before.value.data if isinstance(before, Product) else before.data
        with np.errstate(all="ignore"):
            return Value((start + left.astype(np.float32) @ b.read_by_hardware().astype(np.float32)).astype(np.float32))

    product = Product(compute)
    Program.current.products.setdefault(Program.current.me(), []).append(product)
    if Program.current.order == "early":
        product.run()
    if not is_async:
        return _warpgroup_mma_wait(0, (product,))
    Program.current.give_way()
    return product


def _warpgroup_mma_wait(num_outstanding: int = 0, deps: Sequence[Any] = ()) -> Any:
    queue = Program.current.products.setdefault(Program.current.me(), [])
    done = queue[: max(len(queue) - num_outstanding, 0)]
    Program.current.give_way(lambda: all(p.value is not None for p in done), "a product")
    del queue[: len(done)]
    for x in deps:
        assert not (isinstance(x, Product) and x in queue), "a result is used whose product was not waited for"
    results = tuple(x.value if isinstance(x, Product) else x for x in deps)
    return results[0] if len(results) == 1 else results


class _MBarrier:
    @staticmethod
    def MBarrierLayout() -> str:
        return "barrier"

    @staticmethod
    def init(barrier: Barrier, count: int) -> None:
        barrier.count = barrier.left = count

    @staticmethod
    def expect(barrier: Barrier, size: int) -> None:
        barrier.bytes += size
        _MBarrier.arrive(barrier)

    @staticmethod
    def arrive(barrier: Barrier, count: int = 1) -> None:
        assert barrier.left >= count, "more arrivals than a phase has"
        barrier.left -= count
        barrier.end_of_phase()
        Program.current.give_way()

    @staticmethod
    def wait(barrier: Barrier, phase: Any) -> None:
        parity = int(phase) & 1
        Program.current.give_way(lambda: barrier.phase != parity, f"the end of phase {parity} of a barrier")


class Descriptor:
    """A TMA descriptor of tiles of a tensor."""

    def __init__(self, tensor: torch.Tensor, block_shape: Sequence[int]) -> None:
        self.tensor, self.dtype = tensor, OF_TORCH[tensor.dtype]
        nbytes = int(np.prod(block_shape)) * self.dtype.primitive_bitwidth // 8
        self.block_type = types.SimpleNamespace(shape=list(block_shape), nbytes=nbytes)

    def inside(self, place: Sequence[Any]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Return the slices of the tensor that a tile at `place` covers, and the matching slices of the tile."""
        begins = [int(x) for x in place]
        assert all(begin >= 0 for begin in begins), f"a tile at {begins}"
        sizes = [max(0, min(b, n - x)) for x, b, n in zip(begins, self.block_type.shape, self.tensor.shape, strict=True)]
        return tuple(slice(x, x + n) for x, n in zip(begins, sizes, strict=True)), tuple(slice(0, n) for n in sizes)


class _Tma:
    @staticmethod
    def async_copy_global_to_shared(descriptor: Descriptor, place: Sequence[Any], barrier: Barrier, result: Shared) -> None:
        source, part = descriptor.inside(place)

        def arrive() -> None:
            tile = np.zeros(descriptor.block_type.shape, np.float32)
            tile[part] = descriptor.tensor[source].float().numpy()
            result.data[...] = tile.reshape(result.data.shape)
            barrier.bytes -= descriptor.block_type.nbytes
            barrier.end_of_phase()

        # Overwrite the buffer at once, so that a reader that still needs the old data fails.
        result.data[...] = np.nan
        if Program.current.order == "early":
            arrive()
        else:
            Program.current.copies.append(arrive)
        Program.current.give_way()

    @staticmethod
    def async_copy_shared_to_global(descriptor: Descriptor, place: Sequence[Any], source: Shared) -> None:
        target, part = descriptor.inside(place)
        source.check_fences()

        def leave() -> None:
            tile = source.data.reshape(descriptor.block_type.shape)[part]
            descriptor.tensor[target] = torch.from_numpy(tile.copy()).to(descriptor.tensor.dtype)
            mine.remove(leave)

        mine = Program.current.stores.setdefault(Program.current.me(), [])
        mine.append(leave)
        if Program.current.order == "early":
            leave()
        else:
            Program.current.copies.append(leave)
        Program.current.give_way()

    @staticmethod
    def store_wait(pendings: int) -> None:
        mine = Program.current.stores.get(Program.current.me(), [])
        Program.current.give_way(lambda: len(mine) <= pendings, "a copy to global memory")


def _fence_async_shared() -> None:
    for shared in Program.current.buffers:
        shared.unfenced.difference_update({mark for mark in shared.unfenced if mark[0] is Program.current.me()})


def _allocate_shared_memory(dtype: DType, shape: Sequence[int], layout: Any) -> Any:
    if layout == "barrier":
        barriers = np.empty(shape, object)
        for i in np.ndindex(*shape):
            barriers[i] = Barrier()
        return barriers.item() if barriers.size == 1 and len(shape) == 1 else Shared(barriers, dtype)
    buffer = Shared(np.full(shape, np.nan, np.float32), dtype)
    Program.current.buffers.append(buffer)
    return buffer


def _atomic_add(pointer: Pointer, value: Any, sem: str) -> None:
    places = torch.as_tensor(np.asarray(pointer.offset), dtype=torch.int64)
    data = torch.from_numpy(np.array(np.broadcast_to(raw(value), places.shape)))
    Grid.current.before_write()
    pointer.memory.index_put_((places,), data.to(pointer.memory.dtype), accumulate=True)
    Program.current.give_way()


def _store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    Grid.current.before_write()
    store(pointer, value, mask)


def _inline_asm(asm: str, constraints: str, arguments: Sequence[Any], dtype: DType, is_pure: bool, pack: int) -> Any:
    """Read a counter in global memory that another program may increment."""
    assert asm == "ld.acquire.gpu.global.b32 $0, [$1];", asm
    Grid.current.poll()
    Program.current.give_way(polling=True)
    return load(arguments[0])


class _Language(types.SimpleNamespace):
    def __getattr__(self, name: str) -> Any:
        raise NotImplementedError(f"gl.{name} is not emulated: add it to {__file__}")


def _language() -> Any:
    """Return the replacement for the modules `gl` and `tl`."""
    unary = {name: function(getattr(np, name)) for name in ("exp2", "log2", "sqrt", "abs")}
    layouts = ("NVMMADistributedLayout", "DotOperandLayout", "SliceLayout", "BlockedLayout", "SwizzledSharedLayout")
    return _Language(
        **DTYPES, **unary,
        constexpr=object,
        rsqrt=function(lambda x: 1 / np.sqrt(x)),
        maximum=function(np.fmax), minimum=function(np.fmin), where=function(np.where),
        max=reduction(np.fmax.reduce), min=reduction(np.fmin.reduce), sum=reduction(np.sum),
        cdiv=lambda x, y: (x + y - 1) // y, cast=lambda x, dtype: Value(dtype.round(raw(x))),
        load=load, store=_store, atomic_add=_atomic_add, inline_asm_elementwise=_inline_asm, debug_barrier=lambda: None,
        zeros=lambda shape, dtype, layout=None: Value(np.zeros(shape, dtype.numpy)),
        full=lambda shape, value, dtype, layout=None: Value(np.full(shape, value, dtype.numpy)),
        arange=lambda start, end, layout=None: Value(np.arange(start, end, dtype=np.int32)),
        convert_layout=lambda x, layout: x, static_range=range, static_assert=lambda *_: None,
        program_id=lambda axis: Program.current.place, num_programs=lambda axis: Program.current.num_programs,
        allocate_shared_memory=_allocate_shared_memory,
        warp_specialize=lambda partitions, warps, registers: Program.current.run(partitions),
        **dict.fromkeys(layouts, lambda *_: None),
        NVMMASharedLayout=types.SimpleNamespace(get_default_for=lambda *_: None),
    )  # fmt: skip


_LANGUAGE = _language()
BUILTINS = {
    "warpgroup_mma": _warpgroup_mma, "warpgroup_mma_wait": _warpgroup_mma_wait, "fence_async_shared": _fence_async_shared,
    "mbarrier": _MBarrier, "tma": _Tma, "tl": _LANGUAGE, "gl": _LANGUAGE,
}  # fmt: skip
