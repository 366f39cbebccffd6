"""Reading and writing weight files: Llama models of ours and of transformers, shards, dtypes, and rejected files."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from huggingface_models import reload
from tilewright.errors import UserError
from tilewright.model import ModelConfig, TransformerLM
from tilewright.model.accounting import num_parameters
from tilewright.model.huggingface import canonical, read_model, save_model, write_model

CONFIG = ModelConfig(vocab_size=150, context_length=32, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=40)


def build(**changes):
    torch.manual_seed(0)
    model = TransformerLM(dataclasses.replace(CONFIG, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Ones would hide a misplaced norm.
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
    """A folder with a Llama."""
    save_model(build(), tmp_path / "llama")
    return tmp_path / "llama"


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
def test_transformers_computes_our_logits(tmp_path, llama, changes):
    model = build(**changes)
    save_model(model, tmp_path / "out")
    theirs = llama.from_pretrained(tmp_path / "out").eval()
    tokens = tokens_of(model.config)
    with torch.no_grad():
        expected, logits = model(tokens), theirs(tokens).logits
    assert logits.dtype == torch.float32
    assert logits.shape == expected.shape
    # The logits vary far more than the tolerance.
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, atol=1e-4 * max(1, expected.std().item()), rtol=0)
    assert theirs.config.rope_parameters["rope_theta"] == model.config.rope_theta
    assert theirs.config.max_position_embeddings == model.config.context_length
    assert sum(parameter.numel() for parameter in theirs.parameters()) == num_parameters(model.config)


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"num_kv_heads": None, "rope_theta": 500.0}], ids=str)
def test_a_round_trip_changes_no_bit(tmp_path, changes):
    model = build(**changes)
    save_model(model, tmp_path / "out")
    loaded = read_model(tmp_path / "out")
    assert loaded.config == canonical(model.config)
    for (name, parameter), other in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(parameter, other), name


def their_model(llama, **changes):
    """Return a randomly initialized model of transformers whose norm weights are not ones."""
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
def test_transformers_models_keep_their_logits(tmp_path, llama, shards, dtype):
    theirs = their_model(llama, tie_word_embeddings=shards).to(dtype)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="8KB" if shards else "5GB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists() == shards
    theirs = llama.from_pretrained(tmp_path / "theirs", dtype=torch.float32).eval()
    ours = read_model(tmp_path / "theirs")
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    tokens = tokens_of(ours.config)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)


def test_bfloat16_weights_are_rounded(tmp_path, folder, llama):
    save_model(build(), tmp_path / "half", "bfloat16")
    full, half = (load_file(each / "model.safetensors") for each in (folder, tmp_path / "half"))
    assert all(torch.equal(half[name], tensor.bfloat16()) for name, tensor in full.items())
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {parameter.dtype for parameter in llama.from_pretrained(tmp_path / "half").parameters()} == {torch.bfloat16}


def test_padding_is_not_written(folder):
    tensors = load_file(folder / "model.safetensors")
    assert CONFIG.padded_vocab_size == 256
    assert tensors["model.embed_tokens.weight"].shape == tensors["lm_head.weight"].shape == (150, 32)
    loaded = read_model(folder)
    assert loaded.get_parameter("lm_head.weight")[150:].abs().max() == 0


def test_a_wide_head_loads_as_mistral(tmp_path):
    pytest.importorskip("transformers")
    # `test_huggingface_families` covers weights of every family; this is a width that Llama's class rejects.
    model = build(num_heads=3, num_kv_heads=1, head_dim=12)
    save_model(model, tmp_path / "out")
    theirs = reload(tmp_path / "out")
    assert theirs.config.model_type == "mistral"
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens_of(CONFIG)).logits, model(tokens_of(CONFIG)), atol=1e-4, rtol=0)


def test_failed_saves_leave_no_files(tmp_path):
    with pytest.raises(UserError, match="norm post"):
        save_model(build(norm="post"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_end_tokens_are_written_one_or_several(tmp_path, llama):
    for ends, written in (([], None), ([3], 3), ([3, 5, 7], [3, 5, 7])):
        save_model(build(), tmp_path / str(len(ends)), begin_token=9, end_tokens=ends)
        for name in ("config.json", "generation_config.json"):
            document = json.loads((tmp_path / str(len(ends)) / name).read_text())
            assert (document["eos_token_id"], document["bos_token_id"]) == (written, 9)
        theirs = llama.from_pretrained(tmp_path / str(len(ends)))
        assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == written
        # transformers would not train the row of a padding token.
        assert theirs.config.pad_token_id is None


def test_large_weights_are_sharded(tmp_path, llama):
    model = build()
    (tmp_path / "out").mkdir()
    write_model(model, tmp_path / "out", dtype="bfloat16", shard_bytes=10_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards == sorted(set(index["weight_map"].values()))
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    tensors = {name: tensor for shard in shards for name, tensor in load_file(tmp_path / "out" / shard).items()}
    assert tensors.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    # Files are filled up to the limit; the embedding alone almost reaches it.
    assert all(sum(t.nbytes for t in load_file(tmp_path / "out" / shard).values()) <= 10_000 for shard in shards)
    ours, theirs = read_model(tmp_path / "out"), llama.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens_of(CONFIG)), theirs(tokens_of(CONFIG)).logits, atol=1e-4, rtol=0)


def test_nothing_is_overwritten(folder):
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        save_model(build(num_layers=1), folder)
    assert (folder / "model.safetensors").read_bytes() == before


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
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}), "a tensor .*q_proj.bias, which is"),
        (lambda t: t.update({"model.norm.weight": torch.ones(31)}), r"model.norm.weight as float32 \(31,\): .*\(32,\)"),
        (lambda t: double(t, "model.norm.weight"), "model.norm.weight as F64"),
        (lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int64)}), "model.norm.weight as I64"),
    ],
)
def test_invalid_tensors_are_named(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(UserError, match=message):
        read_model(folder)


def test_a_stored_tied_head_must_equal_the_embedding(tmp_path):
    save_model(build(tie_embeddings=True), tmp_path / "out")
    rewrite(tmp_path / "out", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    rewrite(tmp_path / "out", lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert read_model(tmp_path / "out").config.tie_embeddings
    rewrite(tmp_path / "out", lambda t: t["lm_head.weight"].mul_(2))
    with pytest.raises(UserError, match=r"its lm_head\.weight differs from the embedding"):
        read_model(tmp_path / "out")


def test_missing_truncated_and_pickled_files_are_rejected(tmp_path, folder, llama):
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="cannot read"):
        read_model(folder)
    weights.unlink()
    with pytest.raises(UserError, match="has no weights"):
        read_model(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match="a pickle that can run any code"):
        read_model(folder)
    their_model(llama).save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    index = tmp_path / "shards" / "model.safetensors.index.json"
    shard = sorted(tmp_path.glob("shards/model-*.safetensors"))[1]
    shutil.move(shard, tmp_path / shard.name)
    with pytest.raises(UserError, match=f"{shard.name} does not exist"):
        read_model(tmp_path / "shards")
    index.write_text(index.read_text().replace(shard.name, f"../{shard.name}"))
    with pytest.raises(UserError, match="files in the same folder"):
        read_model(tmp_path / "shards")
    with pytest.raises(UserError, match="does not exist"):
        read_model(tmp_path / "nowhere")
