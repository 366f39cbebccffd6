"""Encoding of conversations with marks, and packing of whole conversations into windows."""

import gzip
import json

import numpy as np
import pytest
import torch
from chat_cases import CHATML, make_chats, write_chats, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.errors import UserError
from tilewright.tokenizer.chat_template import ChatTemplate
from tilewright.tokenizer.chats import BEGINS, SCORED, encode_conversation, holds_chats
from tilewright.train.config import DataConfig
from tilewright.train.data.chats import encode_chats
from tilewright.train.data.datasets import open_data, open_dataset
from tilewright.train.data.packing import PackedWindows, conversation_borders
from tilewright.train.data.sampling import TrainingData, check_record
from tilewright.train.data.token_file import TokenDataset, TokenWriter, write_tokens
from tilewright.train.data.validation import ValidationData

TALK = [
    {"role": "system", "content": "a small bird"},
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat on"},
    {"role": "user", "content": "that"},
    {"role": "assistant", "content": "old tree"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chats")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    from tilewright.tokenizer import Tokenizer

    return Tokenizer.load(folder / "tokenizer.json")


@pytest.fixture(scope="module")
def template(folder):
    return ChatTemplate.load(folder)


def scored_text(tokenizer, ids, marks):
    return tokenizer.decode(ids[marks & SCORED != 0].tolist())


def test_assistant_messages_and_turn_ends_are_scored(tokenizer, template):
    ids, marks = encode_conversation(TALK, tokenizer, template)
    assert ids.tolist() == tokenizer.encode(template.render(TALK))
    assert scored_text(tokenizer, ids, marks) == "sat on<|im_end|>old tree<|im_end|>"
    assert np.flatnonzero(marks & BEGINS).tolist() == [0]


def test_turn_without_a_special_token_ends_with_its_text(tokenizer):
    plain = ChatTemplate(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    ids, marks = encode_conversation(TALK, tokenizer, plain)
    # A token includes the space before a word. The line break ends the turn.
    assert scored_text(tokenizer, ids, marks) == " sat on\n old tree\n"


def test_the_first_token_is_never_scored(tokenizer):
    ids, marks = encode_conversation(
        TALK, tokenizer, ChatTemplate("{% generation %}{{ messages[2].content }}{% endgeneration %}")
    )
    assert len(ids) > 1
    assert marks.tolist() == [BEGINS] + [SCORED] * (len(ids) - 1)


def test_token_file_holds_conversations_in_order(tmp_path, tokenizer, template, monkeypatch):
    monkeypatch.setattr("tilewright.tokenizer.chats._GROUP_BYTES", 1000)
    chats = make_chats(40)
    path = write_chats(tmp_path / "chats.jsonl", chats)
    header = encode_chats(path, tokenizer, template, tmp_path / "chats.tokens")
    dataset = TokenDataset(tmp_path / "chats.tokens")
    starts = conversation_borders(dataset)
    assert header == dataset.header
    assert len(starts) == 41
    for messages, start, end in zip(chats, starts[:-1], starts[1:], strict=True):
        ids, marks = encode_conversation(messages, tokenizer, template)
        records = dataset.records(np.array([start]), end - start)[0]
        assert np.array_equal(records["id"], ids)
        assert np.array_equal(records["marks"], marks)


def test_chats_are_encoded_once_and_checked_later(tmp_path, folder, tokenizer, template):
    path = write_chats(tmp_path / "chats.jsonl", make_chats(5))
    valid = tmp_path / "valid.jsonl.gz"
    valid.write_bytes(gzip.compress(write_chats(tmp_path / "v.jsonl", make_chats(3, seed=1)).read_bytes()))
    config = DataConfig((path,), valid, folder / "tokenizer.json")
    (train,), valid_data = open_data(config, tokenizer)
    assert train.header.marked
    assert len(conversation_borders(valid_data)) == 4
    stamp = train.stamp
    path.touch()
    assert open_data(config, tokenizer)[0][0].stamp == stamp
    path.unlink()
    assert open_dataset(train.path, tokenizer, template).stamp == stamp
    with pytest.raises(UserError, match="another tokenizer or chat template"):
        open_dataset(train.path, tokenizer, ChatTemplate(CHATML + " "))
    with pytest.raises(UserError, match=r"no chat_template.jinja; add one, or name a template with --data.chat-template"):
        open_dataset(train.path, tokenizer)
    write_chats(path, make_chats(6))
    with pytest.raises(UserError, match=r"was encoded from another chats.jsonl"):
        open_dataset(path, tokenizer, template)


def test_holds_chats_distinguishes_texts_from_chats(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('\n{"text": "the cat"}\n')
    assert not holds_chats(path)
    assert not holds_chats(tmp_path / "missing.jsonl")
    path.write_text('\n{"messages": []}\n')
    assert holds_chats(path)


GOOD = json.dumps({"messages": TALK})


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GOOD, "", "{"], "line 3 is not JSON"),
        ([GOOD, '{"text": "a"}'], "line 2 has no messages"),
        ([GOOD, '{"messages": []}'], "line 2 has no messages"),
        ([GOOD, '{"messages": [3]}'], r"line 2: role of message 1 is null: expected a string"),
        ([GOOD, '{"messages": [{"role": "user", "content": ["a"]}]}'], r'line 2: content of message 1 is \["a"\]: expected'),
        (['{"messages": [{"role": "user", "content": "a"}]}'], "has no message of the role assistant"),
        ([GOOD, '{"messages": [{"role": "tool", "content": "a"}]}'], "line 2: the template of T rejects .*: no tools"),
    ],
)
def test_error_names_an_invalid_line_and_leaves_no_file(tmp_path, tokenizer, lines, message):
    path, out = tmp_path / "chats.jsonl", tmp_path / "chats.tokens"
    path.write_text("\n".join(lines))
    source = "{% for m in messages if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endfor %}" + CHATML
    with pytest.raises(UserError, match=f"chats.jsonl {message}"):
        encode_chats(path, tokenizer, ChatTemplate(source, name="the template of T"), out)
    assert list(tmp_path.iterdir()) == [path]


