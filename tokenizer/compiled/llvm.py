"""The LLVM code of the functions in `intrinsics.py`. Imported only to compile, because it needs Numba.

Nothing here checks bounds. Bit q of a mask is for the byte at `index + q`. Byte order is little-endian.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

_BYTE, _INT, _WORD = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_BYTE, 64)


def _intrinsic(function: Callable[..., Any]) -> Any:
    # Hide from the type checker that the decorated function is a generator of code.
    return intrinsic(function)


def _address(context: Any, builder: Any, array_type: Any, place: Any, element: Any) -> Any:
    array, index = place
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), element.as_pointer())


def _load(context: Any, builder: Any, signature: Any, arguments: Any, element: Any) -> Any:
    value = builder.load(_address(context, builder, signature.args[0], arguments, element))
    value.align = 1
    return value


@_intrinsic
def load8(typing_context, data, index):
    """Return byte `index` of the uint8 array as int64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.zext(_load(context, builder, signature, arguments, _BYTE), _WORD)

    return types.int64(data, types.int64), generate


@_intrinsic
def load64(typing_context, data, index):
    """Return the 8 bytes at `index` of the uint8 array as uint64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _load(context, builder, signature, arguments, _WORD)

    return types.uint64(data, types.int64), generate


@_intrinsic
def store64(typing_context, data, index, word):
    """Write the 8 bytes of a uint64 at `index` of the uint8 array."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, place, value = arguments
        builder.store(value, _address(context, builder, signature.args[0], (array, place), _WORD), align=1)
        return context.get_dummy_value()

    return types.void(data, types.int64, types.uint64), generate


def _view(context: Any, builder: Any, kind: Any, address: Any, size: Any) -> Any:
    array = context.make_array(kind)(context, builder)
    width = context.get_constant(types.intp, kind.dtype.bitwidth // 8)
    data = builder.inttoptr(address, context.get_data_type(kind.dtype).as_pointer())
    populate_array(array, data=data, shape=[size], strides=[width], itemsize=width, meminfo=None)
    return array._getvalue()


def _array_at(kind: Any) -> Any:
    @_intrinsic
    def at(typing_context, words, index):
        """Return the array whose address and length are words `index` and `index + 1`."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            place = _address(context, builder, signature.args[0], arguments, _WORD)
            return _view(context, builder, kind, builder.load(place), builder.load(builder.gep(place, [_INT(1)])))

        return kind(words, types.int64), generate

    return at


uint8s_at = _array_at(types.Array(types.uint8, 1, "C"))
uint16s_at = _array_at(types.Array(types.uint16, 1, "C"))
uint32s_at = _array_at(types.Array(types.uint32, 1, "C"))
uint64s_at = _array_at(types.Array(types.uint64, 1, "C"))
int32s_at = _array_at(types.Array(types.int32, 1, "C"))
int64s_at = _array_at(types.Array(types.int64, 1, "C"))


@_intrinsic
def bytes_at(typing_context, address, size):
    """Return the `size` bytes at an address as a uint8 array."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _view(context, builder, signature.return_type, *arguments)

    return types.Array(types.uint8, 1, "C")(types.int64, types.int64), generate


@_intrinsic
def words_at(typing_context, address, size):
    """Return the `size` numbers at an address as an int64 array."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _view(context, builder, signature.return_type, *arguments)

    return types.Array(types.int64, 1, "C")(types.int64, types.int64), generate


@_intrinsic
def load_acquire(typing_context, words, index):
    """Return word `index` of the uint64 array, with acquire semantics: pairs with `store_release`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_address(context, builder, signature.args[0], arguments, _WORD), "acquire", 8)

    return types.uint64(words, types.uint64), generate


@_intrinsic
def store_release(typing_context, words, index, word):
    """Write a word of the uint64 array, with release semantics: earlier writes become visible to other threads first."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, place, value = arguments
        pointer = _address(context, builder, signature.args[0], (array, place), _WORD)
        builder.store_atomic(value, pointer, "release", 8)
        return context.get_dummy_value()

    return types.void(words, types.uint64, types.uint64), generate


@_intrinsic
def try_lock(typing_context, words, index):
    """Set word `index` of the uint64 array from 0 to 1; return whether it was 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _address(context, builder, signature.args[0], arguments, _WORD)
        result = builder.cmpxchg(pointer, _WORD(0), _WORD(1), "acquire", "monotonic")
        return builder.extract_value(result, 1)

    return types.boolean(words, types.uint64), generate


@_intrinsic
def release_gil(typing_context):
    """Release the GIL; return the state for `take_gil`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ptrtoint(context.get_python_api(builder).save_thread(), _WORD)

    return types.int64(), generate


@_intrinsic
def take_gil(typing_context, state):
    """Acquire the GIL again, after `release_gil`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        python = context.get_python_api(builder)
        python.restore_thread(builder.inttoptr(arguments[0], python.voidptr))
        return context.get_dummy_value()

    return types.void(types.int64), generate


