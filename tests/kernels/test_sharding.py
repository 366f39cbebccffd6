"""Ops on DTensors in two processes, each row sharded or whole, against the same ops on plain tensors."""

from functools import partial

import pytest
import torch
from two_processes import as_one_of_two, run_in_two_processes

from tilewright.kernels import add_rms_norm, geglu, layer_norm, rms_norm, swiglu, use_backend
from tilewright.kernels.dispatch import HAS_TRITON

BACKENDS = ["reference", "triton"] if HAS_TRITON else ["reference"]
ROWS, WIDTH = (2, 6), 16


def cases():
    """Yield a name, a function, the shapes of the inputs that are sharded like rows, and how many weights follow them."""
    rows = (*ROWS, WIDTH)
    yield "rms_norm", rms_norm, [rows], 1
    # Another eps, so that what PyTorch remembers of the first call must not be used.
    yield "rms_norm eps", partial(rms_norm, eps=0.5), [rows], 1
    yield "rms_norm without weight", rms_norm, [rows], 0
    yield "add_rms_norm", add_rms_norm, [rows, rows], 1
    yield "layer_norm", layer_norm, [rows], 2
    yield "layer_norm weight", layer_norm, [rows], 1
    yield "swiglu", swiglu, [rows, rows], 0
    yield "swiglu packed", swiglu, [rows], 0
    yield "geglu", geglu, [rows, rows], 0
    yield "geglu erf", partial(geglu, approximate="none"), [rows, rows], 0
    yield "geglu packed", geglu, [rows], 0


def gradients(function, inputs, wanted):
    """Return the results, and the gradients of the inputs that are wanted."""
    leaves = [x.detach().requires_grad_(wants) for x, wants in zip(inputs, wanted, strict=True)]
    results = function(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    wanted_leaves = [x for x in leaves if x.requires_grad]
    return *(y.detach() for y in results), *torch.autograd.grad(sum((y * y).sum() for y in results), wanted_leaves)


def check_all():
    """Run all cases as one of two processes."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    for backend in BACKENDS:
        for name, function, shapes, num_weights in cases():
            torch.manual_seed(0)
            inputs = [torch.randn(shape) for shape in shapes] + [torch.randn(WIDTH) for _ in range(num_weights)]
            only_last = [False] * (len(inputs) - 1) + [True]
            only_first = [True] + [False] * (len(inputs) - 1)
            # Sequence and batch; and for what is elementwise, the channels.
            dims = (1, 0, 2) if name in ("swiglu", "geglu", "geglu erf") else (1, 0)
            for dim in dims:
                placements = [Shard(dim)] * len(shapes) + [Replicate()] * num_weights
                sharded = [distribute_tensor(x, mesh, [p]) for x, p in zip(inputs, placements, strict=True)]
                for wanted in ([True] * len(inputs), only_first, only_last):
                    with use_backend(backend):
                        actual = gradients(function, sharded, wanted)
                    with use_backend("reference"):
                        expected = gradients(function, inputs, wanted)
                    case = f"{backend} {name} sharded along {dim}, {wanted}"
                    assert actual[0].placements == (Shard(dim),), f"{case}: the result has {actual[0].placements}"
                    for a, b in zip(actual, expected, strict=True):
                        torch.testing.assert_close(a.full_tensor(), b, msg=lambda text, case=case: f"{case}: {text}")


def check_uneven_and_compiled():
    """Run what a sequence that does not divide, and a compiled function, do."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, WIDTH), torch.randn(WIDTH)
    expected = gradients(rms_norm, (x, weight), (True, True))

    sharded = distribute_tensor(x, mesh, [Shard(1)]), distribute_tensor(weight, mesh, [Replicate()])
    for function in (rms_norm, torch.compile(rms_norm, backend="aot_eager", fullgraph=True)):
        with use_backend(BACKENDS[-1]):
            actual = gradients(function, sharded, (True, True))
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a.full_tensor(), b)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ops_on_dtensors_equal_those_on_plain_tensors(tmp_path):
    run_in_two_processes(__file__, tmp_path)


if __name__ == "__main__":
    as_one_of_two(check_all, check_uneven_and_compiled)
