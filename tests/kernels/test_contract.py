"""The contract of every op in `ALL`, checked on the examples of its record."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import oracle
import tilewright.kernels
from tilewright.kernels import use_backend
from tilewright.kernels.dispatch import HAS_TRITON
from tilewright.kernels.op import ALL, Op, Sizes

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot be imported")
EXAMPLES = [pytest.param(op, sizes, id=op.label(sizes)) for op in ALL.values() for sizes in op.examples]
OPS = [pytest.param(op, id=op.name) for op in ALL.values()]
every_example = pytest.mark.parametrize(("op", "sizes"), EXAMPLES)
every_op = pytest.mark.parametrize("op", OPS)


def random_like(results: Sequence[Tensor]) -> list[Tensor]:
    """Return random tensors like `results`, the same in each call."""
    generator = torch.Generator(results[0].device).manual_seed(1)
    return [torch.randn(y.shape, generator=generator, device=y.device, dtype=y.dtype) for y in results]


class Call:
    """A call of an op with random arguments."""

    def __init__(self, op: Op, sizes: Sizes, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.op = op
        positional, self.options = op.arguments(device, dtype, **sizes)
        # Options may be trained too: attention sinks.
        self.values = [*positional, *self.options.values()]
        self.num_positional = len(positional)

    @property
    def trained(self) -> list[Tensor]:
        """The tensors that require a gradient."""
        return [x for x in self.values if isinstance(x, Tensor) and x.requires_grad]

    def run(self, *values: Any, function: Any = None) -> tuple[Tensor, ...]:
        """Return the results, with `values` instead of the random arguments if given."""
        values = values or tuple(self.values)
        options = dict(zip(self.options, values[self.num_positional :], strict=True))
        results = (function or self.op.function)(*values[: self.num_positional], **options)
        results = results if isinstance(results, tuple) else (results,)
        return tuple(y for y in results if y is not None)

    def gradients(self, results: Sequence[Tensor], **options: Any) -> tuple[Tensor, ...]:
        """Return the gradients of the differentiable results with respect to the trained tensors."""
        results = [y for y in results if y.requires_grad]
        return torch.autograd.grad(results, self.trained, random_like(results), **options)


@pytest.fixture(autouse=True)
def triton():
    with use_backend("triton"):
        yield


def equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether tensors have equal bits."""
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def close(first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    """Assert that tensors differ by rounding only."""
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class RecordOps(TorchDispatchMode):
    """Record the calls of ops of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "tilewright":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def test_every_public_op_has_a_record():
    functions = {name for name in dir(tilewright.kernels) if name in ALL}
    assert functions == ALL.keys()
    for op in ALL.values():
        assert getattr(tilewright.kernels, op.name) is op.function
        assert op.function.__doc__
        assert op.examples
        assert op.shapes
        assert op.compiled


@every_op
def test_baseline_equals_reference(op, device):
    # The bench derives its error bound from the baseline.
    if op.baseline is None:
        pytest.skip("the reference is measured")
    positional, options = op.arguments(device, torch.float32, **op.examples[0])
    close([op.baseline(*positional)], [op.reference(*positional, **options)])


@every_op
def test_kernel_names_identify_their_op(op):
    names = tuple(ALL)
    assert op.kernels
    for kernel in op.kernels:
        assert kernel.__name__.startswith(names)
        assert ALL[max((name for name in names if kernel.__name__.startswith(name)), key=len)].group == op.group


@every_op
def test_costs_of_all_shapes(op):
    for sizes in op.shapes:
        forward, backward, both = op.cost(2, **sizes)
        assert both.bytes > 0
        assert both.flops > 0
        if forward is not None and backward is not None:
            assert both == forward + backward
    assert len({op.label(sizes) for sizes in op.shapes}) == len(op.shapes)
    assert {op.over} <= op.shapes[0].keys()


@every_example
def test_launches_only_recorded_kernels(op, sizes, device):
    launched = set()
    kernels = {kernel.__name__: kernel for other in ALL.values() for kernel in other.kernels}
    hooks = {name: lambda *args, name=name, **kwargs: launched.add(name) for name in kernels}
    for name, kernel in kernels.items():
        kernel.add_pre_run_hook(hooks[name])
    try:
        call = Call(op, sizes, device)
        call.gradients(call.run())
    finally:
        for name, kernel in kernels.items():
            kernel.pre_run_hooks.remove(hooks[name])
    assert launched
    assert launched <= {kernel.__name__ for kernel in op.kernels}


@pytest.mark.slow
@every_example
def test_opcheck(op, sizes, device):
    call = Call(op, sizes, device)
    with RecordOps() as seen:
        call.gradients(call.run())
    assert seen.calls
    (forward, args), *others = seen.calls
    trained = {id(x) for x in call.trained}
    leaves = [x.detach().requires_grad_() if isinstance(x, Tensor) and id(x) in trained else x for x in args]
    assert any(x.requires_grad for x in leaves if isinstance(x, Tensor))
    torch.library.opcheck(forward, tuple(leaves))
    for function, args in others:
        # AOTAutograd has traced these as part of the backward pass of `forward`.
        args = tuple(x.detach() if isinstance(x, Tensor) else x for x in args)
        torch.library.opcheck(function, args, test_utils=("test_schema", "test_faketensor"))


@every_example
def test_fake_results_have_the_layout_of_real_ones(op, sizes, device):
    call = Call(op, sizes, device)
    real = call.run()
    real_gradients = call.gradients(real)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = {id(x): mode.from_tensor(x) for x in call.values if isinstance(x, Tensor)}
        fake = Call(op, sizes, device)
        fake.values = [fakes.get(id(x), x) for x in call.values]
        results = fake.run()
        gradients = fake.gradients(results)
    for own, right in zip((*results, *gradients), (*real, *real_gradients), strict=True):
        assert (own.shape, own.dtype, own.stride()) == (right.shape, right.dtype, right.stride())


@every_example
def test_meta_device(op, sizes, device):
    with use_backend("auto"):
        call, real = Call(op, sizes, torch.device("meta")), Call(op, sizes, device)
        for own, right in zip(call.run(), real.run(), strict=True):
            assert own.is_meta
            assert (own.shape, own.dtype) == (right.shape, right.dtype)


@pytest.mark.slow
@every_example
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_compiles_to_one_graph(op, sizes, device, backend):
    call = Call(op, sizes, device)
    # The reference is PyTorch's own operations, which AOTAutograd need not trace here.
    compiler = "eager" if backend == "reference" else "inductor" if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(call.op.function, fullgraph=True, backend=compiler)
    with use_backend(backend):
        expected, actual = call.run(), call.run(function=compiled)
        close(actual, expected)
        close(call.gradients(actual), call.gradients(expected))


@every_example
def test_calls_are_bitwise_repeatable(op, sizes, device):
    call = Call(op, sizes, device)
    first, second = call.run(), call.run()
    assert equal(first, second)
    assert equal(call.gradients(first), call.gradients(second))


@every_example
def test_second_derivative_raises(op, sizes, device):
    call = Call(op, sizes, device)
    gradients = call.gradients(call.run(), create_graph=True)
    total = sum((gradient.square().sum() for gradient in gradients), torch.zeros((), device=device))
    if not total.requires_grad:
        # The gradient of a linear op does not depend on its inputs.
        return
    with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
        torch.autograd.grad(total, call.trained)


@every_example
def test_forward_mode_equals_reference(op, sizes, device):
    call = Call(op, sizes, device)
    indices = [i for i, x in enumerate(call.values) if isinstance(x, Tensor) and x.requires_grad]

    def function_of_trained(*trained: Tensor) -> tuple[Tensor, ...]:
        values = list(call.values)
        for i, x in zip(indices, trained, strict=True):
            values[i] = x
        return tuple(y for y in call.run(*values) if y.is_floating_point())

    primals = tuple(x.detach() for x in call.trained)
    tangents = tuple(torch.randn_like(x) for x in primals)
    _, actual = torch.func.jvp(function_of_trained, primals, tangents)
    assert any(tangent.abs().max() > 0 for tangent in actual)
    with use_backend("reference"):
        close(actual, torch.func.jvp(function_of_trained, primals, tangents)[1])


@every_example
def test_torch_func_transforms(op, sizes, device):
    calls = [Call(op, sizes, device, seed=seed) for seed in (0, 1)]
    first = calls[0]
    tensors = [isinstance(x, Tensor) for x in first.values]
    stacked = [torch.stack([c.values[i].detach() for c in calls]) if of else first.values[i] for i, of in enumerate(tensors)]
    mapped = torch.func.vmap(first.run, in_dims=tuple(0 if of else None for of in tensors))(*stacked)
    close(mapped, [torch.stack(results) for results in zip(*(c.run() for c in calls), strict=True)])

    def loss(x: Tensor) -> Tensor:
        return sum(y.square().sum() for y in first.run(x, *first.values[1:]) if y.is_floating_point())  # pyright: ignore

    x = first.values[0].detach().requires_grad_()
    close([torch.func.grad(loss)(x.detach())], torch.autograd.grad(loss(x), x))


@every_example
def test_empty_inputs(op, sizes, device):
    first = next(iter(sizes))
    for backend in ("triton", "reference"):
        with use_backend(backend):
            call = Call(op, {**sizes, first: 0}, device)
            results = call.run()
            assert all(torch.isfinite(y).all() for y in results)
            assert all(gradient.count_nonzero() == 0 for gradient in call.gradients(results))


@every_example
def test_activation_checkpointing(op, sizes, device):
    call = Call(op, sizes, device)
    results = call.run()
    expected = call.gradients(results)
    for use_reentrant in (False, True):
        again = checkpoint(call.run, *call.values, use_reentrant=use_reentrant)
        assert equal(again, results)
        for x in call.trained:
            x.grad = None
        differentiable = [y for y in again if y.requires_grad]
        torch.autograd.backward(differentiable, random_like(differentiable))
        assert equal([x.grad for x in call.trained], expected)


@every_example
def test_flop_counter_counts_only_matrix_products(op, sizes, device):
    call = Call(op, sizes, device)
    with FlopCounterMode(display=False) as counter:
        call.gradients(call.run())
    assert (counter.get_total_flops() > 0) == (op.bound_by == "flops")


@every_example
def test_tensors_on_two_devices_raise(op, sizes, device):
    call = Call(op, sizes, device)
    for backend in ("triton", "reference"):
        for i, x in enumerate(call.values[1:], 1):
            if isinstance(x, Tensor):
                values = list(call.values)
                values[i] = x.detach().to("meta")
                with use_backend(backend), pytest.raises(ValueError, match="on meta: expected"):
                    call.run(*values)


@every_example
def test_float64_runs_reference_and_integers_raise(op, sizes, device):
    call = Call(op, sizes, device, torch.float64)
    results = call.run()
    with use_backend("reference"):
        assert equal(results, call.run())
    for backend in ("triton", "reference"):
        with use_backend(backend), pytest.raises(ValueError, match=r"dtype torch\.int64: expected torch\.float32"):
            call.run(call.values[0].detach().long(), *call.values[1:])


@pytest.mark.gpu
@every_example
def test_cuda_graph_without_synchronization(op, sizes, device):
    call = Call(op, sizes, device, torch.bfloat16)
    upstream = random_like([y for y in call.run() if y.requires_grad])

    def step() -> tuple[Tensor, ...]:
        results = call.run()
        differentiable = [y for y in results if y.requires_grad]
        return *(y.detach() for y in results), *torch.autograd.grad(differentiable, call.trained, upstream)

    oracle.assert_replays(step)


@pytest.mark.gpu
@pytest.mark.huge
@pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in ALL.values() if op.huge])
def test_more_elements_than_32_bits_count(op):
    device = torch.device("cuda")
    call = Call(op, op.huge, device, torch.bfloat16)
    # Check only the last slice of the first dimension, which has the largest offsets.
    result = call.run()[0]
    (gradient, *_) = call.gradients([result])
    assert result.numel() > 2**31 or call.values[0].numel() > 2**31
    assert torch.isfinite(result if result.dim() == 0 else result[-1]).all()
    assert torch.isfinite(gradient[-1]).all()
    assert gradient[-1].count_nonzero() > gradient[-1].numel() // 4
