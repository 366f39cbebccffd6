"""Export of runs to the format of transformers, and loading of such folders."""

import dataclasses
import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file

from tilewright.errors import UserError
from tilewright.kernels import RopeScaling
from tilewright.model import ModelConfig, TransformerLM, generate
from tilewright.model.huggingface import family_of_folder
from tilewright.tokenizer import Tokenizer
from tilewright.train import load_run, train
from tilewright.train.config import load_config
from tilewright.train.export import export_run
from tilewright.train.pretrained import initialise, load_text_model

PROMPT = "the cat sat on"


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """A run of a few steps with averaged weights and a vocabulary larger than the tokenizer's."""
    from tilewright.train import OptimizerConfig, TrainConfig
    from tilewright.train.presets import corpus_files

    out = tmp_path_factory.mktemp("runs") / "run"
    train(
        TrainConfig(
            out=out,
            model=ModelConfig(vocab_size=310, context_length=16, d_model=16, num_layers=2, num_heads=2, d_ff=24),
            data=corpus_files(corpus),
            steps=4,
            batch_size=4,
            optimizer=OptimizerConfig(lr=1e-2, final_lr=1e-3, warmup_steps=0),
            ema_decay=0.9,
            eval_sequences=4,
            device="cpu",
        )
    )
    return out


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    return export_run(run, "hf", tmp_path_factory.mktemp("exported") / "hf")


