"""Compile Python to machine code with Numba: compilation, the cache on disk, and the intrinsics of the hot loops."""
