"""Programs with an error that the null GPU must report on stderr: `python -m null_gpu.mistakes NAME`."""

import ctypes
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def _write(address, BLOCK: tl.constexpr):
    # The address is passed as an integer, because Triton rejects host tensors.
    elements = tl.arange(0, BLOCK)
    tl.store(address.to(tl.pointer_type(tl.float32)) + elements, elements.to(tl.float32))


def _write_to(address: int):
    return _write[(1,)](address, BLOCK=128)


def no_mistake() -> None:
    """Write to GPU memory, also in a CUDA graph."""
    x = torch.zeros(128, device="cuda")
    _write_to(x.data_ptr())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _write_to(x.data_ptr())
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x.zero_()
        torch.cuda.current_stream().wait_stream(side)
    graph.replay()
    torch.cuda.synchronize()


def memory_of_the_host() -> None:
    """Write to host memory in a kernel."""
    x = torch.zeros(128)
    _write_to(x.data_ptr())


def freed_memory() -> None:
    """Write to freed memory in a kernel."""
    x = torch.zeros(1 << 26, device="cuda")
    address = x.data_ptr()
    del x
    torch.cuda.empty_cache()
    _write_to(address)


def memory_of_another_device() -> None:
    """Write to memory of the second device in a kernel on the first."""
    x = torch.zeros(128, device="cuda:1")
    _write_to(x.data_ptr())


def stream_of_another_device() -> None:
    """Launch a kernel on a stream of the second device while the first is current."""
    x, stream = torch.zeros(128, device="cuda:0"), torch.cuda.Stream("cuda:1")
    compiled = _write_to(x.data_ptr())
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(ctypes.c_void_p(x.data_ptr())))
    _launch(compiled, 0, arguments, stream.cuda_stream)


def synchronising_in_a_capture() -> None:
    """Synchronize during a graph capture."""
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.cuda.synchronize()


def stream_that_stays_in_a_capture() -> None:
    """Join a second stream to a capture, and end the capture without waiting for that stream."""
    x, side = torch.zeros(128, device="cuda"), torch.cuda.Stream()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x.zero_()


def too_much_shared_memory() -> None:
    """Launch a kernel with more shared memory than the limit of a program."""
    x = torch.zeros(128, device="cuda")
    compiled = _write_to(x.data_ptr())
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(ctypes.c_void_p(x.data_ptr())))
    _launch(compiled, 300_000, arguments, None)


def _launch(compiled, shared: int, arguments, stream: int | None) -> None:
    # Bypass Triton, which checks its launches.
    driver = ctypes.CDLL("libcuda.so.1")
    sizes = (1, 1, 1, 128, 1, 1)
    code = driver.cuLaunchKernel(
        ctypes.c_void_p(compiled.function), *sizes, shared, ctypes.c_void_p(stream), arguments, ctypes.c_void_p()
    )
    if code:
        raise RuntimeError(f"the launch gave {code}")


MISTAKES = {
    function.__name__: function
    for function in (
        no_mistake, memory_of_the_host, freed_memory, memory_of_another_device, stream_of_another_device,
        synchronising_in_a_capture, stream_that_stays_in_a_capture, too_much_shared_memory,
    )
}  # fmt: skip

if __name__ == "__main__":
    MISTAKES[sys.argv[1]]()
