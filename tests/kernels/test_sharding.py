"""Ops on DTensors in two processes, sharded along rows, channels or heads, compared with plain tensors."""

from functools import partial

import pytest
import torch
from two_processes import as_one_of_two, run_in_two_processes

from tilewright.kernels import (
    add_rms_norm,
    geglu,
    layer_norm,
    rms_norm,
    rope,
    rope_qk,
    rope_qkv,
    rope_tables,
    swiglu,
    use_backend,
)
from tilewright.kernels.dispatch import HAS_TRITON

BACKENDS = ["reference", "triton"] if HAS_TRITON else ["reference"]
ROWS, WIDTH = (2, 6), 16


def cases():
    """Yield a name, a function, the shapes of the sharded inputs, and the number of replicated weights after them."""
    rows = (*ROWS, WIDTH)
    yield "rms_norm", rms_norm, [rows], 1
    # Another eps, which must not reuse the cached sharding of the first call.
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


def rope_cases():
    """Yield functions of (*tensors, cos, sin, positions), with the shapes of the tensors and the dimensions to shard."""
    heads, tokens = (2, 4, 6, 8), (2, 2, 6, 8)
    yield lambda x, *tables: rope(x, *tables), [heads], (0, 1, 2)
    yield lambda q, k, *tables: rope_qk(q, k, *tables), [heads, tokens], (0, 1, 2)
    yield lambda q, k, *tables: rope_qk(q, k, *tables, layout="half"), [heads, tokens], (1,)
    yield lambda qkv, cos, sin, positions: rope_qkv(qkv, cos, sin, 4, 2, positions), [(2, 6, 64)], (0, 1)
    # Batch, tokens and heads that do not divide evenly.
    yield lambda x, *tables: rope(x, *tables), [(3, 5, 7, 8)], (0, 1, 2)


def gradients(function, inputs, wanted, tables=()):
    """Return the results and the gradients of the `wanted` inputs."""
    leaves = [x.detach().requires_grad_(is_wanted) for x, is_wanted in zip(inputs, wanted, strict=True)]
    results = function(*leaves, *tables)
    results = results if isinstance(results, tuple) else (results,)
    wanted_leaves = [x for x in leaves if x.requires_grad]
    return *(y.detach() for y in results), *torch.autograd.grad(sum((y * y.cos()).sum() for y in results), wanted_leaves)


def check_rows_and_channels():
    """Run `cases` as one of two processes."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    for backend in BACKENDS:
        for name, function, shapes, num_weights in cases():
            torch.manual_seed(0)
            inputs = [torch.randn(shape) for shape in shapes] + [torch.randn(WIDTH) for _ in range(num_weights)]
            only_last = [False] * (len(inputs) - 1) + [True]
            only_first = [True] + [False] * (len(inputs) - 1)
            # Shard the sequence and the batch; for elementwise ops the channels too.
            dims = (1, 0, 2) if name in ("swiglu", "geglu", "geglu erf") else (1, 0)
            for dim in dims if backend == BACKENDS[-1] else dims[:1]:
                placements = [Shard(dim)] * len(shapes) + [Replicate()] * num_weights
                sharded = [distribute_tensor(x, mesh, [p]) for x, p in zip(inputs, placements, strict=True)]
                for wanted in ([True] * len(inputs), only_first, only_last)[: 3 if dim == dims[0] else 1]:
                    with use_backend(backend):
                        actual = gradients(function, sharded, wanted)
                    with use_backend("reference"):
                        expected = gradients(function, inputs, wanted)
                    case = f"{backend} {name} sharded along {dim}, {wanted}"
                    assert actual[0].placements == (Shard(dim),), f"{case}: the result has {actual[0].placements}"
                    for a, b in zip(actual, expected, strict=True):
                        torch.testing.assert_close(a.full_tensor(), b, msg=lambda text, case=case: f"{case}: {text}")


def check_rope():
    """Run `rope_cases` as one of two processes."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    for i, (function, shapes, dims) in enumerate(rope_cases()):
        torch.manual_seed(0)
        inputs = [torch.randn(shape) for shape in shapes]
        wanted = [True] * len(inputs)
        batch, tokens = shapes[0][0], shapes[0][-2]
        for positions in (None, torch.randint(-2, 9, (batch, tokens))):
            tables = [*rope_tables(8, 9), positions]
            with use_backend("reference"):
                expected = gradients(function, inputs, wanted, tables)
            replicated = [None if t is None else distribute_tensor(t, mesh, [Replicate()]) for t in tables]
            for dim in dims:
                sharded = [distribute_tensor(x, mesh, [Shard(dim)]) for x in inputs]
                for backend in BACKENDS:
                    with use_backend(backend):
                        actual = gradients(function, sharded, wanted, replicated)
                    case = f"{backend} rope {i} along {dim}, {'no ' if positions is None else ''}positions"
                    # Without positions, tokens cannot be sharded.
                    if dim != len(shapes[0]) - 2 or positions is not None:
                        assert actual[0].placements[0].is_shard(), f"{case}: the result has {actual[0].placements}"
                    for a, b in zip(actual, expected, strict=True):
                        torch.testing.assert_close(a.full_tensor(), b, msg=lambda text, case=case: f"{case}: {text}")


def check_uneven_and_compiled():
    """Run a sequence that does not divide evenly, and a compiled function, as one of two processes."""
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
def test_ops_on_dtensors_equal_plain_tensors(tmp_path):
    run_in_two_processes(__file__, tmp_path)


if __name__ == "__main__":
    as_one_of_two(check_rows_and_channels, check_rope, check_uneven_and_compiled)
