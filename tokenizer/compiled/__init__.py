"""Machine code from Python by Numba: how it is compiled and cached, and the intrinsics that the hot loops need."""