def write_marked(path, sizes, vocab_size=1000):
    """Write conversations of the sizes with tokens counted from 0. Every second token is scored."""
    marks = [np.array([BEGINS] + [SCORED * (i % 2) for i in range(1, size)], np.uint8) for size in sizes]
    with path.open("w+b") as file:
        writer = TokenWriter(file, vocab_size, "by", marked=True)
        writer.append(np.arange(sum(sizes)), np.concatenate(marks))
        writer.save()
    return TokenDataset(path)


def expected_windows(sizes, length):
    """Return each window as a list of (first token, number of tokens kept) of its conversations."""
    windows, free = [], 0
    for first, size in zip(np.cumsum([0, *sizes]).tolist(), sizes, strict=False):
        if size > free:
            windows.append([])
            free = length
        windows[-1].append((first, min(size, length)))
        free -= size
    return windows


def test_turns_that_the_template_renders_separately_are_separate_conversations(tokenizer):
    talk = TALK[1:]
    source = CHATML.replace("+ m.content", "+ ('the ' if loop.last and m.role == 'assistant' else '') + m.content")
    ids, marks = encode_conversation(talk, tokenizer, ChatTemplate(source))
    assert np.count_nonzero(marks & BEGINS) == 2
    assert scored_text(tokenizer, ids, marks) == "the sat on<|im_end|>the old tree<|im_end|>"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 25), min_size=1, max_size=20), st.integers(1, 16))
def test_windows_hold_whole_conversations(tmp_path_factory, sizes, context_length):
    dataset = write_marked(tmp_path_factory.mktemp("marked") / "a.tokens", sizes)
    windows = PackedWindows(dataset, context_length)
    expected = expected_windows(sizes, context_length + 1)
    assert len(windows) == len(expected)
    assert [windows.pieces(number) for number in range(len(windows))] == expected
    inputs, targets, documents = windows.read(np.arange(len(windows)))
    assert (inputs.dtype, targets.dtype, documents.dtype) == (torch.int64, torch.int64, torch.int32)
    for row, window in enumerate(expected):
        place = 0
        for number, (first, size) in enumerate(window):
            for i in range(size):
                if place + i < context_length:
                    assert inputs[row, place + i] == first + i
                    assert documents[row, place + i] == documents[row, 0] + number
                if place + i > 0:
                    assert targets[row, place + i - 1] == (first + i if i % 2 else -100)
            place += size
        assert (targets[row, max(0, place - 1) :] == -100).all()
        if place < context_length:
            assert (documents[row, place:] == documents[row, 0] + len(window)).all()


def test_epoch_has_each_window_once(tmp_path):
    datasets = [write_marked(tmp_path / f"{name}.tokens", [5, 3, 9, 4, 2, 7, 6] * n) for name, n in (("a", 3), ("b", 2))]
    data = TrainingData(tuple(datasets), 8, seed=1)
    total = sum(data.num_windows)
    batch = data.batch(range(total))
    places = [data.place(sample) for sample in range(total)]
    assert sorted(places) == sorted(
        (windows.dataset.path, windows.pieces(number)[0][0]) for windows in data.packed for number in range(len(windows))
    )
    for row, (path, start) in enumerate(places):
        (windows,) = (windows for windows in data.packed if windows.dataset.path == path)
        number = next(number for number in range(len(windows)) if windows.pieces(number)[0][0] == start)
        for got, want in zip(batch, windows.read(np.array([number])), strict=True):
            assert torch.equal(got[row], want[0])
    assert [data.place(sample) for sample in range(total, 2 * total)] != places
    again = TrainingData(tuple(datasets), 8, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(again.batch(range(3, 9)), data.batch(range(3, 9)), strict=True))
    check_record(json.loads(json.dumps(data.record())), again)


def test_summary_of_windows(tmp_path):
    windows = PackedWindows(write_marked(tmp_path / "a.tokens", [4, 5, 20, 3]), 8)
    assert windows.summary().endswith("4 conversations in 3 windows of 9 tokens, 77.8% filled; 1 longer than a window, cropped")


def test_validation_windows_are_evenly_spaced(tmp_path):
    dataset = write_marked(tmp_path / "a.tokens", [9] * 10)
    batches = list(ValidationData(dataset, 4, 8).batches(3))
    assert [len(inputs) for inputs, _, _ in batches] == [3, 1]
    assert torch.cat([inputs[:, 0] for inputs, _, _ in batches]).tolist() == [0, 27, 54, 81]
    assert sum(len(inputs) for inputs, _, _ in ValidationData(dataset, 400, 8).batches(3)) == 10


def test_text_and_chats_do_not_mix(tmp_path):
    chats = write_marked(tmp_path / "a.tokens", [9] * 10)
    write_tokens(tmp_path / "b.tokens", [np.arange(100)], 1000)
    with pytest.raises(UserError, match="files of chats and of text"):
        TrainingData((chats, TokenDataset(tmp_path / "b.tokens")), 8, 0)


def test_changed_marked_file_is_detected(tmp_path):
    dataset = write_marked(tmp_path / "a.tokens", [9] * 10)
    with dataset.path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x07")
    with pytest.raises(UserError, match="has changed"):
        conversation_borders(dataset)
