import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from tilewright.model import ModelConfig, TransformerLM
from tilewright.model.accounting import (
    Policy,
    conventions,
    generation,
    hardware_flops,
    model_flops,
    num_active_parameters,
    num_parameter_tensors,
    num_parameters,
    operations,
)
from tilewright.model.accounting.experts import experts_used

SMALL = ModelConfig(128, 24, d_model=32, num_layers=2, num_heads=4, d_ff=40, num_experts=5)


@settings(max_examples=8)
@given(
    num_experts=st.integers(2, 6),
    experts_per_token=st.integers(2, 6),
    width=st.sampled_from([8, 24]),
    d_ff=st.sampled_from([8, 40]),
    size=st.integers(1, 3),
    checkpointed=st.integers(0, 2),
    norm=st.sampled_from(["pre", "sandwich", "post", "none"]),
)
def test_parameters_and_flops_match_pytorch(num_experts, experts_per_token, width, d_ff, size, checkpointed, norm):
    k = min(num_experts, experts_per_token)
    config = ModelConfig(
        128, 6, width, num_layers=2, num_heads=2, d_ff=d_ff, num_experts=num_experts, experts_per_token=k, norm=norm
    )
    with torch.device("meta"):
        model, tokens = TransformerLM(config), torch.zeros(size, 6, dtype=torch.long)
    model.activation_checkpointing = checkpointed
    shapes = [parameter.shape for parameter in model.parameters()]
    assert num_parameters(config) == sum(map(math.prod, shapes))
    assert num_parameter_tensors(config) == len(shapes)
    assert num_parameters(config) - num_active_parameters(config) == 2 * (num_experts - k) * 3 * width * d_ff
    with FlopCounterMode(display=False) as counter:
        model.loss(tokens, tokens).backward()
    ops = operations(config, size, policy=Policy(checkpointing=checkpointed))
    # On the meta device PyTorch's naive attention saves its scores.
    recomputed = sum(op.recomputed_flops for op in ops if op.group == "attention")
    assert counter.get_total_flops() in (hardware_flops(ops), hardware_flops(ops) - recomputed)
    experts = [op for op in ops if op.name in ("gate_up_proj", "down_proj")]
    assert sum(op.flops for op in experts) == 2 * 3 * size * 6 * k * 2 * 3 * width * d_ff
    assert model_flops(ops) <= hardware_flops(ops)


def test_decoding_reads_only_the_selected_experts():
    wide = dataclasses.replace(SMALL, d_ff=4096)
    costs = {size: generation(wide, 1, size) for size in (1, 1000)}
    expert = 3 * 32 * 4096
    # One token reads k experts per layer, many tokens read all experts.
    assert costs[1].bytes_per_step == pytest.approx(2 * 2 * 2 * expert, rel=0.1)
    read = 2 * 2 * 5 * expert
    activations = 2 * 1000 * 2 * 2 * (2 * 4096 * 2 + 4096 * 2)
    assert costs[1000].bytes_per_step == pytest.approx(read + activations, rel=0.1)
    assert costs[1].flops_per_token == costs[1000].flops_per_token


def test_expected_number_of_experts_used():
    assert [experts_used(8, 2, 1), experts_used(4, 4, 3)] == [2, 4]
    assert experts_used(8, 2, 2) == pytest.approx(2 + 6 * 2 / 8)
    assert experts_used(8, 2, 10_000) == pytest.approx(8)


def test_conventions_count_active_parameters():
    by_name = {convention.name: convention.flops_per_token for convention in conventions(SMALL)}
    assert by_name["6N"] == 6 * (num_parameters(SMALL) - 2 * 3 * 3 * 32 * 40)
