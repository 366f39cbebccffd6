"""What Numba lacks and every compiled loop here needs: unaligned loads, 64 bytes as bit masks, prefetching.

`llvm.py` says what each of them does, and generates it when the first function is compiled.
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
