import copy
import dataclasses

import pytest
import torch
from torch import nn

from tilewright.errors import UserError
from tilewright.kernels import fp8_linear
from tilewright.model import ModelConfig, TransformerLM
from tilewright.model.fp8 import HISTORY, Fp8Products, use_fp8

CONFIG = ModelConfig(97, 32, d_model=32, num_layers=2, num_heads=2, d_ff=48, qkv_bias=True)
RECIPES = ("fp8", "fp8_rowwise", "fp8_delayed")
every_recipe = pytest.mark.parametrize("recipe", RECIPES)


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return torch.randint(0, 97, (2, 32)), torch.randint(0, 97, (2, 32))


def make(recipe=None, **changes):
    torch.manual_seed(0)
    model = TransformerLM(dataclasses.replace(CONFIG, **changes))
    model.compute_dtype = torch.bfloat16
    return model, recipe and use_fp8(model, recipe, 64)


def step(model, batch):
    """Return the loss and the gradients of a step."""
    model.zero_grad()
    loss = model.loss(*batch)
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


@every_recipe
def test_only_block_products_use_fp8(recipe, batch, monkeypatch):
    (model, _), shapes = make(recipe), []

    def seen(x, weight, **options):
        shapes.append(tuple(weight.shape))
        return fp8_linear(x, weight, **options)

    monkeypatch.setattr("tilewright.model.layers.fp8_linear", seen)
    step(model, batch)
    assert shapes == 2 * [(96, 32), (32, 32), (96, 32), (32, 48)]


@every_recipe
def test_a_step_matches_bfloat16_within_fp8_error(recipe, batch):
    (loss, gradients), (expected_loss, expected_gradients) = step(make(recipe)[0], batch), step(make()[0], batch)
    assert loss != expected_loss
    torch.testing.assert_close(loss, expected_loss, rtol=2e-3, atol=0)
    for gradient, each in zip(gradients, expected_gradients, strict=True):
        assert 0 < (gradient - each).norm() < 0.2 * each.norm()


@every_recipe
def test_without_gradients_products_run_in_bfloat16(recipe, batch):
    with torch.no_grad():
        assert torch.equal(make(recipe)[0].loss(*batch), make()[0].loss(*batch))


@every_recipe
def test_state_dict_has_no_fp8_state(recipe):
    model, _ = make(recipe)
    assert model.state_dict().keys() == make()[0].state_dict().keys()
    assert any(isinstance(module, Fp8Products) for module in model.modules())


@pytest.mark.parametrize(
    ("recipe", "how"),
    [*((recipe, "checkpointed") for recipe in RECIPES), pytest.param("fp8_delayed", "compiled", marks=pytest.mark.slow)],
)
def test_checkpointed_and_compiled_steps_match(recipe, how, batch):
    model, scales = make(recipe)
    expected = [step(model, batch)]
    if scales is not None:
        scales.end_step(lambda seen: seen)
        expected.append(step(model, batch))
    other, scales = make(recipe)
    if how == "checkpointed":
        other.activation_checkpointing = "block"
        loss = other.loss
    else:
        loss = torch.compile(other.loss, fullgraph=True, backend="aot_eager")
    for expected_loss, expected_gradients in expected:
        other.zero_grad()
        value = loss(*batch)
        value.backward()
        torch.testing.assert_close(value.detach(), expected_loss)
        torch.testing.assert_close([p.grad for p in other.parameters()], expected_gradients)
        if scales is not None:
            scales.end_step(lambda seen: seen)


def test_delayed_scales_use_the_largest_recent_amax(batch):
    model, scales = make("fp8_delayed")
    layer = model.layers[0].ffn.down_proj
    inputs = []
    layer.register_forward_hook(lambda module, args, y: inputs.append(args[0].detach().abs().amax().float()))
    first = step(model, batch)
    assert torch.equal(torch.stack([layer.fp8.seen[0]]), torch.stack(inputs))
    # The first step has no history, so it scales by its own inputs.
    assert torch.equal(first[0], step(make("fp8")[0], batch)[0])
    # Not twice: a power of two would round most values to the same result.
    scales.end_step(lambda seen: 3 * seen)
    assert layer.fp8.known[0] == 3 * inputs[0]
    assert layer.fp8.seen.count_nonzero() == 0
    assert step(model, batch)[0] != first[0]
    for _ in range(HISTORY - 1):
        scales.end_step(torch.zeros_like)
    assert layer.fp8.known[0] == 3 * inputs[0]
    scales.end_step(torch.zeros_like)
    assert layer.fp8.known.count_nonzero() == 0


@every_recipe
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_values_reach_the_loss_but_not_the_history(recipe, bad, batch):
    model, scales = make(recipe)
    with torch.no_grad():
        model.layers[0].ffn.down_proj.weight[3, 5] = bad
    loss, _ = step(model, batch)
    assert loss.isnan()
    if scales is not None:
        scales.end_step(lambda seen: seen)
        assert scales.history.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "tokens", "named"),
    [
        ({"d_ff": 40}, 64, r"model\.d_ff is 40: expected a multiple of 16 with precision fp8"),
        ({"d_model": 24, "num_heads": 2}, 64, r"model\.d_model is 24"),
        ({"num_heads": 4, "num_kv_heads": 1}, 64, "the width of all key-value heads is 8"),
        ({}, 24, "the size of a micro-batch in tokens is 24"),
        ({"num_experts": 4}, 64, "num_experts is 4"),
    ],
)
def test_unsupported_widths_are_rejected(changes, tokens, named):
    with pytest.raises(UserError, match=named):
        use_fp8(TransformerLM(dataclasses.replace(CONFIG, qkv_bias=False, **changes)), "fp8", tokens)


def test_cast_copies_have_no_fp8_products():
    model, _ = make("fp8_delayed")
    tokens = torch.zeros(1, 3, dtype=torch.long)
    cast = copy.deepcopy(model).cast(torch.bfloat16)
    assert not any(isinstance(module, Fp8Products) for module in cast.modules())
    with torch.no_grad():
        assert torch.equal(cast(tokens), model(tokens))
    assert isinstance(model.layers[0].attn.qkv_proj, nn.Linear)
