import copy
import dataclasses
import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from handout import HandoutLM
from model_shapes import GEMMA, any_shape
from tilewright.errors import UserError
from tilewright.kernels import cross_entropy, use_backend
from tilewright.model import MODELS, ModelConfig, TransformerLM
from tilewright.model.accounting import (
    HANDOUT,
    Policy,
    attended_pairs,
    conventions,
    forward_flops,
    forward_flops_by_group,
    hardware_flops,
    model_flops,
    model_flops_utilisation,
    num_parameter_tensors,
    num_parameters,
    operations,
    pad_vocabulary,
    parameters_by_group,
    training_flops_per_token,
)
from tilewright.model.accounting.flops import num_weights
from tilewright.model.config import Norm

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


PADDED = Policy(vocabulary="padded")


def counted(model, tokens, loss):
    with FlopCounterMode(display=False) as counter:
        result = loss(model, tokens)
        forward = counter.get_total_flops()
        result.backward()
    return forward, counter.get_total_flops()


def check_against_pytorch(config, batch_size):
    with torch.device("meta"):
        model = TransformerLM(config)
        tokens = torch.zeros(batch_size, config.context_length, dtype=torch.long)
    # PyTorch counts all query-key pairs, whatever the mask.
    everything = dataclasses.replace(PADDED, window=config.context_length)
    shapes = [p.shape for p in model.parameters()]
    padding = config.padded_vocab_size - config.vocab_size
    embeddings = 1 if config.tie_embeddings else 2
    assert num_parameters(config) == sum(map(math.prod, shapes)) - embeddings * padding * config.d_model
    assert num_weights(config, everything) == sum(map(math.prod, shapes))
    assert num_parameter_tensors(config) == len(shapes)
    forward, total = counted(model, tokens, lambda model, tokens: model(tokens).sum())
    ops = operations(config, batch_size, policy=everything)
    wasted = 2 * tokens.numel() * config.d_model * padding
    assert sum(op.padding_flops for op in ops) == wasted
    assert forward - wasted == sum(op.forward_flops for op in ops)
    assert total - 3 * wasted == model_flops(ops)
    scores = sum(op.recomputed_flops for op in ops if op.group == "attention")
    assert hardware_flops(ops) == total + scores
    assert conventions(config, policy=PADDED)[-1].flops_per_token == hardware_flops(ops) / tokens.numel()
    # Model FLOPs exclude the pairs outside the windows.
    masked = operations(config, batch_size)
    hidden = sum(forward_flops_by_group(config, window=window)["attention"] * sign
                 for window, sign in ((config.context_length, 1), (None, -1)))  # fmt: skip
    assert model_flops(masked) == model_flops(ops) - 3 * batch_size * hidden
    assert model_flops(masked) == 3 * batch_size * forward_flops(config)
    assert training_flops_per_token(config) == model_flops(masked) / tokens.numel()
    assert model_flops_utilisation(config, 10.0, 1e9) == model_flops(masked) / tokens.numel() / 1e8


@settings(derandomize=True, deadline=None, max_examples=25)
@given(config=any_shape(), batch_size=st.integers(1, 3))
def test_flops_match_pytorchs_counter(config, batch_size):
    check_against_pytorch(config, batch_size)


def test_tied_head_adds_flops_but_no_parameters():
    tied = dataclasses.replace(MODELS["gpt2-small"], tie_embeddings=True)
    assert parameters_by_group(tied)["head"] == 0
    assert forward_flops(tied) == forward_flops(MODELS["gpt2-small"])


def test_mfu_needs_a_peak():
    config = MODELS["gpt2-small"]
    assert model_flops_utilisation(config, 1e5, None) is None
    assert model_flops_utilisation(config, 1e5, 1e15) == pytest.approx(3 * 349_630_365_696 / 1024 * 1e5 / 1e15)


LLAMA3_8B = ModelConfig(128_256, 8192, d_model=4096, num_layers=32, num_heads=32, num_kv_heads=8, d_ff=14_336)


@pytest.mark.parametrize("config", [MODELS["gpt2-small"], dataclasses.replace(MODELS["gpt2-xl"], d_ff=4288), LLAMA3_8B])
def test_known_shapes_match_pytorchs_counter(config):
    check_against_pytorch(config, 2)


