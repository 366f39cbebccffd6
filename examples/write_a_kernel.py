"""Write a kernel and prove it.

A new op, squared_relu(x) = max(x, 0)^2 (So et al. 2021, Primer): its reference, its Triton kernels, its registration, and a
proof against float64. Without a GPU the kernels run in Triton's interpreter.
"""

# %%
import os

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so set before the next import
from tilewright.kernels import use_backend
from tilewright.kernels.dispatch import jit, tl, use_triton
from tilewright.kernels.launch import launch
from tilewright.kernels.op import ALL, Arguments, Cost, Costs, Op, draw, record
from tilewright.kernels.registration import count_no_flops, custom_op

# %% [markdown]
# **The reference** is the specification: float32 inside, rounded once. It also runs on a CPU and for float64.


# %%
def reference(x: Tensor) -> Tensor:
    return (x if x.dtype == torch.float64 else x.float()).relu().square().to(x.dtype)


# %% [markdown]
# **The kernels.** A program computes one block. Offsets are int64, so that tensors may exceed 2^31 elements. `where` keeps NaN.


# %%
@jit
def squared_relu_forward(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < size).to(tl.float32)
    relu = tl.where(x < 0, 0.0, x)
    tl.store(y_ptr + offsets, relu * relu, mask=offsets < size)


@jit
def squared_relu_backward(dy_ptr, x_ptr, dx_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < size).to(tl.float32)
    dy = tl.load(dy_ptr + offsets, mask=offsets < size).to(tl.float32)
    tl.store(dx_ptr + offsets, 2 * tl.where(x < 0, 0.0, x) * dy, mask=offsets < size)


def run(kernel, *tensors: Tensor, block: int = 1024) -> Tensor:
    inputs = [x.contiguous() for x in tensors]
    output = torch.empty_like(inputs[-1])
    launch(kernel, -(-output.numel() // block), *inputs, output, output.numel(), BLOCK=block)
    return output


# %% [markdown]
# **The registration** makes each direction an op of PyTorch's dispatcher: `torch.compile` keeps it in one graph by its fake.


# %%
@custom_op("squared_relu")
def _squared_relu(x: Tensor) -> Tensor:
    return run(squared_relu_forward, x)


@custom_op("squared_relu_backward")
def _squared_relu_backward(dy: Tensor, x: Tensor) -> Tensor:
    return run(squared_relu_backward, dy, x)


_squared_relu.register_fake(lambda x: torch.empty_like(x, memory_format=torch.contiguous_format))
_squared_relu_backward.register_fake(lambda dy, x: torch.empty_like(x, memory_format=torch.contiguous_format))
_squared_relu.register_autograd(
    lambda ctx, dy: _squared_relu_backward(dy, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
count_no_flops(_squared_relu, _squared_relu_backward)


def squared_relu(x: Tensor) -> Tensor:
    """Return max(x, 0)^2, elementwise: (...) -> (...) in the dtype of x."""
    return _squared_relu(x) if use_triton(x) else reference(x)


# %% [markdown]
# **The record** is all that the bench, the compiler's gate and the contract tests read. Costs count bytes and FLOPs.

# %%
record(
    Op(
        function=squared_relu,
        reference=reference,
        kernels=(squared_relu_forward, squared_relu_backward),
        arguments=lambda device, dtype, size: Arguments((draw(device, dtype, size),), {}),
        cost=lambda itemsize, size: Costs.of(Cost(2 * itemsize * size, 2 * size), Cost(3 * itemsize * size, 3 * size)),
        shapes=({"size": 2**26},),
        examples=({"size": 5000}, {"size": 1}),
        compiled=({"size": 2**20, "dtype": torch.bfloat16},),
    )
)

# %% [markdown]
# **The proof.** A result may have twice the error of the reference in the same dtype, plus one rounding, against float64.


# %%
def results(function, x: Tensor) -> tuple[Tensor, Tensor]:
    y = function(x)
    return y.detach().double(), torch.autograd.grad(y, x, torch.ones_like(y))[0].double()


device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.manual_seed(0)
checked = 0
for dtype in (torch.float32, torch.float16):
    for sizes in ALL["squared_relu"].examples:
        (x,), _ = ALL["squared_relu"].arguments(device, dtype, **sizes)
        exact = results(reference, x.detach().double().requires_grad_())
        with use_backend("triton"):
            actual = results(squared_relu, x)
        for got, plain, true in zip(actual, results(reference, x), exact, strict=True):
            error, allowed = (got - true).abs().max(), 2 * (plain - true).abs().max()
            assert error <= allowed + torch.finfo(dtype).eps * true.abs().max(), f"{dtype} {sizes}: error {error:.1e}"
            checked += 1
print(f"squared_relu equals its float64 oracle in {checked} results, forward and backward")
