import dataclasses
import io

import pytest
from rich.console import Console

from tilewright.datasheet import GPU, GPUS, find_gpu
from tilewright.errors import UserError
from tilewright.model import MODELS, ModelConfig
from tilewright.model.accounting import (
    HANDOUT,
    Policy,
    adamw_bytes,
    adamw_flops,
    conventions,
    generation,
    kv_cache_bytes,
    num_parameters,
    operations,
    roofline,
    training_plan,
)
from tilewright.model.accounting.report import AccountConfig, account
from tilewright.model.accounting.tables import print_report

XL = MODELS["gpt2-xl"]
H200 = GPUS["NVIDIA H200"]


def test_adamw_of_gpt2_xl():
    assert adamw_flops(XL) == 29_778_806_400
    assert adamw_bytes(XL) == 28 * num_parameters(XL)
    # bfloat16 weights with masters: write weight, read gradient, read and write master and float32 moments.
    assert adamw_bytes(XL, Policy(weights="bfloat16", master_weights=True)) == (2 + 2 + 8 + 16) * num_parameters(XL)
    # Without masters the step reads the weight instead; 8-bit moments take a byte and a 64th each.
    assert adamw_bytes(XL, Policy(weights="bfloat16")) == (2 + 2 + 2 + 16) * num_parameters(XL)
    blocks = num_parameters(XL) // 256
    assert adamw_bytes(XL, Policy(moments="8bit")) == (4 + 4 + 4 + 4) * num_parameters(XL) + 4 * 4 * blocks


def test_days_of_the_handouts_run():
    a100 = find_gpu("a100")
    assert a100 is not None
    plan = training_plan(XL, 400_000 * 1024 * 1024, a100.fp32 * 1e12, mfu=0.5)
    assert round(plan.days, 1) == 6_583.6
    assert plan.cost is None
    eight = training_plan(XL, 400_000 * 1024 * 1024, a100.fp32 * 1e12, 0.5, num_gpus=8, price_per_gpu_hour=2.0)
    assert eight.days == pytest.approx(plan.days / 8)
    assert eight.cost == pytest.approx(2.0 * 24 * plan.days)
    assert eight.tokens_per_second == pytest.approx(8 * plan.tokens_per_second)


@pytest.mark.parametrize("values", [{"mfu": 0}, {"mfu": 1.2}, {"tokens": 0}, {"num_gpus": 0}, {"price_per_gpu_hour": -1.0}])
def test_bad_plans(values):
    with pytest.raises(UserError, match=next(iter(values))):
        training_plan(XL, **{"tokens": 10, "peak_flops": 1e15, "mfu": 0.5} | values)


def test_unlimited_bandwidth_gives_an_mfu_of_one():
    gpu = GPU("ideal", fp32=1e30, tf32=1, bf16=100, fp8=None, bandwidth=1e30)
    bound = roofline(XL, gpu, policy=Policy(attention="naive"))
    assert bound is not None
    assert bound.best_mfu == pytest.approx(1)
    assert all(op.compute_bound for op in bound.operations if op.flops and op.group != "optimizer")


def test_the_roofline_is_the_sum_of_its_operations():
    bound = roofline(XL, H200, 8)
    assert bound is not None
    assert {op.name for op in bound.operations} == {op.name for op in operations(XL, 8)} | {"adamw"}
    assert 0.5 < bound.best_mfu < 1
    flops, moved = (sum(getattr(op, field) for op in bound.operations) for field in ("flops", "bytes"))
    assert bound.intensity == flops / moved
    gate_up = next(op for op in bound.operations if op.name == "gate_up_proj")
    rows, d, f = 8 * 1024, XL.d_model, XL.d_ff
    assert gate_up.flops == 48 * 3 * 2 * rows * d * 2 * f
    assert gate_up.bytes == 48 * 3 * 2 * (rows * d + d * 2 * f + rows * 2 * f)
    assert gate_up.seconds == pytest.approx(gate_up.flops / 989.4e12)
    swiglu = next(op for op in bound.operations if op.name == "swiglu")
    assert swiglu.seconds == pytest.approx(48 * 8 * 2 * rows * f / 4.8e12)
    assert not swiglu.compute_bound
    lost = bound.shortfall()
    assert next(iter(lost)) in ("adamw", "swiglu")
    useful = sum(op.flops for op in bound.operations) / 989.4e12 / bound.seconds
    assert sum(lost.values()) + useful == pytest.approx(1)


