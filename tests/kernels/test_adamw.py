import json
import os
import subprocess
import sys

import pytest
import torch

from tilewright.kernels import use_backend
from tilewright.kernels.adamw import RoundedWeights, adamw_rounded_
from tilewright.kernels.dispatch import HAS_TRITON
from tilewright.kernels.stochastic_rounding import random_bits_reference, round_stochastically_reference

OPTIONS = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def random_inputs(device, shapes=((3, 700), (5,), (1, 1, 1029)), firsts=(0, 3, 6)):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator).bfloat16().to(device) for shape in shapes]
    of = RoundedWeights(weights, firsts, range(len(weights)), seed=2**62 + 3)
    count = sum(weight.numel() for weight in weights)
    moments = [torch.rand(count, generator=generator).to(device) * 0.01 for _ in range(2)]
    gradient = torch.randn(count, generator=generator).bfloat16().to(device)
    return of, gradient, *moments


def run_step(of, gradient, mean, square, skip=False, step=7.0):
    device = gradient.device
    scalars = torch.tensor(1e-3, device=device), torch.tensor(step, device=device), torch.tensor(skip, device=device)
    adamw_rounded_(of, of.table(), gradient, mean, square, *scalars, **OPTIONS)
    return [*of.weights, mean, square]


@pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot be imported")
@pytest.mark.parametrize("skip", [False, True])
def test_kernel_equals_reference(device, skip):
    with use_backend("triton"):
        found = run_step(*random_inputs(device), skip=skip)
    with use_backend("reference"):
        expected = run_step(*random_inputs(device), skip=skip)
    # A GPU contracts multiply-adds, so that a value may round to the other side.
    exact = device.type == "cpu"
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 2**-7, "atol": 1e-6}
    torch.testing.assert_close(found, expected, **tolerance)
    of, _, mean, square = random_inputs(device)
    unchanged = all(map(torch.equal, found, [*of.weights, mean, square]))
    assert unchanged == skip


@pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot be imported")
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_any_nan_gives_nan(device, backend):
    of, gradient, mean, square = random_inputs(device)
    # The NaN of NVIDIA's GPUs, and the NaN that differs from infinity in one bit.
    mean[:2800:2] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    mean[1:2800:2] = torch.tensor(0x7F800001, dtype=torch.int32).view(torch.float32)
    with use_backend(backend):
        *weights, _, _ = run_step(of, gradient, mean, square)
    assert weights[0].isnan().all()


def test_equals_adamw_to_bfloat16_rounding():
    of, gradient, *_ = random_inputs(torch.device("cpu"))
    mean, square = torch.zeros_like(gradient.float()), torch.zeros_like(gradient.float())
    sizes = [weight.numel() for weight in of.weights]
    expected = [torch.nn.Parameter(weight.float()) for weight in of.weights]
    theirs = torch.optim.AdamW(expected, lr=1e-3, **OPTIONS)
    for parameter, part in zip(expected, gradient.float().split(sizes), strict=True):
        parameter.grad = part.view(parameter.shape)
    theirs.step()
    run_step(of, gradient, mean, square, step=1.0)
    for weight, parameter in zip(of.weights, expected, strict=True):
        # The rounded value is one of the two neighbors of the exact value.
        torch.testing.assert_close(weight.float(), parameter.detach(), rtol=2**-7, atol=1e-6)
    assert torch.equal(mean, torch.cat([theirs.state[p]["exp_avg"].flatten() for p in expected]))


def test_shards_round_like_the_full_parameter():
    whole, gradient, mean, square = random_inputs(torch.device("cpu"), shapes=((7, 9),), firsts=(0,))
    rows = [whole.weights[0][:3].clone(), whole.weights[0][3:].clone()]
    parts = [tensor.split([27, 36]) for tensor in (gradient, mean, square)]
    for row, first, *columns in zip(rows, (0, 27), *parts, strict=True):
        run_step(RoundedWeights([row], [first], [0], whole.seed), columns[0], columns[1].clone(), columns[2].clone())
    assert torch.equal(torch.cat(rows), run_step(whole, gradient, mean, square)[0])


def test_mean_of_rounded_values_is_the_value():
    values = torch.tensor([1.0 + 2**-9, -1.0 - 2**-10, 3.3e-5, -0.7, 1.0, float("inf")])
    count = 1 << 14
    random = random_bits_reference(5, 1, torch.tensor(3), 0, count * len(values)).view(count, -1)
    rounded = round_stochastically_reference(values.expand(count, -1).contiguous(), random).float()
    assert rounded[:, -1].isposinf().all()
    nan = torch.tensor([0x7FFFFFFF, 0x7F800001], dtype=torch.int32).view(torch.float32)
    assert round_stochastically_reference(nan, torch.tensor([0xFFFF, 0])).isnan().all()
    assert (rounded[:, 4] == 1).all()
    # Neighbors differ by at most 2^-7 of the value, so the standard deviation of a draw is at most half of that.
    error = (rounded.double().mean(0)[:-1] - values.double()[:-1]).abs() / values.double()[:-1].abs()
    assert (error < 4 * 2**-8 / count**0.5).all()
    assert all(len(rounded[:, i].unique()) == 2 for i in range(4))


def test_random_bits_are_philox_and_depend_on_seed_stream_step_and_index():
    def bits(seed=0, stream=0, step=0, first=0):
        return random_bits_reference(seed, stream, torch.tensor(step), first, 8)

    # The known answer of Random123 for philox4x32-10 with a counter and a key of zeros.
    assert bits()[:4].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    for change in ({"seed": 1}, {"seed": 2**32}, {"stream": 1}, {"step": 1}, {"first": 8}):
        assert not (bits(**change) == bits()).any()
    assert torch.equal(bits(first=3)[:5], bits()[3:])


def test_other_dtypes_raise():
    with pytest.raises(ValueError, match=r"weight has dtype torch.float32, strides \(1,\): expected contiguous bfloat16"):
        RoundedWeights([torch.zeros(2)], [0], [0], 0)


SCRIPT = """
import json, sys, torch
from tilewright.kernels.adamw import RoundedWeights, adamw_rounded_
from tilewright.kernels.inspect import inspect, kernel_case
from tilewright.kernels.launch import recording
with torch.device("meta"), recording((9, 0)) as launches:
    of = RoundedWeights([torch.empty(4096, dtype=torch.bfloat16)], [0], [0], 0)
    table, scalar = torch.empty(4, 6, dtype=torch.int64), torch.empty(())
    flat = torch.empty(4096)
    adamw_rounded_(of, table, flat.bfloat16(), flat, flat, scalar, scalar, scalar.bool(), betas=(0.9, 0.95), eps=1e-8,
                   weight_decay=0.1)
reports = [inspect(kernel_case(launches[0], "adamw"), architecture) for architecture in ("sm_80", "sm_90", "sm_100")]
print(json.dumps([[report.spilled_bytes, report.registers] for report in reports]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot be imported")
def test_compiles_without_spills():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr[-2000:]
    for spilled, registers in json.loads(process.stdout):
        assert spilled == 0
        assert registers <= 128
