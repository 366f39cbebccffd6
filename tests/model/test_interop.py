"""Models in Llama's format, against transformers' own."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tilewright.errors import UserError
from tilewright.model import ModelConfig, TransformerLM, generate
from tilewright.model.accounting import num_parameters
from tilewright.model.interop import load_llama, load_llama_config, save_llama

CONFIG = ModelConfig(vocab_size=150, context_length=32, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=40)


def build(**changes):
    torch.manual_seed(0)
    model = TransformerLM(dataclasses.replace(CONFIG, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Ones would hide a norm in the wrong place.
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            if name.endswith("qkv_proj.weight"):
                parameter.mul_(4)
    return model.eval()


def tokens_of(config, batch=2):
    return torch.randint(config.vocab_size, (batch, config.context_length), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def llama():
    return pytest.importorskip("transformers").LlamaForCausalLM


@pytest.fixture
def folder(tmp_path):
    """A folder in Llama's format."""
    save_llama(build(), tmp_path / "llama")
    return tmp_path / "llama"


def edit(folder, **fields):
    path = folder / "config.json"
    document = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in document.items() if value != "ABSENT"}))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True},
        {"num_kv_heads": 1},
        {"num_kv_heads": None, "rope_theta": 500.0, "norm_eps": 1e-2},
        {"vocab_size": 128, "num_layers": 1, "d_ff": 17, "rope_theta": 1e6},
    ],
    ids=str,
)
def test_transformers_gives_our_logits(tmp_path, llama, changes):
    model = build(**changes)
    save_llama(model, tmp_path / "out")
    theirs = llama.from_pretrained(tmp_path / "out").eval()
    tokens = tokens_of(model.config)
    with torch.no_grad():
        expected, logits = model(tokens), theirs(tokens).logits
    assert logits.dtype == torch.float32
    assert logits.shape == expected.shape
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    # The tolerance is far below what the logits tell apart.
    assert expected.std() > 0.1
    assert theirs.config.rope_parameters["rope_theta"] == model.config.rope_theta
    assert theirs.config.max_position_embeddings == model.config.context_length
    assert sum(parameter.numel() for parameter in theirs.parameters()) == num_parameters(model.config)


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"num_kv_heads": None, "rope_theta": 500.0}], ids=str)
def test_a_round_trip_changes_no_bit(tmp_path, changes):
    model = build(**changes)
    save_llama(model, tmp_path / "out")
    loaded = load_llama(tmp_path / "out")
    assert dataclasses.replace(loaded.config, num_kv_heads=loaded.config.kv_heads) == dataclasses.replace(
        model.config, num_kv_heads=model.config.kv_heads
    )
    for (name, parameter), other in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(parameter, other), name