def test_checkpointing_costs_time_and_large_batches_amortize_the_optimizer():
    policies = [Policy(checkpointing=blocks) for blocks in ("none", 1, 24, "block")] + [HANDOUT]
    bounds = [roofline(XL, H200, 4, policy=policy) for policy in policies]
    seconds = [bound.seconds for bound in bounds if bound is not None]
    assert seconds == sorted(seconds)
    assert len(set(seconds)) == len(policies)
    # All blocks take equally long except the first, which has no branch to add.
    assert seconds[3] - seconds[1] == pytest.approx(47 / 23 * (seconds[2] - seconds[1]))
    assert len({bound.model_flops for bound in bounds if bound is not None}) == 1
    small, large = roofline(XL, H200, 1), roofline(XL, H200, 16)
    assert small is not None
    assert large is not None
    assert small.best_mfu < large.best_mfu


# Computed by hand: N = 2,127,057,600; V D = 80,411,200; 12 L D T = 943,718,400 at 1,024 tokens, 16 times as much at 16,384.
# The exact products are 3 (4,513,336,524,800 / 1,024 - 4 L D T) = 12,278,947,200 per token at any context.
BY_HAND = {
    1024: {
        "tilewright": 13_222_665_600,
        "exact causal": 12_278_947_200 + 943_718_400 * 1025 // 2048,
        "HFU": 13_222_665_600 + 157_286_400,
        "PaLM": 13_706_064_000,
        "nanoGPT": 13_706_064_000,
        "nanochat": 13_223_596_800,
        "llm.c": 13_234_204_800,
        "Megatron / MaxText": 12_750_806_400,
        "6N": 12_762_345_600,
        "FlopCounterMode": 13_222_665_600 + 157_286_400,
    },
    16_384: {
        "tilewright": 27_378_441_600,
        "exact causal": 19_829_155_200,
        "HFU": 29_895_024_000,
        "PaLM": 27_861_840_000,
        "nanoGPT": 27_861_840_000,
        "nanochat": 27_379_372_800,
        "llm.c": 20_312_092_800,
        "Megatron / MaxText": 19_828_694_400,
        "6N": 12_762_345_600,
        "FlopCounterMode": 29_895_024_000,
    },
}


@pytest.mark.parametrize("context", BY_HAND)
def test_conventions_of_gpt2_xl_by_hand(context):
    rows = conventions(XL, context, tokens_per_second=10_000, peak_flops=989.4e12)
    assert {row.name: row.flops_per_token for row in rows} == BY_HAND[context]
    for row in rows:
        peak = 312e12 if row.name == "nanoGPT" else 989.4e12
        assert row.mfu == pytest.approx(BY_HAND[context][row.name] * 10_000 / peak)


# Like Gemma 3, with a head width that differs from d_model / heads: five layers see 256 keys, one sees all.
LOCAL = ModelConfig(
    5120, 2048, 512, 6, 4, 1024, head_dim=256, num_kv_heads=1, window=256, window_pattern="LLLLLG", tie_embeddings=True
)


def test_conventions_of_windows_by_hand():
    n, q, tokens = num_parameters(LOCAL), 4 * 256, 2048
    assert n == 5120 * 512 + 6 * (512 * (2 * q + 2 * 256) + 3 * 512 * 1024 + 2 * 512) + 512
    seen = 5 * 256 + tokens
    products = 6 * (n - 13 * 512)  # without the norm weights; the tied embedding counts as the head
    exact = 5 * (256 * 257 // 2 + (tokens - 256) * 256) + tokens * (tokens + 1) // 2
    assert {row.name: row.flops_per_token for row in conventions(LOCAL)} == {
        "tilewright": products + 12 * q * seen,
        "exact causal": products + 12 * q * exact / tokens,
        "HFU": products + 14 * q * seen,
        "PaLM": 6 * n + 12 * 6 * q * tokens,
        "nanoGPT": 6 * n + 12 * 6 * q * tokens,
        "nanochat": 6 * (n - 5120 * 512) + 12 * q * seen,
        "llm.c": 6 * n + 6 * 6 * q * tokens,
        "Megatron / MaxText": products + 6 * q * seen,
        "6N": 6 * n,
        "FlopCounterMode": products + 14 * 6 * q * tokens,
    }


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Policy(), "6 layers of 512, 4 heads of 256, 1 key-value heads, windows of 256 in 5 layers, d_ff 1024"),
        (Policy(window=64), "6 layers of 512, 4 heads of 256, 1 key-value heads, windows of 64, d_ff 1024"),
    ],
)
def test_the_report_names_heads_and_windows(monkeypatch, policy, expected):
    monkeypatch.setitem(MODELS, "local", LOCAL)
    printed = io.StringIO()
    print_report(account("local", AccountConfig(policy=policy)), Console(file=printed))
    text = printed.getvalue()
    assert expected in " ".join(text.split())
    assert "attention in full within windows" in text


