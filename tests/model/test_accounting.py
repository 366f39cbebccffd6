import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from tilewright.model import MODELS, ModelConfig, TransformerLM
from tilewright.model.accounting import (
    forward_flops,
    forward_flops_by_group,
    model_flops_utilisation,
    num_parameters,
    parameters_by_group,
    training_flops_per_token,
)

# CS336 assignment 1, transformer_accounting: untied embeddings, three feed-forward matrices of 4 d_model, context 1,024.
FORWARD_FLOPS = {
    "gpt2-small": (349_630_365_696, (16.58, 11.06, 49.75, 22.61)),
    "gpt2-medium": (1_033_109_504_000, (19.96, 9.98, 59.87, 10.20)),
    "gpt2-large": (2_257_754_521_600, (21.40, 8.56, 64.20, 5.84)),
    "gpt2-xl": (4_513_336_524_800, (22.30, 7.14, 66.91, 3.65)),
}


@pytest.mark.parametrize(("name", "expected"), FORWARD_FLOPS.items())
def test_forward_flops_of_the_gpt2_shapes(name, expected):
    total, shares = expected
    groups = forward_flops_by_group(MODELS[name])
    assert forward_flops(MODELS[name]) == sum(groups.values()) == total
    assert tuple(round(100 * flops / total, 2) for flops in groups.values()) == shares


def test_forward_flops_at_a_longer_context():
    long = forward_flops(MODELS["gpt2-xl"], 16_384)
    assert long == 149_522_795_724_800
    assert round(long / forward_flops(MODELS["gpt2-xl"]), 2) == 33.13


def test_parameters_of_gpt2_xl():
    assert num_parameters(MODELS["gpt2-xl"]) == 2_127_057_600
    assert num_parameters(dataclasses.replace(MODELS["gpt2-xl"], d_ff=4288)) == 1_640_452_800


SMALL = st.builds(
    lambda heads, groups, half_dim, **rest: ModelConfig(
        d_model=heads * groups * 2 * half_dim, num_heads=heads * groups, num_kv_heads=heads, **rest
    ),
    heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    half_dim=st.integers(1, 4),
    vocab_size=st.integers(2, 40),
    context_length=st.integers(2, 12),
    num_layers=st.integers(1, 3),
    d_ff=st.integers(1, 30),
    tie_embeddings=st.booleans(),
)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(config=SMALL, batch_size=st.integers(1, 3))
def test_equal_to_pytorchs_own_counts(config, batch_size):
    with torch.device("meta"):
        model = TransformerLM(config)
        tokens = torch.zeros(batch_size, config.context_length, dtype=torch.long)
    assert num_parameters(config) == sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter:
        logits = model(tokens)
        forward = counter.get_total_flops()
        logits.sum().backward()
    assert forward == batch_size * forward_flops(config)
    assert counter.get_total_flops() == batch_size * training_flops_per_token(config) * config.context_length


def test_a_tied_head_has_no_parameters_but_all_its_flops():
    tied = dataclasses.replace(MODELS["gpt2-small"], tie_embeddings=True)
    assert parameters_by_group(tied)["head"] == 0
    assert forward_flops(tied) == forward_flops(MODELS["gpt2-small"])


def test_utilisation_needs_a_peak():
    config = MODELS["gpt2-small"]
    assert model_flops_utilisation(config, 1e5, None) is None
    assert model_flops_utilisation(config, 1e5, 1e15) == pytest.approx(3 * 349_630_365_696 / 1024 * 1e5 / 1e15)