def their_model(llama, **changes):
    """Return a model that transformers has drawn, with norms that are not ones."""
    from transformers import LlamaConfig

    fields = {
        "vocab_size": 130, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 3, "max_position_embeddings": 20, "rms_norm_eps": 1e-6, "initializer_range": 0.3,
    }  # fmt: skip
    torch.manual_seed(2)
    model = llama(LlamaConfig(**fields | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_their_models_give_their_logits_here(tmp_path, llama, shards, dtype):
    theirs = their_model(llama, tie_word_embeddings=shards).to(dtype)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="8KB" if shards else "5GB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists() == shards
    theirs = llama.from_pretrained(tmp_path / "theirs", dtype=torch.float32).eval()
    ours = load_llama(tmp_path / "theirs")
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    tokens = tokens_of(ours.config)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)


def test_greedy_generation_equals_theirs(tmp_path, llama):
    model = build()
    save_llama(model, tmp_path / "out", end_of_text_id=3)
    theirs = llama.from_pretrained(tmp_path / "out").eval()
    assert theirs.generation_config.eos_token_id == 3
    for prompt in ([5], [1, 2, 100, 149]):
        ours = generate(model, [prompt], 12, temperature=0, stop_token=3)[0]
        found = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
        assert [token for token in found if token != 3] == ours


def test_bfloat16_halves_the_file(tmp_path, folder, llama):
    save_llama(build(), tmp_path / "half", dtype="bfloat16")
    full, half = (load_file(each / "model.safetensors") for each in (folder, tmp_path / "half"))
    assert all(torch.equal(half[name], tensor.bfloat16()) for name, tensor in full.items())
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {parameter.dtype for parameter in llama.from_pretrained(tmp_path / "half").parameters()} == {torch.bfloat16}


def test_padding_is_not_written(folder):
    tensors = load_file(folder / "model.safetensors")
    assert CONFIG.padded_vocab_size == 256
    assert tensors["model.embed_tokens.weight"].shape == tensors["lm_head.weight"].shape == (150, 32)
    loaded = load_llama(folder)
    assert loaded.get_parameter("lm_head.weight")[150:].abs().max() == 0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"norm": "post"}, "norm post"),
        ({"rope": False}, "rope False"),
        ({"ffn": "silu"}, "ffn silu"),
        ({"norm_type": "layer_norm"}, "norm_type layer_norm"),
        ({"qk_norm": True}, "qk_norm True"),
    ],
)
def test_what_the_format_cannot_hold_is_not_exported(tmp_path, changes, named):
    with pytest.raises(UserError, match=named):
        save_llama(TransformerLM(dataclasses.replace(CONFIG, **changes)), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(folder):
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        save_llama(build(num_layers=1), folder)
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt2"}, 'model_type "gpt2", with learned positions, LayerNorm'),
        ({"model_type": "mamba"}, 'model_type "mamba": only llama'),
        ({"model_type": "ABSENT"}, "model_type null"),
        ({"attention_bias": True}, "attention_bias true"),
        ({"mlp_bias": True}, "mlp_bias true"),
        ({"hidden_act": "gelu"}, 'hidden_act "gelu"'),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 'rope_type "llama3"'),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 'rope_type "linear"'),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, 'rope_type "yarn"'),
        ({"rope_scaling": "linear"}, 'rope_scaling "linear"'),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"head_dim": 16}, "head_dim 16, hidden_size 32"),
        ({"head_dim": "8"}, 'head_dim "8"'),
        ({"num_attention_heads": 32, "head_dim": None}, "head_dim null, hidden_size 32 and num_attention_heads 32"),
        ({"num_attention_heads": 10, "head_dim": None}, "num_attention_heads 10: a head must be"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3: it must divide num_attention_heads, 4"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": "32"}, 'hidden_size "32": it must be a whole number'),
        ({"hidden_size": True}, "hidden_size true"),
        ({"rope_theta": -1.0}, "rope_theta -1.0"),
        ({"intermediate_size": 2.5}, "intermediate_size 2.5"),
        ({"vocab_size": "ABSENT"}, "vocab_size null"),
        ({"rms_norm_eps": "small"}, 'rms_norm_eps "small": it must be a finite number'),
        ({"rms_norm_eps": 0}, "rms_norm_eps 0: it must be a finite number above 0"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings 1: it must be true or false"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0: it must be a whole number, at least 1"),
    ],
    ids=str,
)
def test_what_our_blocks_lack_is_refused_by_name(folder, fields, message):
    edit(folder, **fields)
    with pytest.raises(UserError, match=message) as caught:
        load_llama(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_short_configuration_has_llamas_defaults(folder):
    absent = dict.fromkeys(
        ("head_dim", "rope_theta", "rope_scaling", "rms_norm_eps", "tie_word_embeddings", "attention_bias", "hidden_act"),
        "ABSENT",
    )
    edit(folder, **absent, num_key_value_heads=2)
    assert load_llama_config(folder) == dataclasses.replace(CONFIG, norm_eps=1e-6)
    edit(folder, rope_parameters={"rope_type": "default", "rope_theta": 77})
    assert load_llama_config(folder).rope_theta == 77


@pytest.mark.parametrize("text", ["", "{", "[1]", '"llama"'])
def test_a_broken_configuration(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        load_llama(folder)


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def double(tensors, name):
    tensors[name] = tensors[name].double()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "lacks the tensor model.layers.1.mlp.up_proj.weight"),
        (lambda t: t.pop("lm_head.weight"), "lacks the tensor lm_head.weight"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}), "a tensor .*q_proj.bias, which our"),
        (lambda t: t.update({"model.norm.weight": torch.ones(31)}), r"model.norm.weight as float32 \(31,\): .*\(32,\)"),
        (lambda t: double(t, "model.norm.weight"), "model.norm.weight as float64"),
        (lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int64)}), "model.norm.weight as int64"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(UserError, match=message):
        load_llama(folder)


def test_a_tied_head_may_be_there_if_it_is_the_embedding(tmp_path):
    save_llama(build(tie_embeddings=True), tmp_path / "out")
    rewrite(tmp_path / "out", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    rewrite(tmp_path / "out", lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert load_llama(tmp_path / "out").config.tie_embeddings
    rewrite(tmp_path / "out", lambda t: t["lm_head.weight"].mul_(2))
    with pytest.raises(UserError, match=r"lm_head\.weight of its own"):
        load_llama(tmp_path / "out")


def test_files_that_are_missing_truncated_or_pickles(tmp_path, folder, llama):
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        load_llama(folder)
    weights.unlink()
    with pytest.raises(UserError, match="holds no weights"):
        load_llama(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match="a pickle that could run any code"):
        load_llama(folder)
    their_model(llama).save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    index = tmp_path / "shards" / "model.safetensors.index.json"
    shard = sorted(tmp_path.glob("shards/model-*.safetensors"))[1]
    shutil.move(shard, tmp_path / shard.name)
    with pytest.raises(UserError, match=f"{shard.name} does not exist"):
        load_llama(tmp_path / "shards")
    index.write_text(index.read_text().replace(shard.name, f"../{shard.name}"))
    with pytest.raises(UserError, match="files beside it"):
        load_llama(tmp_path / "shards")
    with pytest.raises(UserError, match="does not exist"):
        load_llama(tmp_path / "nowhere")
