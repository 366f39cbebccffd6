import dataclasses
import importlib.util
import math
from types import SimpleNamespace

import pytest
import torch

from tilewright.kernels import RopeScaling, rope, rope_tables

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
SCALINGS = [
    RopeScaling("linear", 4.0),
    RopeScaling("llama3", 8.0, 8192),
    RopeScaling("llama3", 32.0, 512, low_freq_factor=0.7, high_freq_factor=9.0),
    RopeScaling("yarn", 4.0, 2048),
    RopeScaling("yarn", 40.0, 4096, mscale=1.0, mscale_all_dim=0.7),
    RopeScaling("yarn", 40.0, 4096, mscale=0.707),
    RopeScaling("yarn", 16.0, 1024, beta_fast=8.0, beta_slow=2.0, attention_factor=1.3, truncate=False),
    RopeScaling("yarn", 1.0, 64),
    # Ramps past the last channel and before the first.
    RopeScaling("yarn", 2.0, 2**40),
    RopeScaling("yarn", 2.0, 2),
]


def frequencies_of(cos, sin):
    """Return the frequencies and the factor of cos and sin, from row 1 of the tables."""
    return torch.atan2(sin[1].double(), cos[1].double()), torch.hypot(sin[1].double(), cos[1].double())


@needs_transformers
@pytest.mark.parametrize("rotary_dim", [128, 32])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_scaled_frequencies_match_hugging_face(scaling, theta, rotary_dim):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    options = {name: value for name, value in dataclasses.asdict(scaling).items() if value is not None}
    parameters = options | {"rope_type": options.pop("kind"), "rope_theta": theta, "partial_rotary_factor": rotary_dim / 128}
    config = SimpleNamespace(head_dim=128, hidden_size=512, num_attention_heads=4, rope_parameters=parameters)
    config.standardize_rope_params = lambda: None
    expected, factor = ROPE_INIT_FUNCTIONS[scaling.kind](config, torch.device("cpu"))
    cos, sin = rope_tables(128, 100, theta, scaling, rotary_dim=rotary_dim)
    frequencies, factors = frequencies_of(cos, sin)
    # Hugging Face computes in float32.
    torch.testing.assert_close(frequencies, expected.double(), rtol=3e-6, atol=0)
    torch.testing.assert_close(factors, torch.full_like(factors, factor), rtol=1e-6, atol=0)
    angles = torch.outer(torch.arange(100).double(), expected.double())
    torch.testing.assert_close(cos, (angles.cos() * factor).float(), rtol=0, atol=3e-4)
    torch.testing.assert_close(sin, (angles.sin() * factor).float(), rtol=0, atol=3e-4)


def test_tables_by_hand():
    cos, sin = rope_tables(4, 3, theta=100.0)
    assert cos.shape == sin.shape == (3, 2)
    assert cos.dtype == sin.dtype == torch.float32
    expected = torch.tensor([[math.cos(p * f) for f in (1.0, 0.1)] for p in range(3)])
    assert torch.equal(cos, expected)
    assert torch.equal(sin, torch.tensor([[math.sin(p * f) for f in (1.0, 0.1)] for p in range(3)]))
    assert all(torch.equal(a, b) for a, b in zip(rope_tables(64, 9), rope_tables(64, 9, scaling=RopeScaling()), strict=True))
    assert rope_tables(4, 0)[0].shape == (0, 2)
    assert rope_tables(4, 5, device="meta")[0].device.type == "meta"


def test_far_positions_are_accurate():
    cos, sin = rope_tables(2, 2**20)
    assert cos[-1].item() == pytest.approx(math.cos(2**20 - 1), abs=1e-7)
    assert sin[-1].item() == pytest.approx(math.sin(2**20 - 1), abs=1e-7)


def test_linear_scaling_maps_multiples_of_the_factor_to_positions():
    for stretched, table in zip(rope_tables(16, 21, scaling=RopeScaling("linear", 4.0)), rope_tables(16, 6), strict=True):
        torch.testing.assert_close(stretched[::4], table)


