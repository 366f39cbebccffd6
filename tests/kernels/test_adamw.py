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


def drawn(device, shapes=((3, 700), (5,), (1, 1, 1029)), firsts=(0, 3, 6)):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator).bfloat16().to(device) for shape in shapes]
    of = RoundedWeights(weights, firsts, range(len(weights)), seed=2**62 + 3)
    count = sum(weight.numel() for weight in weights)
    moments = [torch.rand(count, generator=generator).to(device) * 0.01 for _ in range(2)]
    gradient = torch.randn(count, generator=generator).bfloat16().to(device)
    return of, gradient, *moments


def stepped(of, gradient, mean, square, skip=False, step=7.0):
    device = gradient.device
    scalars = torch.tensor(1e-3, device=device), torch.tensor(step, device=device), torch.tensor(skip, device=device)
    adamw_rounded_(of, of.table(), gradient, mean, square, *scalars, **OPTIONS)
    return [*of.weights, mean, square]


@pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot be imported")
@pytest.mark.parametrize("skip", [False, True])
def test_the_kernel_is_the_reference(device, skip):
    with use_backend("triton"):
        found = stepped(*drawn(device), skip=skip)
    with use_backend("reference"):
        expected = stepped(*drawn(device), skip=skip)
    # A GPU fuses products with sums, so that a value may come to lie on the other side of its random bits.
    exact = device.type == "cpu"
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 2**-7, "atol": 1e-6}
    torch.testing.assert_close(found, expected, **tolerance)
    of, _, mean, square = drawn(device)
    unchanged = all(map(torch.equal, found, [*of.weights, mean, square]))
    assert unchanged == skip


@pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot be imported")
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_nan_of_any_bits_stays_one(device, backend):
    of, gradient, mean, square = drawn(device)
    # That of NVIDIA's GPUs, and one that is infinity but for its last bit.
    mean[:2800:2] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    mean[1:2800:2] = torch.tensor(0x7F800001, dtype=torch.int32).view(torch.float32)
    with use_backend(backend):
        *weights, _, _ = stepped(of, gradient, mean, square)
    assert weights[0].isnan().all()


def test_it_is_adamw_as_far_as_bfloat16_goes():
    of, gradient, *_ = drawn(torch.device("cpu"))
    mean, square = torch.zeros_like(gradient.float()), torch.zeros_like(gradient.float())
    sizes = [weight.numel() for weight in of.weights]
    expected = [torch.nn.Parameter(weight.float()) for weight in of.weights]
    theirs = torch.optim.AdamW(expected, lr=1e-3, **OPTIONS)
    for parameter, part in zip(expected, gradient.float().split(sizes), strict=True):
        parameter.grad = part.view(parameter.shape)
    theirs.step()
    stepped(of, gradient, mean, square, step=1.0)
    for weight, parameter in zip(of.weights, expected, strict=True):
        # Between the two neighbours of the exact value.
        torch.testing.assert_close(weight.float(), parameter.detach(), rtol=2**-7, atol=1e-6)
    assert torch.equal(mean, torch.cat([theirs.state[p]["exp_avg"].flatten() for p in expected]))


def test_shards_are_rounded_as_the_whole_is():
    whole, gradient, mean, square = drawn(torch.device("cpu"), shapes=((7, 9),), firsts=(0,))
    rows = [whole.weights[0][:3].clone(), whole.weights[0][3:].clone()]
    parts = [tensor.split([27, 36]) for tensor in (gradient, mean, square)]
    for row, first, *columns in zip(rows, (0, 27), *parts, strict=True):
        stepped(RoundedWeights([row], [first], [0], whole.seed), columns[0], columns[1].clone(), columns[2].clone())
    assert torch.equal(torch.cat(rows), stepped(whole, gradient, mean, square)[0])


def test_the_mean_of_what_is_rounded_is_the_value():
    values = torch.tensor([1.0 + 2**-9, -1.0 - 2**-10, 3.3e-5, -0.7, 1.0, float("inf")])
    count = 1 << 14
    random = random_bits_reference(5, 1, torch.tensor(3), 0, count * len(values)).view(count, -1)
    rounded = round_stochastically_reference(values.expand(count, -1).contiguous(), random).float()
    assert rounded[:, -1].isposinf().all()
    nan = torch.tensor([0x7FFFFFFF, 0x7F800001], dtype=torch.int32).view(torch.float32)
    assert round_stochastically_reference(nan, torch.tensor([0xFFFF, 0])).isnan().all()
    assert (rounded[:, 4] == 1).all()
    # Up or down by a gap at most 2^-7 of the value: a deviation of at most half of it a draw.
    error = (rounded.double().mean(0)[:-1] - values.double()[:-1]).abs() / values.double()[:-1].abs()
    assert (error < 4 * 2**-8 / count**0.5).all()
    assert all(len(rounded[:, i].unique()) == 2 for i in range(4))


def test_random_bits_are_philoxs_and_differ_by_seed_stream_step_and_place():
    def bits(seed=0, stream=0, step=0, first=0):
        return random_bits_reference(seed, stream, torch.tensor(step), first, 8)

    # The known answer of Random123 for philox4x32-10 with a counter and a key of zeros.
    assert bits()[:4].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    for change in ({"seed": 1}, {"seed": 2**32}, {"stream": 1}, {"step": 1}, {"first": 8}):
        assert not (bits(**change) == bits()).any()
    assert torch.equal(bits(first=3)[:5], bits()[3:])


def test_weights_of_another_dtype_are_refused():
    with pytest.raises(ValueError, match=r"a weight is of torch.float32, strides \(1,\): it must be contiguous bfloat16"):
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
report = inspect(kernel_case(launches[0], "adamw"), sys.argv[1])
print(json.dumps([report.spilled_bytes, report.registers]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot be imported")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_it_compiles_without_a_spill(architecture):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    shown = subprocess.run([sys.executable, "-c", SCRIPT, architecture], capture_output=True, text=True, env=environment)
    assert shown.returncode == 0, shown.stderr[-2000:]
    spilled, registers = json.loads(shown.stdout)
    assert spilled == 0
    assert registers <= 128
