"""Loading of folders with a model and a tokenizer: begin and end tokens, and mismatches."""

import dataclasses
import json

import pytest

from huggingface_tokenizers import make
from tilewright.errors import UserError
from tilewright.tokenizer import HuggingFaceTokenizer, Tokenizer, train_bpe
from tilewright.tokenizer.formats import save_huggingface
from tilewright.train import train
from tilewright.train.pretrained import load_text_model

pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")


def save_model(folder, vocab_size, **settings):
    """Write a Llama with random weights, and the end tokens in `settings`."""
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **settings},
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)


@pytest.fixture
def folder(tmp_path):
    """A folder with a tokenizer like Mistral's: 404 ids, with <s> = 1 and </s> = 2."""
    save_model(tmp_path, 410)
    make("mistral", tmp_path / "tokenizer.json")
    return tmp_path


def write(path, **content):
    path.write_text(json.dumps(content))


def test_model_may_have_more_ids_than_its_tokenizer(folder):
    text = load_text_model(folder, "cpu")
    assert isinstance(text.tokenizer, HuggingFaceTokenizer)
    assert (text.tokenizer.vocab_size, text.model.config.vocab_size, text.num_ids) == (404, 410, 404)


@pytest.mark.parametrize(
    ("config", "begin"),
    [
        (None, (1,)),
        ({}, (1,)),
        ({"add_bos_token": None}, (1,)),
        ({"add_bos_token": False, "bos_token": "<s>"}, ()),
        ({"add_bos_token": True, "bos_token": "[INST]"}, (3,)),
        ({"add_bos_token": True, "bos_token": {"content": "[INST]", "lstrip": False}}, (3,)),
        ({"add_bos_token": True, "bos_token": None}, ()),
    ],
)
def test_begin_tokens(folder, config, begin):
    if config is not None:
        write(folder / "tokenizer_config.json", **config)
    assert load_text_model(folder, "cpu").begin_tokens == begin


def test_template_may_be_one_of_several_processors(folder):
    document = json.loads((folder / "tokenizer.json").read_text())
    step = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    document["post_processor"] = {"type": "Sequence", "processors": [step, document["post_processor"]]}
    write(folder / "tokenizer.json", **document)
    assert load_text_model(folder, "cpu").begin_tokens == (1,)


@pytest.mark.parametrize(
    ("generation", "model", "tokenizer", "end"),
    [
        (None, None, None, ()),
        ([2, 3], 2, "<s>", (2, 3)),
        ([2, 2], None, None, (2,)),
        (3, 2, "<s>", (3,)),
        (None, 2, "<s>", (2,)),
        (None, [1, 2], None, (1, 2)),
        (None, None, "</s>", (2,)),
        (None, None, {"content": "</s>"}, (2,)),
    ],
)
def test_end_tokens_come_from_the_first_file_that_has_any(folder, generation, model, tokenizer, end):
    write(folder / "generation_config.json", eos_token_id=generation)
    config = json.loads((folder / "config.json").read_text())
    write(folder / "config.json", **{**config, "eos_token_id": model})
    write(folder / "tokenizer_config.json", eos_token=tokenizer)
    assert load_text_model(folder, "cpu").end_tokens == end


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("generation_config.json", '{"eos_token_id": "</s>"}', 'eos_token_id "</s>": expected an id or a list of ids'),
        ("generation_config.json", '{"eos_token_id": [true]}', "expected an id or a list of ids"),
        (
            "generation_config.json",
            '{"eos_token_id": 410}',
            "ends with id 410 in .*: expected an id below .* 410",
        ),
        ("generation_config.json", "{", "generation_config.json is not JSON, or is cut off"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json holds a JSON list"),
        ("tokenizer_config.json", '{"eos_token": "<end>"}', "eos_token '<end>': expected a special token"),
        ("tokenizer_config.json", '{"eos_token": 2}', "eos_token 2: expected a special token"),
        ("tokenizer_config.json", '{"add_bos_token": true, "bos_token": "a"}', "bos_token 'a': expected a special token"),
    ],
)
def test_malformed_files_raise(folder, name, content, message):
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        load_text_model(folder, "cpu")
    assert str(folder) in str(caught.value)