# Vocabulary, context, d_model, layers, heads, d_ff from each config.json, and the parameter count of the weights.
GEMMA_NORMS: dict[str, Any] = {"norm": "sandwich", "unit_offset_norms": True, "scale_embeddings": True}
PUBLISHED = {
    "Llama 3.1 8B": (8_030_261_248, LLAMA3_8B),
    "Mistral 7B v0.1": (7_241_732_096, ModelConfig(32_000, 32_768, 4096, 32, 32, 14_336, num_kv_heads=8, window=4096)),
    "Qwen2.5 0.5B": (
        494_032_768,
        ModelConfig(151_936, 32_768, 896, 24, 14, 4864, num_kv_heads=2, qkv_bias=True, tie_embeddings=True),
    ),
    "Qwen3 0.6B": (
        596_049_920,
        ModelConfig(151_936, 40_960, 1024, 28, 16, 3072, num_kv_heads=8, head_dim=128, qk_norm=True, tie_embeddings=True),
    ),
    "Gemma 2 2B": (
        2_614_341_888,
        ModelConfig(
            256_000, 8192, 2304, 26, 8, 9216, num_kv_heads=4, head_dim=256, window=4096, window_pattern="LG",
            tie_embeddings=True, ffn="geglu_tanh", attention_softcap=50.0, logit_softcap=30.0, **GEMMA_NORMS,
        ),
    ),
    "Gemma 3 1B": (
        999_885_952,
        ModelConfig(
            262_144, 32_768, 1152, 26, 4, 6912, num_kv_heads=1, head_dim=256, window=512, window_pattern="LLLLLG",
            local_rope_theta=1e4, rope_theta=1e6, tie_embeddings=True, ffn="geglu_tanh", qk_norm=True, **GEMMA_NORMS,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("count", "config"), PUBLISHED.values(), ids=list(PUBLISHED))
def test_parameters_of_published_models(count, config):
    assert num_parameters(config) == count


def test_forward_flops_of_gemma3_1b_by_hand():
    _, config = PUBLISHED["Gemma 3 1B"]
    # Layers 6, 12, 18 and 24 of 26 are global; q and output have width 1024, k and v width 256, the stream width 1152.
    groups = forward_flops_by_group(config)
    tokens = 32_768
    assert groups["projections"] == tokens * 26 * 2 * 1152 * (2 * 1024 + 2 * 256)
    assert groups["attention"] == tokens * 4 * 1024 * (22 * 512 + 4 * tokens)
    assert groups["feed-forward"] == tokens * 26 * 6 * 1152 * 6912
    assert groups["head"] == tokens * 2 * 1152 * 262_144
    local, whole = 512 * 513 // 2 + (tokens - 512) * 512, tokens * (tokens + 1) // 2
    assert forward_flops_by_group(config, exact_causal=True)["attention"] == 4 * 1024 * (22 * local + 4 * whole)
    # An explicit window overrides the windows of the layers.
    assert forward_flops_by_group(config, window=64)["attention"] == tokens * 4 * 1024 * 26 * 64


def test_forward_flops_of_the_2026_handout():
    assert round(forward_flops(dataclasses.replace(MODELS["gpt2-xl"], d_ff=4288)) / 1e12, 3) == 3.517


def test_the_products_of_a_layer_of_gpt2_xl():
    flops = {op.name: op.forward_flops for op in operations(MODELS["gpt2-xl"], policy=HANDOUT) if op.layer == 7}
    assert flops["q_proj"] + flops["k_proj"] + flops["v_proj"] == 15_728_640_000
    assert flops["scores"] == flops["values"] == 3_355_443_200
    assert flops["output_proj"] == 5_242_880_000
    assert flops["w1"] + flops["w3"] == 41_943_040_000
    assert flops["w2"] == 20_971_520_000
    assert sum(flops.values()) == 90_596_966_400


@pytest.mark.parametrize(
    ("loss", "checkpointing"),
    [("whole", "none"), ("chunked", "none"), ("whole", "block"), ("chunked", "block"), ("chunked", 1)],
)
@pytest.mark.parametrize("form", [{}, {"norm": "post"}, {"norm": "none", "rope": False, "ffn": "silu"}, GEMMA])
def test_flop_counter_covers_our_ops(loss, form, checkpointing):
    config = ModelConfig(97, 24, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=44, **form)

    def loss_of(model, tokens):
        return cross_entropy(model(tokens), tokens) if loss == "whole" else model.loss(tokens, tokens)

    # FLOPs depend only on shapes; initialization alone needs real values.
    fake, model = FakeTensorMode(), TransformerLM(config)
    model.activation_checkpointing = checkpointing
    with FakeCopyMode(fake):
        model = copy.deepcopy(model)
    with use_backend("triton"), fake:
        tokens = torch.zeros(2, 24, dtype=torch.long)
        _, total = counted(model, tokens, loss_of)
    # Our attention is counted like PyTorch's: the backward pass recomputes the scores.
    policy = dataclasses.replace(PADDED, checkpointing=checkpointing, window=24)
    assert total == hardware_flops(operations(config, 2, policy=policy))


def test_every_op_registers_a_flop_formula():
    names = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("tilewright::")}
    assert len(names) >= 10
    missing = {name for name in names if getattr(torch.ops.tilewright, name.split("::")[1]) not in flop_registry}
    assert not missing


def test_flash_attention_flops_match_pytorchs():
    config, batch = LLAMA3_8B, 2
    q = (batch, config.num_heads, config.context_length, config.head_width)
    forward, backward = sdpa_flop_count(q, q, q), sdpa_backward_flop_count(q, q, q, q)
    attention = next(op for op in operations(config, batch) if op.group == "attention")
    assert forward == attention.forward_flops
    assert backward == attention.backward_flops + attention.recomputed_flops


def test_windows_and_exact_causality():
    for tokens, window in ((1, None), (7, None), (7, 1), (7, 3), (7, 7), (7, 20)):
        seen = [min(i + 1, window or tokens) for i in range(tokens)]
        assert attended_pairs(tokens, window, exact_causal=True) == sum(seen)
        assert attended_pairs(tokens, window) == tokens * min(tokens, window or tokens)
    config = MODELS["gpt2-xl"]
    full, exact = (forward_flops_by_group(config, exact_causal=exact)["attention"] for exact in (False, True))
    assert 2 * 1024 * exact == 1025 * full
    assert forward_flops_by_group(config, 16_384, window=1024)["attention"] == 16 * full


def test_shares_at_16k():
    groups = forward_flops_by_group(MODELS["gpt2-xl"], 16_384)
    assert [round(100 * flops / sum(groups.values()), 2) for flops in groups.values()] == [10.77, 55.15, 32.32, 1.76]


@pytest.mark.parametrize("checkpointed", [1, 2, 3])
@pytest.mark.parametrize("norm", get_args(Norm))
def test_recomputation_counts_only_as_hardware_flops(norm, checkpointed):
    config = dataclasses.replace(MODELS["gpt2-small"], norm=norm, num_layers=3)
    whole = operations(config, 1, policy=HANDOUT)
    assert hardware_flops(whole) == model_flops(whole)
    ops = operations(config, 1, policy=dataclasses.replace(HANDOUT, checkpointing=checkpointed))
    assert model_flops(ops) == model_flops(whole)
    with torch.device("meta"):
        model = HandoutLM(config, checkpointed)
        tokens = torch.zeros(1, config.context_length, dtype=torch.long)
    # Recomputation stops before a block's last product, unless a norm follows it.
    _, total = counted(model, tokens, lambda model, tokens: model.loss(tokens, tokens))
    blocks = checkpointed * sum(
        op.forward_flops for op in ops if op.layer == 0 and (norm in ("post", "sandwich") or op.name != "w2")
    )
    assert hardware_flops(ops) == model_flops(ops) + blocks == total
    flash = operations(config, 1)
    scores = forward_flops_by_group(config)["attention"] // 2
    assert hardware_flops(flash) == model_flops(flash) + scores


def test_padded_vocabularies():
    assert pad_vocabulary(MODELS["gpt2-xl"], 64).vocab_size == 50_304
    assert pad_vocabulary(MODELS["gpt2-xl"], 1) == MODELS["gpt2-xl"]
    with pytest.raises(UserError, match="multiple is 0"):
        pad_vocabulary(MODELS["gpt2-xl"], 0)


@pytest.mark.parametrize(("batch_size", "context", "name"), [(0, 8, "batch_size is 0"), (1, 0, "context_length is 0")])
def test_sizes_are_at_least_one(batch_size, context, name):
    with pytest.raises(UserError, match=name):
        operations(MODELS["gpt2-small"], batch_size, context)
