"""A GPU that computes nothing: a fake CUDA runtime and driver that present an H200 to the CUDA build of PyTorch."""