def test_tokenizer_with_more_ids_than_the_model_raises(folder):
    save_model(folder, 403)
    with pytest.raises(UserError, match=r"ids up to 403, such as 403 for .*: expected ids below the model's vocab_size, 403"):
        load_text_model(folder, "cpu")


def test_special_tokens_may_exceed_the_models_ids(folder):
    document = json.loads((folder / "tokenizer.json").read_text())
    document["added_tokens"].append({**document["added_tokens"][0], "id": 404, "content": "<image>"})
    write(folder / "tokenizer.json", **document)
    save_model(folder, 404)
    text = load_text_model(folder, "cpu")
    assert (text.tokenizer.vocab_size, text.num_ids) == (405, 404)


def test_a_folder_without_tokenizer_needs_one_by_name(folder, tmp_path):
    expected = load_text_model(folder)
    elsewhere = tmp_path / "elsewhere.json"
    (folder / "tokenizer.json").rename(elsewhere)
    text = load_text_model(folder, tokenizer_file=elsewhere)
    assert text.tokenizer.fingerprint == expected.tokenizer.fingerprint
    assert (text.begin_tokens, text.end_tokens) == (expected.begin_tokens, expected.end_tokens)
    with pytest.raises(UserError, match=r"none\.json does not exist"):
        load_text_model(folder, tokenizer_file=tmp_path / "none.json")
    with pytest.raises(UserError, match=r"has no tokenizer\.json: choose a tokenizer with --tokenizer"):
        load_text_model(folder, "cpu")


def test_run_keeps_the_end_tokens_of_init(changed, corpus):
    config = changed(steps=4)
    train(config)
    end = Tokenizer.load(corpus / "tokenizer.json").end_of_text_id
    text = load_text_model(config.out, "cpu")
    assert (text.begin_tokens, text.end_tokens) == ((), (end,))
    write(config.out / "generation_config.json", eos_token_id=[5, 6])
    write(config.out / "tokenizer_config.json", add_bos_token=True, bos_token="<|endoftext|>")
    text = load_text_model(config.out, "cpu")
    assert (text.begin_tokens, text.end_tokens) == ((end,), (5, 6))
    with pytest.raises(UserError, match=r"none\.json does not exist: expected the tokenizer that the run was trained with, "):
        load_text_model(config.out, "cpu", config.out / "none.json")


@pytest.mark.parametrize("style", ["llama", "gemma"])
def test_run_with_a_foreign_tokenizer(changed, tmp_path, style):
    path = make(style, tmp_path / "tokenizer.json")
    for name in ("train", "valid"):
        (tmp_path / f"{name}.txt").write_text("The cat sat on the mat.\n" * 50)
    config = changed(steps=4)
    data = dataclasses.replace(config.data, train=(tmp_path / "train.txt",), valid=tmp_path / "valid.txt", tokenizer=path)
    train(dataclasses.replace(config, data=data, model=dataclasses.replace(config.model, vocab_size=448)))
    text = load_text_model(config.out, "cpu")
    assert (config.out / "tokenizer.json").read_bytes() == path.read_bytes()
    begin = text.tokenizer.special_tokens["<bos>" if style == "gemma" else "<s>"]
    assert (text.begin_tokens, text.end_tokens) == ((begin,), ())


def test_template_prefix_of_converted_tokenizers(corpus, tmp_path):
    tokenizer = Tokenizer(*train_bpe(corpus / "train.txt", 300, ["<|endoftext|>"]), ["<|endoftext|>"])
    save_huggingface(tmp_path / "tokenizer.json", tokenizer.data)
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    end = tokenizer.special_tokens["<|endoftext|>"]
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [end], "tokens": ["<|endoftext|>"]}},
    }
    write(tmp_path / "tokenizer.json", **document)
    save_model(tmp_path, 300)
    text = load_text_model(tmp_path, "cpu")
    assert isinstance(text.tokenizer, Tokenizer)
    assert (text.begin_tokens, text.end_tokens) == ((end,), (end,))
    document["post_processor"].pop("special_tokens")
    write(tmp_path / "tokenizer.json", **document)
    with pytest.raises(UserError, match="malformed post_processor"):
        load_text_model(tmp_path, "cpu")
