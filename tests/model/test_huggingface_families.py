"""Every supported family, compared with models of transformers."""

import copy
import json
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from huggingface_models import CASES, as_stored, make, of_mixtral, randomise, reload
from tilewright.errors import UserError
from tilewright.model import TransformerLM, generate
from tilewright.model.huggingface import family_of_folder, read_config, read_model, save_model, tensor_views

transformers = pytest.importorskip("transformers")

TOKENS = torch.randint(131, (2, 24), generator=torch.Generator().manual_seed(1))
# Fields with several equivalent values, or without effect on the shape.
NOT_COMPARED = {
    "_name_or_path", "initializer_range", "max_window_layers", "head_dim", "use_bidirectional_attention",
    "sliding_window_pattern", "_sliding_window_pattern",
}  # fmt: skip


class Pair(NamedTuple):
    """A folder written by transformers, its model, and ours."""

    folder: object
    theirs: object
    ours: TransformerLM

    @property
    def family(self):
        return self.theirs.config.model_type


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs") / "folder"
    theirs = make(request.param)
    theirs.save_pretrained(folder)
    return Pair(folder, theirs, read_model(folder))


def test_logits_are_equal(pair):
    with torch.no_grad():
        expected, logits = pair.theirs(TOKENS).logits, pair.ours(TOKENS)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_greedy_texts_are_equal(pair):
    # Disable end tokens, so that all texts have full length and exceed the window.
    pair.theirs.generation_config.eos_token_id = None
    for prompt in ([5], [1, 3, 100, 130, 7, 7, 90]):
        expected = pair.theirs.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0].tolist()
        assert prompt + generate(pair.ours, [prompt], 16, temperature=0)[0] == expected
        assert len(expected) == len(prompt) + 16


def test_gradients_of_every_parameter_are_equal(pair):
    inputs, targets = TOKENS[:, :-1], TOKENS[:, 1:]
    expected = torch.nn.functional.cross_entropy(pair.theirs(inputs).logits.flatten(0, 1), targets.flatten(), reduction="sum")
    loss = pair.ours.loss(inputs, targets)
    torch.testing.assert_close(loss, expected, atol=0, rtol=1e-5)
    for each in (expected, loss):
        each.backward()
    views = tensor_views(pair.ours.config, lambda name: pair.ours.get_parameter(name).grad, pair.ours.config.vocab_size)
    gradients = as_stored({name: parameter.grad for name, parameter in pair.theirs.named_parameters()})
    if pair.family == "mixtral":
        gradients = {of_mixtral(name): gradient for name, gradient in gradients.items()}
    assert set(views) == set(gradients)
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
        error = (views[name].theirs() - gradient).norm() / gradient.norm()
        assert error < 2e-5, (name, error)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_round_trip_changes_no_byte(pair, tmp_path, dtype):
    copy.deepcopy(pair.theirs).to(getattr(torch, dtype)).save_pretrained(tmp_path / "in")
    ours = read_model(tmp_path / "in")
    save_model(ours, tmp_path / "out", dtype, pair.family, begin_token=1, end_tokens=[2])
    before, after = (load_file(tmp_path / each / "model.safetensors") for each in ("in", "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype == getattr(torch, dtype)
        assert torch.equal(tensor, after[name]), name
    assert (tmp_path / "in" / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert read_config(tmp_path / "out") == ours.config == pair.ours.config
    assert family_of_folder(tmp_path / "out") == pair.family


def test_transformers_reads_what_we_write(pair, tmp_path):
    save_model(pair.ours, tmp_path / "out", family=pair.family, begin_token=1, end_tokens=[2])
    again = reload(tmp_path / "out")
    assert type(again) is type(pair.theirs)
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, pair.theirs(TOKENS).logits)
    fields, written = pair.theirs.config.to_dict(), again.config.to_dict()
    assert {name: written.get(name) for name in fields.keys() - NOT_COMPARED} == {
        name: fields[name] for name in fields.keys() - NOT_COMPARED
    }


def test_matrices_can_be_read_in_bfloat16(pair):
    half = read_model(pair.folder, torch.bfloat16)
    expected = pair.ours.cast(torch.bfloat16)
    for (name, parameter), other in zip(half.named_parameters(), expected.parameters(), strict=True):
        assert parameter.dtype == other.dtype == (torch.bfloat16 if parameter.dim() > 1 else torch.float32), name
        assert torch.equal(parameter, other), name
    with torch.no_grad():
        assert torch.equal(half(TOKENS), expected(TOKENS))


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory):
    """Gemma 3 as published: a language model and a vision model."""
    text = make("gemma3").config.to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
              "patch_size": 14}  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=130,
        boi_token_index=129,
        eoi_token_index=128,
    )
    theirs = transformers.Gemma3ForConditionalGeneration(config).eval()
    randomise(theirs)
    folder = tmp_path_factory.mktemp("images") / "folder"
    theirs.save_pretrained(folder)
    return folder, theirs


def test_language_model_of_a_multimodal_model_is_read(multimodal):
    folder, theirs = multimodal
    ours = read_model(folder)
    names = load_file(folder / "model.safetensors").keys()
    assert all(any(part in name for name in names) for part in ("vision_tower", "language_model."))
    text = TOKENS % 128
    with torch.no_grad():
        torch.testing.assert_close(ours(text), theirs(input_ids=text).logits, atol=1e-4, rtol=0)
    assert family_of_folder(folder) == "gemma3_text"


def test_image_tensors_in_a_text_model_are_rejected(multimodal, tmp_path):
    folder, _ = multimodal
    document = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(document["text_config"]))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"has a tensor .*which is not supported"):
        read_model(tmp_path)
