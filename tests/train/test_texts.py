import json

import pytest
from chat_models import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.errors import UserError
from tilewright.model import Sampling, generate
from tilewright.train import SampleConfig, TextModel, write_texts
from tilewright.train.options import read_prompts
from tilewright.train.texts import TextStream, continue_texts, encode_prompt


@pytest.fixture(scope="module")
def text_model():
    return tiny_model()


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    text=st.text("abé", max_size=12),
    stop=st.lists(st.text("abé", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(1, 4), min_size=30, max_size=30),
)
def test_text_ends_before_the_first_stop_string(text_model, text, stop, cuts):
    stream, ids, pieces = TextStream(text_model, [1], stop), text_model.tokenizer.encode(text), []
    for cut in cuts:
        part, ids = ids[:cut], ids[cut:]
        pieces.append(stream.add(part))
    pieces.append(stream.finish())
    places = [text.find(s) for s in stop if s in text]
    assert "".join(pieces) == (text[: min(places)] if places else text)
    assert stream.stopped == bool(places)


def test_stream_holds_back_only_prefixes_of_stop_strings(text_model):
    stream = TextStream(text_model, [1], ["END", "</s>"])
    encode = text_model.tokenizer.encode
    assert [stream.add(encode(part)) for part in ("one", " E", "N", "x <", "/s", "> more", "more")] == [
        *("one", " ", "", "ENx ", "", "", "")
    ]
    assert stream.stopped


def test_texts_equal_direct_generation(text_model):
    prompts, sampling = ["the", "a", ""], Sampling(0.8, top_p=0.9, repetition_penalty=1.2)
    options = {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2, "stop_tokens": text_model.end_tokens}
    texts = continue_texts(text_model, prompts, 12, sampling, num_samples=2, seed=5, num_slots=2)
    for i, text in enumerate(texts):
        ids = encode_prompt(text_model, prompts[i // 2])
        expected = generate(text_model.model, [ids], 12, seed=5 + i % 2, **options)[0]
        assert (text.prompt, text.num_tokens) == (prompts[i // 2], len(expected))
        assert text.text == text_model.tokenizer.decode(expected)
    (whole,) = continue_texts(text_model, ["the"], 12, sampling, seed=5)
    (cut,) = continue_texts(text_model, ["the"], 12, sampling, seed=5, stop=[whole.text[3:5]])
    assert (cut.text, cut.finish_reason) == (whole.text[: whole.text.find(whole.text[3:5])], "stop")
    assert cut.num_tokens < whole.num_tokens


def test_prompt_follows_the_begin_tokens(text_model):
    begin = TextModel(text_model.model, text_model.tokenizer, begin_tokens=(258,))
    assert encode_prompt(begin, "a") == [258, 97]
    assert encode_prompt(begin, "<|endoftext|>a") == [258, 97]
    assert encode_prompt(begin, "<|endoftext|>", parse_special=False) == [258, *b"<|endoftext|>"]
    assert encode_prompt(begin, "") == encode_prompt(text_model, "") == [258]


def test_prompts_from_a_file(text_model, tmp_path):
    lines, rows = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_text("the cat\r\n\na dog\n")
    rows.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in ("two\nlines", "")))
    assert read_prompts(lines) == ["the cat", "a dog"]
    assert read_prompts(rows) == ["two\nlines", ""]
    texts = write_texts(text_model, SampleConfig(prompts_file=rows, max_new_tokens=2, temperature=0))
    assert [text.prompt for text in texts] == ["two\nlines", ""]
    for data, message in (
        (b"caf\xe9\n", r"prompts file .*prompts.jsonl is not in UTF-8, from byte 3 on"),
        (b"[" * 100_000, "line 1 is "),
        (b'{"prompt": "\\ud800"}', r"the prompt '\\ud800' is not valid Unicode"),
    ):
        rows.write_bytes(data)
        with pytest.raises(UserError, match=message):
            SampleConfig(prompts_file=rows)
    lines.write_bytes(b"\xef\xbb\xbfthe cat\n")
    assert read_prompts(lines) == ["the cat"]
    rows.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(UserError, match=r'line 2 is {"text": "b"}: expected a JSON object with a string "prompt"'):
        SampleConfig(prompts_file=rows)


def test_long_prompt_is_cropped_only_with_crop(text_model):
    config = SampleConfig(("the " * 150,), max_new_tokens=5)
    with pytest.raises(UserError, match="exceed the context of 256 tokens: shorten the prompt, crop it"):
        write_texts(text_model, config)
    texts = write_texts(text_model, SampleConfig(("the " * 150,), max_new_tokens=5, crop=True))
    assert texts[0].prompt == "the " * 150


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples is 0"),
        ({"prompt": ()}, "there is no prompt"),
        ({"seed": 2**63}, "seed is 9223372036854775808: expected from -9223372036854775808 to 9223372036854775807"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"stop": ("a", "")}, "a stop string is empty"),
        ({"min_p": 2.0}, "min_p is 2.0"),
    ],
)
def test_invalid_options_raise(options, message):
    with pytest.raises(UserError, match=message):
        SampleConfig(**options)