def test_transformers_generates_the_same_tokens(run, exported):
    transformers = pytest.importorskip("transformers")
    model, tokenizer = load_run(run, "cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported).eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    text = "The café said:\n\n  123 birds<|endoftext|>the mat 🐦 "
    assert their_tokenizer(text)["input_ids"] == tokenizer.encode(text)
    assert their_tokenizer.decode(tokenizer.encode(text)) == text
    assert their_tokenizer.eos_token_id == their_tokenizer.bos_token_id == tokenizer.end_of_text_id
    assert their_tokenizer.model_max_length == 16

    ids = torch.tensor([tokenizer.encode(PROMPT)])
    with torch.no_grad():
        logits, expected = theirs(ids).logits, model(ids)[..., : tokenizer.vocab_size]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    options = {"temperature": 0, "stop_tokens": [tokenizer.end_of_text_id], "vocab_size": tokenizer.vocab_size}
    ours = generate(model, ids.tolist(), 8, **options)[0]
    found = theirs.generate(**their_tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=8, do_sample=False)
    assert their_tokenizer.decode(found[0], skip_special_tokens=True) == PROMPT + tokenizer.decode(ours)


def test_export_uses_averaged_weights(run, exported):
    checkpoint = sorted((run / "checkpoints").glob("step-*"))[-1]
    mean, weights = (load_file(checkpoint / f"{name}.safetensors")["layers.0.ln1.weight"] for name in ("ema", "model"))
    written = load_file(exported / "model.safetensors")["model.layers.0.input_layernorm.weight"]
    assert torch.equal(written, mean)
    assert not torch.equal(written, weights)


def test_export_drops_ids_beyond_the_tokenizer(run, exported):
    tokenizer = Tokenizer.load(run / "tokenizer.json")
    assert tokenizer.vocab_size == 300
    tensors = load_file(exported / "model.safetensors")
    assert {len(tensors[name]) for name in ("model.embed_tokens.weight", "lm_head.weight")} == {300}
    assert json.loads((exported / "config.json").read_text())["vocab_size"] == 300


def test_exported_folder_loads_like_a_run(run, exported):
    ours, again = load_text_model(run, "cpu"), load_text_model(exported, "cpu")
    assert again.tokenizer.fingerprint == ours.tokenizer.fingerprint
    assert again.end_tokens == ours.end_tokens == (ours.tokenizer.end_of_text_id,)
    assert not again.model.training
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        torch.testing.assert_close(again.model(tokens), ours.model(tokens)[..., :300])


def test_failed_export_leaves_no_files(run, tmp_path, exported):
    with pytest.raises(UserError, match="exists already"):
        export_run(run, "hf", exported)
    with pytest.raises(UserError, match="format is 'gguf': expected hf"):
        export_run(run, "gguf", tmp_path / "out")
    with pytest.raises(UserError, match="nowhere"):
        export_run(tmp_path / "nowhere", "hf", tmp_path / "out")
    path = tmp_path / "run" / "config.json"
    path.parent.mkdir()
    values = json.loads((run / "config.json").read_text())
    path.write_text(json.dumps(values | {"model": values["model"] | {"norm": "post"}}))
    with pytest.raises(UserError, match="norm post"):
        export_run(path.parent, "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_init_from_a_run_or_a_folder(run, exported):
    source, tokenizer = load_run(run, "cpu")
    tokens = torch.arange(16)[None]
    for folder, size in ((run, 310), (exported, 300)):
        model = TransformerLM(dataclasses.replace(source.config, vocab_size=size, context_length=64))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            initialise(model, folder, tokenizer)
        with torch.no_grad():
            torch.testing.assert_close(model(tokens)[..., :300], source(tokens)[..., :300])


def test_init_rejects_other_shapes_and_tokenizers(run, exported, corpus, tmp_path):
    source, tokenizer = load_run(run, "cpu")
    model = TransformerLM(dataclasses.replace(source.config, d_ff=40))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=r"has d_ff 24, not 40: omit the preset, or set --model\.d-ff 24"):
        initialise(model, run, tokenizer)
    scaled = TransformerLM(dataclasses.replace(source.config, rope_theta=77.0, rope_scaling=RopeScaling("linear", 2.0)))
    with pytest.raises(UserError, match=r"has rope_theta 10000.0, not 77.0: omit the preset, or set --model.rope-theta"):
        initialise(scaled, run, tokenizer)
    with pytest.raises(UserError, match="has vocab_size 300, not 310"):
        initialise(TransformerLM(source.config), exported, tokenizer)
    other = Tokenizer(tokenizer.vocab, tokenizer.merges[:-1], ["<|endoftext|>"])
    with pytest.raises(UserError, match="trained with another tokenizer"):
        initialise(TransformerLM(source.config), run, other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_init_warns_if_the_tokenizer_cannot_be_compared(run, tmp_path):
    folder = export_run(run, "hf", tmp_path / "hf")
    (folder / "tokenizer.json").unlink()
    source, tokenizer = load_run(run, "cpu")
    model = TransformerLM(dataclasses.replace(source.config, vocab_size=300))
    with pytest.warns(UserWarning, match="cannot compare the tokenizer"):
        initialise(model, folder, tokenizer)
    with pytest.raises(UserError, match=r"has no tokenizer\.json: choose a tokenizer with --tokenizer"):
        load_text_model(folder)


def test_export_keeps_the_family_of_init(run, exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "mistral")
    path = folder / "config.json"
    # Mistral without windows could also be exported as Llama.
    family = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
    path.write_text(json.dumps(json.loads(path.read_text()) | family))
    config = load_config(run / "config.json")
    model = dataclasses.replace(config.model, vocab_size=300)
    train(dataclasses.replace(config, out=tmp_path / "run", init=folder, model=model, steps=1))
    # Chat files that a run copies from the folder of `init`.
    kept = {"chat_template.jinja": "{{ messages }}", "generation_config.json": '{"eos_token_id": [3, 7]}'}
    for name, text in kept.items():
        (tmp_path / "run" / name).write_text(text)
    written = export_run(tmp_path / "run", "hf", dtype="bfloat16")
    assert {name: (written / name).read_text() for name in kept} == kept
    assert family_of_folder(written) == "mistral"
    assert {tensor.dtype for tensor in load_file(written / "model.safetensors").values()} == {torch.bfloat16}
    # The same holds for a run that starts from that run.
    again = dataclasses.replace(config, out=tmp_path / "again", init=tmp_path / "run", model=model, steps=1)
    train(again)
    assert family_of_folder(export_run(tmp_path / "again", "hf")) == "mistral"
    # The folder of `init` may have been deleted.
    shutil.rmtree(folder)
    assert family_of_folder(export_run(tmp_path / "run", "hf", tmp_path / "out")) == "llama"