@_intrinsic
def fill_list(typing_context, list_address, objects, ids, size):
    """Set item i of a Python list of `size` items to `objects[ids[i]]`; `objects` holds addresses. Requires the GIL."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, objects, ids, size = arguments
        python = context.get_python_api(builder)
        target = builder.inttoptr(address, python.pyobj)
        with cgutils.for_range(builder, size) as loop:
            id = builder.load(_address(context, builder, signature.args[2], (ids, loop.index), _INT))
            place = _address(context, builder, signature.args[1], (objects, builder.zext(id, _WORD)), _WORD)
            item = builder.inttoptr(builder.load(place), python.pyobj)
            # The list owns the reference.
            python.incref(item)
            python.list_setitem(target, loop.index, item)
        return context.get_dummy_value()

    return types.void(types.int64, objects, ids, types.int64), generate


@_intrinsic
def trailing_zeros(typing_context, word):
    """Return the number of zero bits below the lowest one bit; 64 for zero."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.uint64), generate


@_intrinsic
def count_ones(typing_context, word):
    """Return the number of one bits of the word."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.int64(types.uint64), generate


@_intrinsic
def class_masks(typing_context, data, index):
    """Return masks of the 64 bytes at `index`: ASCII letters, digits, white space, spaces, apostrophes, non-ASCII."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        text = _load(context, builder, signature, arguments, _VECTOR)

        def all_bytes(value: int) -> Any:
            return ir.Constant(_VECTOR, [value] * 64)

        def among(vector: Any, first: str, last: str) -> Any:
            offset = builder.sub(vector, all_bytes(ord(first)))
            return builder.icmp_unsigned("<=", offset, all_bytes(ord(last) - ord(first)))

        def equal(character: str) -> Any:
            return builder.icmp_unsigned("==", text, all_bytes(ord(character)))

        masks = (
            among(builder.or_(text, all_bytes(0x20)), "a", "z"),
            among(text, "0", "9"),
            builder.or_(among(text, "\t", "\r"), equal(" ")),
            equal(" "),
            equal("'"),
            builder.icmp_unsigned(">=", text, all_bytes(0x80)),
        )
        return context.make_tuple(builder, signature.return_type, [builder.bitcast(mask, _WORD) for mask in masks])

    return types.UniTuple(types.uint64, 6)(data, types.int64), generate


@_intrinsic
def ascii_only(typing_context, data, index):
    """Return whether all of the 64 bytes at `index` are ASCII."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        text = _load(context, builder, signature, arguments, _VECTOR)
        mask = builder.bitcast(builder.icmp_unsigned(">=", text, ir.Constant(_VECTOR, [0x80] * 64)), _WORD)
        return builder.icmp_unsigned("==", mask, _WORD(0))

    return types.boolean(data, types.int64), generate


@_intrinsic
def equal_mask(typing_context, data, index, byte):
    """Return a mask of the bytes, among the 64 at `index`, that equal `byte`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        text = _load(context, builder, signature, arguments[:2], _VECTOR)
        return builder.bitcast(builder.icmp_unsigned("==", text, _everywhere(builder, arguments[2])), _WORD)

    return types.uint64(data, types.int64, types.int64), generate


@_intrinsic
def range_mask(typing_context, data, index, first, last):
    """Return a mask of the bytes, among the 64 at `index`, from `first` to `last` inclusive."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        text = _load(context, builder, signature, arguments[:2], _VECTOR)
        low, high = arguments[2:]
        offset = builder.sub(text, _everywhere(builder, low))
        inside = builder.icmp_unsigned("<=", offset, _everywhere(builder, builder.sub(high, low)))
        return builder.bitcast(inside, _WORD)

    return types.uint64(data, types.int64, types.int64, types.int64), generate


def _everywhere(builder: Any, byte: Any) -> Any:
    one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), builder.trunc(byte, _BYTE), _INT(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_INT, 64), [0] * 64))


@_intrinsic
def prefetch(typing_context, array, index):
    """Prefetch element `index` of the array; the index may be out of bounds."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _address(context, builder, signature.args[0], arguments, _BYTE)
        kind = ir.FunctionType(ir.VoidType(), [_BYTE.as_pointer(), _INT, _INT, _INT])
        function = builder.module.declare_intrinsic("llvm.prefetch", [_BYTE.as_pointer()], kind)
        builder.call(function, [pointer, _INT(0), _INT(3), _INT(1)])
        return context.get_dummy_value()

    return types.void(array, types.int64), generate


@_intrinsic
def copy_bytes(typing_context, target, target_index, source, source_index, size):
    """Copy `size` bytes from one uint8 array into another; the ranges must not overlap."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        to, to_index, origin, origin_index, count = arguments
        pointers = (
            _address(context, builder, signature.args[0], (to, to_index), _BYTE),
            _address(context, builder, signature.args[2], (origin, origin_index), _BYTE),
        )
        cgutils.raw_memcpy(builder, *pointers, count, 1)
        return context.get_dummy_value()

    return types.void(target, types.int64, source, types.int64, types.int64), generate
