"""Intrinsics that Numba lacks: unaligned loads, bit masks of 64 bytes, prefetching and more.

`llvm.py` documents and generates them when the first function is compiled.
"""

from .jit import intrinsic

load8 = intrinsic("load8")
load64 = intrinsic("load64")
store64 = intrinsic("store64")
trailing_zeros = intrinsic("trailing_zeros")
class_masks = intrinsic("class_masks")
ascii_only = intrinsic("ascii_only")
equal_mask = intrinsic("equal_mask")
range_mask = intrinsic("range_mask")
prefetch = intrinsic("prefetch")
copy_bytes = intrinsic("copy_bytes")
count_ones = intrinsic("count_ones")
uint8s_at = intrinsic("uint8s_at")
uint16s_at = intrinsic("uint16s_at")
uint32s_at = intrinsic("uint32s_at")
uint64s_at = intrinsic("uint64s_at")
int32s_at = intrinsic("int32s_at")
int64s_at = intrinsic("int64s_at")
bytes_at = intrinsic("bytes_at")
words_at = intrinsic("words_at")
load_acquire = intrinsic("load_acquire")
store_release = intrinsic("store_release")
try_lock = intrinsic("try_lock")
release_gil = intrinsic("release_gil")
take_gil = intrinsic("take_gil")
fill_list = intrinsic("fill_list")