def test_llama3_keeps_high_frequencies_and_divides_low_ones():
    scaled, plain = (frequencies_of(*rope_tables(128, 2, 5e5, s))[0] for s in (RopeScaling("llama3", 8.0, 8192), None))
    turns = 8192 * plain / (2 * math.pi)
    torch.testing.assert_close(scaled[turns > 4], plain[turns > 4])
    torch.testing.assert_close(scaled[turns < 1], plain[turns < 1] / 8)
    between = (turns > 1) & (turns < 4)
    assert between.any()
    assert ((scaled < plain) & (scaled > plain / 8))[between].all()


def test_yarn_attention_factor():
    def factor(**options):
        return frequencies_of(*rope_tables(8, 2, scaling=RopeScaling("yarn", 40.0, 4096, **options)))[1].mean().item()

    assert factor() == pytest.approx(0.1 * math.log(40) + 1)
    assert factor(mscale=0.5, mscale_all_dim=0.5) == pytest.approx(1.0)
    assert factor(attention_factor=1.25) == pytest.approx(1.25)


def test_rope_rotates_rotary_dim_channels():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16)
    y = rope(x, *rope_tables(16, 5, rotary_dim=4))
    assert torch.equal(y[..., 4:], x[..., 4:])
    assert torch.equal(y[..., :4], rope(x[..., :4], *rope_tables(4, 5)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "dynamic"}, r"kind is 'dynamic': choose 'default', 'linear', 'llama3' or 'yarn'"),
        ({"kind": "linear", "factor": 0.5}, r"factor is 0\.5: expected a finite number, 1 or more"),
        ({"kind": "linear", "factor": math.nan}, r"factor is nan"),
        ({"kind": "linear", "factor": True}, r"factor is True"),
        ({"kind": "linear", "factor": math.inf}, r"factor is inf"),
        ({"factor": 2.0}, r"factor is 2\.0: kind 'default' reads no options"),
        ({"kind": "linear", "beta_fast": 8.0}, r"beta_fast is 8\.0: kind 'linear' reads factor"),
        ({"kind": "llama3", "factor": 8.0}, r"original_max_position_embeddings is None: kind 'llama3' requires it"),
        ({"kind": "yarn", "original_max_position_embeddings": 0}, r"original_max_position_embeddings is 0"),
        ({"kind": "llama3", "original_max_position_embeddings": 9, "low_freq_factor": 4.0}, r"low_freq_factor is 4\.0"),
        ({"kind": "yarn", "original_max_position_embeddings": 9, "beta_slow": 33.0}, r"beta_slow is 33\.0, beta_fast 32\.0"),
        ({"kind": "yarn", "original_max_position_embeddings": 9, "attention_factor": -1.0}, r"attention_factor is -1\.0"),
        ({"kind": "yarn", "original_max_position_embeddings": 9, "mscale": 0.0}, r"mscale is 0\.0"),
    ],
)
def test_bad_scalings_raise(options, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(**options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 7}, r"head_dim is 7: expected an even number"),
        ({"head_dim": 0}, r"head_dim is 0: expected an integer, 2 or more"),
        ({"rotary_dim": 10}, r"rotary_dim is 10: expected an integer, 2 to 8"),
        ({"rotary_dim": 3}, r"rotary_dim is 3: expected an even number"),
        ({"num_positions": -1}, r"num_positions is -1"),
        ({"num_positions": 2.5}, r"num_positions is 2\.5"),
        ({"theta": "1e4"}, "theta is '1e4': expected a finite number above 0"),
        ({"scaling": "yarn"}, "scaling is 'yarn': expected a RopeScaling"),
        ({"theta": 0.0}, r"theta is 0\.0: expected a finite number above 0"),
        ({"theta": 1.0, "scaling": RopeScaling("yarn", 2.0, 64)}, r"theta is 1\.0: expected a finite number above 1"),
    ],
)
def test_bad_sizes_raise(change, message):
    with pytest.raises(ValueError, match=message):
        rope_tables(**{"head_dim": 8, "num_positions": 4} | change)