def test_generation_with_windows_by_hand():
    step = generation(LOCAL, 2048, batch_size=3)
    assert step.flops_per_token == 2 * (num_parameters(LOCAL) - 13 * 512) + 4 * 1024 * (5 * 256 + 2048)
    # Two bytes per element of a key and a value of width 256. Each layer stores every token and reads those in its window.
    assert step.kv_cache_bytes == 3 * 6 * 2 * 256 * 2048 * 2
    assert generation(LOCAL, 256, batch_size=3).bytes_per_step == step.bytes_per_step - 3 * 2 * 256 * 2 * (2048 - 256)


def test_without_a_peak_only_nanogpt_has_an_mfu():
    rows = conventions(XL, tokens_per_second=10_000)
    assert [row.name for row in rows if row.mfu is not None] == ["nanoGPT"]
    assert all(row.mfu is None for row in conventions(XL))


def test_generation_of_gpt2_xl():
    products = num_parameters(XL) - 80_411_200 - 155_200
    step = generation(XL, 1024, gpu=H200)
    assert step.flops_per_token == 2 * products + 4 * 48 * 1600 * 1024
    assert step.kv_cache_bytes == kv_cache_bytes(XL, 1024) == 2 * 48 * 1600 * 1024 * 2
    assert step.bytes_per_step >= 2 * products + step.kv_cache_bytes
    assert step.bytes_per_step == pytest.approx(2 * products + step.kv_cache_bytes, rel=0.01)
    assert step.bound_by == "memory"
    assert step.tokens_per_second == pytest.approx(4.8e12 / step.bytes_per_step)


def test_large_batches_amortize_weights_and_windows_limit_cache_reads():
    one, many = generation(XL, 64, 1, gpu=H200), generation(XL, 64, 4096, gpu=H200)
    assert many.flops_per_token == one.flops_per_token
    assert one.tokens_per_second is not None
    assert many.tokens_per_second is not None
    assert many.tokens_per_second > 50 * one.tokens_per_second
    for config, window in ((XL, 64), (dataclasses.replace(XL, window=64), None)):
        step, short = generation(config, 1024, window=window), generation(XL, 64)
        assert (step.flops_per_token, step.bytes_per_step) == (short.flops_per_token, short.bytes_per_step)
        # Keys outside every window stay in the cache.
        assert step.kv_cache_bytes == generation(XL, 1024).kv_cache_bytes
    assert generation(XL, 1024).tokens_per_second is None
    with pytest.raises(UserError, match="tokens is 0"):
        generation(XL, 0)


def test_8_bit_blocks_use_the_fp8_peak_and_the_rest_the_bfloat16_peak():
    half, eight = (roofline(XL, H200, 8, policy=Policy(compute=compute)) for compute in ("bfloat16", "fp8"))
    assert half is not None
    assert eight is not None
    assert eight.model_flops == half.model_flops
    assert eight.peak_flops == H200.peak_flops("fp8")
    seconds = [{op.name: op.seconds for op in bound.operations} for bound in (half, eight)]
    changed = {name for name in seconds[0] if seconds[0][name] != seconds[1][name]}
    assert changed == {"qkv_proj", "output_proj", "gate_up_proj", "down_proj"}
    assert all(seconds[1][name] < seconds[0][name] for name in changed)
    report = account("gpt2-xl", AccountConfig(gpu="h200", policy=Policy(compute="fp8_rowwise")))
    assert report["speed"]["peak_of"] == "fp8"
    assert report["speed"]["peak_flops_per_s"] == H200.peak_flops("fp8")


def test_unsupported_8_bit_products_are_rejected():
    with pytest.raises(UserError, match=r"policy\.compute is fp8: A100"):
        account("gpt2-xl", AccountConfig(gpu="a100", policy=Policy(compute="fp8")))
    experts = dataclasses.replace(XL, num_experts=4)
    with pytest.raises(UserError, match="compute is fp8: expected a 16- or 32-bit dtype"):
        operations(experts, policy=Policy(compute="fp8"))
