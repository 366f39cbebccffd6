"""RoPE on DTensors in two processes, against the same on plain tensors."""

import pytest
import torch
from two_processes import as_one_of_two, run_in_two_processes

from tilewright.kernels import rope, rope_qk, rope_qkv, rope_tables, use_backend
from tilewright.kernels.dispatch import HAS_TRITON

BACKENDS = ["reference", "triton"] if HAS_TRITON else ["reference"]


def cases():
    """Yield a function of tensors, cos, sin and positions, the shapes of the tensors, and the dimensions to shard along."""
    heads, tokens = (2, 4, 6, 8), (2, 2, 6, 8)
    yield lambda x, *tables: rope(x, *tables), [heads], (0, 1, 2)
    yield lambda q, k, *tables: rope_qk(q, k, *tables), [heads, tokens], (0, 1, 2)
    yield lambda q, k, *tables: rope_qk(q, k, *tables, layout="half"), [heads, tokens], (0, 1, 2)
    yield lambda qkv, cos, sin, positions: rope_qkv(qkv, cos, sin, 4, 2, positions), [(2, 6, 64)], (0, 1)
    # A batch, tokens and heads that do not divide.
    yield lambda x, *tables: rope(x, *tables), [(3, 5, 7, 8)], (0, 1, 2)


def gradients(function, inputs, tables):
    """Return the results and the gradients of the inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    results = function(*leaves, *tables)
    results = results if isinstance(results, tuple) else (results,)
    return *(y.detach() for y in results), *torch.autograd.grad(sum((y * y.cos()).sum() for y in results), leaves)


def check_all():
    """Run all cases as one of two processes."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    for i, (function, shapes, dims) in enumerate(cases()):
        torch.manual_seed(0)
        inputs = [torch.randn(shape) for shape in shapes]
        batch, tokens = shapes[0][0], shapes[0][-2]
        for positions in (None, torch.randint(-2, 9, (batch, tokens))):
            tables = [*rope_tables(8, 9), positions]
            with use_backend("reference"):
                expected = gradients(function, inputs, tables)
            replicated = [None if t is None else distribute_tensor(t, mesh, [Replicate()]) for t in tables]
            for dim in dims:
                sharded = [distribute_tensor(x, mesh, [Shard(dim)]) for x in inputs]
                for backend in BACKENDS:
                    with use_backend(backend):
                        actual = gradients(function, sharded, replicated)
                    case = f"{backend} {i} along {dim}, {'no ' if positions is None else ''}positions"
                    # Without positions a part of the tokens does not know where it stands.
                    if dim != len(shapes[0]) - 2 or positions is not None:
                        assert actual[0].placements[0].is_shard(), f"{case}: the result has {actual[0].placements}"
                    for a, b in zip(actual, expected, strict=True):
                        torch.testing.assert_close(a.full_tensor(), b, msg=lambda text, case=case: f"{case}: {text}")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_rope_on_dtensors_equals_that_on_plain_tensors(tmp_path):
    run_in_two_processes(__file__, tmp_path)


if __name__ == "__main__":
    as_one_of_two(check_all)
