"""Patched transformers models compared with the unpatched models."""

import copy
import pickle

import pytest
import torch

import tilewright
from apply_cases import FAMILIES, TOKENS, assert_equal_training, make_batch, make_config, make_model, make_pair
from tilewright.errors import UserError
from tilewright.kernels import use_backend

pytest.importorskip("transformers")
MASKS = ("none", "left", "right", "between", "packed")


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    return make_pair(request.param)


@pytest.mark.parametrize("mask", MASKS)
def test_logits_loss_and_gradients_match_the_unpatched_model(pair, mask):
    plain, applied = pair
    batch = make_batch(mask)
    assert_equal_training(plain, applied, batch)
    labels = batch.pop("labels")
    outputs = [model.eval()(**batch, use_cache=False).logits for model in pair]
    is_real = batch.get("attention_mask", torch.ones_like(labels)).bool()
    torch.testing.assert_close(outputs[1][is_real], outputs[0][is_real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
def test_generation_matches_the_unpatched_model(pair, cache):
    # Left padding, and more tokens than the window of a sliding cache.
    batch = make_batch("left")
    options = {"attention_mask": batch["attention_mask"], "max_new_tokens": 6, "do_sample": False}
    options |= {"dynamic": {}, "static": {"cache_implementation": "static"}, "none": {"use_cache": False}}[cache]
    plain, applied = (model.eval().generate(batch["input_ids"], **options) for model in pair)
    assert plain.shape == (2, TOKENS + 6)
    assert torch.equal(applied, plain)


@pytest.mark.parametrize("use_cache", [True, False])
def test_packed_sequences_match_separate_ones(pair, use_cache):
    # transformers does not mask them from each other if it makes a cache.
    _, applied = pair
    batch = make_batch("packed")
    ids, positions = batch["input_ids"][:1], batch["position_ids"][:1]
    packed = applied.eval()(input_ids=ids, position_ids=positions, use_cache=use_cache).logits
    alone = torch.cat([applied(input_ids=part).logits for part in ids.split([3, 7, 2], dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    lengths = torch.tensor([0, 3, 10, 12], dtype=torch.int32)
    by_lengths = applied(input_ids=ids, position_ids=positions, cu_seq_lens_q=lengths, use_cache=use_cache).logits
    torch.testing.assert_close(by_lengths, packed, rtol=1e-5, atol=1e-5)


def test_left_padding_matches_pytorch_attention_for_any_labels():
    batch = make_batch("left") | {"labels": make_batch()["labels"]}
    batch["labels"][0, :4] = -100
    assert_equal_training(*make_pair("Llama"), batch)


@pytest.mark.parametrize("as_bool", [True, False])
def test_a_callers_own_mask_is_applied(as_bool):
    plain, applied = make_pair("Gemma2")
    sees = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    sees[5:, 2:4] = False
    least = torch.finfo(torch.float32).min
    added = torch.zeros(2, 1, TOKENS, TOKENS).masked_fill(~sees, least)
    ids = make_batch()["input_ids"]
    expected = plain(ids, attention_mask=added).logits
    mask = sees.expand(2, 1, TOKENS, TOKENS) if as_bool else added
    torch.testing.assert_close(applied(ids, attention_mask=mask).logits, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match=r"attention_mask of 4 dimensions is torch\.int64: expected torch\.bool"):
        applied(ids, attention_mask=mask.long())


@pytest.mark.parametrize("rope", ["llama3", "linear", "dynamic", "yarn"])
def test_every_rope_type_matches_the_unpatched_model(rope):
    more = {
        "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "yarn": {"beta_fast": 32.0, "beta_slow": 1.0},
    }.get(rope, {})
    parameters = {"rope_type": rope, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8, **more}
    plain, applied = make_pair("Llama", rope_parameters=parameters)
    batch = make_batch("left")
    del batch["labels"]
    batch["position_ids"] = torch.arange(TOKENS)[None] - torch.tensor([[4], [0]])
    torch.testing.assert_close(applied(**batch).logits[1], plain(**batch).logits[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(applied(**batch).logits[0, 4:], plain(**batch).logits[0, 4:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("part", ["norms", "mlp", "rope", "attention", "loss"])
def test_each_part_can_be_patched_and_reverted(part):
    model = make_model("Qwen3")
    plain, keys = copy.deepcopy(model), list(model.state_dict())
    parts = dict.fromkeys(("norms", "mlp", "rope", "attention", "loss"), False)
    pointers = [p.data_ptr() for p in model.parameters()]
    applied = tilewright.apply_to(model, **parts | {part: True})
    assert applied.replaced == {
        part: {
            "norms": [
                *(f"model.layers.{i}.{name}" for i in range(2) for name in (
                    "self_attn.q_norm", "self_attn.k_norm", "input_layernorm", "post_attention_layernorm",
                )),
                "model.norm",
            ],
            "mlp": ["model.layers.0.mlp", "model.layers.1.mlp"],
            "rope": ["model.layers.0.self_attn", "model.layers.1.self_attn"],
            "attention": ["model.layers.0.self_attn", "model.layers.1.self_attn"],
            "loss": ["lm_head"],
        }[part]
    }  # fmt: skip
    batch = make_batch("left")
    assert_equal_training(plain, model, batch)
    applied.revert()
    applied.revert()
    assert not any("forward" in vars(module) for module in model.modules())
    assert list(model.state_dict()) == keys
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert torch.equal(model(**batch).loss, plain(**batch).loss)
    assert model.config._attn_implementation == "sdpa"
    tilewright.apply_to(model)


def test_other_models_with_the_same_config_do_not_change():
    transformers = pytest.importorskip("transformers")
    config = make_config("Llama")
    one, other = transformers.LlamaForCausalLM(config), transformers.LlamaForCausalLM(config)
    ids = make_batch()["input_ids"]
    before, classes = other(ids).logits, [type(module) for module in one.modules()]
    tilewright.apply_to(one)
    assert other.config is config
    assert config._attn_implementation == "sdpa"
    assert [type(module) for module in one.modules()] == classes
    assert torch.equal(other(ids).logits, before)


def test_skip_logits_controls_the_logits():
    plain, applied = make_pair("Gemma2")
    batch = make_batch()
    for model in (plain, applied):
        model.train()
    assert applied(**batch).logits is None
    asked = applied(**batch, skip_logits=False)
    torch.testing.assert_close(asked.logits, plain(**batch).logits, rtol=1e-5, atol=1e-5)
    applied.eval()
    assert applied(**batch).logits is not None
    skipped = applied(**batch, skip_logits=True)
    assert skipped.logits is None
    torch.testing.assert_close(skipped.loss, asked.loss)
    torch.testing.assert_close(applied(**batch, skip_logits=True, return_dict=False)[0], asked.loss)


def test_the_loss_follows_the_options_of_transformers():
    plain, applied = make_pair()
    batch = make_batch()
    shifted = batch["labels"].roll(-1, dims=1)
    for options in (
        {"num_items_in_batch": 7},
        {"num_items_in_batch": torch.tensor(7)},
        {"shift_labels": shifted},
        {"ignore_index": int(shifted[0, 0])},
    ):
        losses = [model.train()(**batch, **options).loss for model in (plain, applied)]
        torch.testing.assert_close(losses[1], losses[0])


def test_copies_and_pickles_stay_patched():
    _, applied = make_pair("Gemma3")
    batch = make_batch("left")
    expected = applied(**batch).loss
    for other in (copy.deepcopy(applied), pickle.loads(pickle.dumps(applied))):
        assert other.model.norm.forward.args[0] is other.model.norm
        assert torch.equal(other(**batch).loss, expected)


def test_saved_models_contain_no_patch(tmp_path):
    transformers = pytest.importorskip("transformers")
    plain, applied = make_pair()
    applied.save_pretrained(tmp_path)
    assert "tilewright" not in (tmp_path / "config.json").read_text()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = make_batch()["input_ids"]
    assert torch.equal(loaded(ids).logits, plain(ids).logits)


@pytest.mark.parametrize(("family", "mask"), [("Qwen3", "left"), ("Gemma2", "packed")])
def test_kernels_accept_the_models_tensors(family, mask):
    plain, applied = make_pair(family, num_hidden_layers=1)
    with use_backend("triton"):
        assert_equal_training(plain, applied, make_batch(mask), rtol=1e-4)


def test_unsupported_models_are_rejected():
    transformers = pytest.importorskip("transformers")
    with pytest.raises(UserError, match="the model is a Linear: expected one of LlamaForCausalLM, "):
        tilewright.apply_to(torch.nn.Linear(2, 2))
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=16))
    with pytest.raises(UserError, match="the model is a str: expected one of"):
        tilewright.apply_to("gpt2")
    with pytest.raises(UserError, match="the model is a GPT2LMHeadModel"):
        tilewright.apply_to(gpt2)

    class Changed(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    with pytest.raises(UserError, match="Changed has its own forward pass"):
        tilewright.apply_to(Changed(make_config("Llama")))
    with pytest.raises(UserError, match="the activation is 'relu': expected one of silu, "):
        tilewright.apply_to(make_model("Llama", hidden_act="relu"))
    with pytest.raises(UserError, match=r"attention_dropout is 0\.1: expected 0\.0"):
        tilewright.apply_to(make_model("Llama", attention_dropout=0.1))
    _, applied = make_pair()
    with pytest.raises(UserError, match="already patched"):
        tilewright.apply_to(applied)
    with pytest.raises(UserError, match="output_attentions is True"):
        applied(make_batch()["input_ids"], output_attentions=True)


def test_wrapped_forward_passes_are_rejected():
    model = make_model("Llama")
    handle = tilewright.apply_to(model)
    inner = model.model.norm.forward
    model.model.norm.forward = lambda x: inner(x)
    with pytest.raises(UserError, match="the forward pass of a LlamaRMSNorm was wrapped after apply_to"):
        handle.revert()
    model.model.norm.forward = inner
    handle.revert()
    model.model.norm.forward = lambda x: x
    with pytest.raises(UserError, match="a LlamaRMSNorm has its own forward pass"):
        tilewright.apply_to(model)
