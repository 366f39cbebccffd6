"""A GPU that computes nothing: a CUDA runtime and driver that let the CUDA build of PyTorch believe in an H200."""
