"""Tokenizers that `Tokenizer` cannot represent, compared with the library that runs them."""

import json
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from huggingface_tokenizers import STYLES, TEXTS, make
from tilewright.errors import UserError
from tilewright.tokenizer import HuggingFaceTokenizer, Tokenizer, iter_encoded, read_tokenizer
from tilewright.tokenizer.chat_template import ChatTemplate
from tilewright.tokenizer.chats import SCORED, encode_conversation
from tilewright.tokenizer.formats.cutting import cutting_pattern
from tilewright.tokenizer.text.borders import LINES
from tilewright.tokenizer.text.sources import Documents

tokenizers = pytest.importorskip("tokenizers")

# Plain Python encodes such small texts; compiled code is tested elsewhere.
pytestmark = pytest.mark.usefixtures("real_decision")
styles = pytest.mark.parametrize("style", STYLES)
few = settings(max_examples=40, deadline=None)

# Pieces with spaces, newlines, special tokens, "▁" itself and characters without a token.
texts = st.lists(
    st.one_of(
        st.sampled_from(
            ("the", " cat", " ", "  ", "\n", "\n\n", "\r\n", "\t", "▁", "é", "e\u0301", "中文", "🙂", "\x00", "<0x41>")
        ),
        st.sampled_from(("</s>", "<s>", "[INST]", "<eos>", "<start_of_turn>", "<|endoftext|>", "<|im_end|>", "<think>")),
        st.text(max_size=4),
    ),
    max_size=12,
).map("".join)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return {style: make(style, folder / f"{style}.json") for style in STYLES}


@pytest.fixture(scope="module")
def both(files):
    """Our tokenizer and the library's, by style."""
    return {style: (read_tokenizer(path), tokenizers.Tokenizer.from_file(str(path))) for style, path in files.items()}


@pytest.fixture
def modified(files, tmp_path):
    """Return a function that copies a style's file with a modified JSON object."""

    def change(style, function):
        document = json.loads(files[style].read_text())
        function(document)
        (tmp_path / "modified.json").write_text(json.dumps(document))
        return tmp_path / "modified.json"

    return change


@styles
@few
@given(text=texts)
def test_ids_and_texts_equal_the_library(both, style, text):
    ours, library = both[style]
    ids = library.encode(text, add_special_tokens=False).ids
    assert isinstance(ours, HuggingFaceTokenizer)
    assert ours.encode(text) == ids
    assert ours.decode(ids) == library.decode(ids, skip_special_tokens=False)
    assert ours.decode(ids, skip_special_tokens=True) == library.decode(ids, skip_special_tokens=True)
    assert ours.decode_bytes(ids) == ours.decode(ids).encode()


@styles
@few
@given(data=st.data())
def test_joined_stream_equals_decode(both, style, data):
    ours, library = both[style]
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size - 1), max_size=20))
    skips = data.draw(st.booleans())
    stream = ours.stream_decoder(skip_special_tokens=skips)
    for _ in range(2):
        pieces = [stream.decode(id) for id in ids]
        assert "".join([*pieces, stream.finish()]) == ours.decode(ids, skip_special_tokens=skips)
    theirs = library.decode(ids, skip_special_tokens=skips)
    # For invalid UTF-8, the library also replaces valid bytes next to the invalid ones.
    assert "\ufffd" in theirs or ours.decode(ids, skip_special_tokens=skips) == theirs


@styles
def test_a_stream_continues_a_prompt(both, style):
    ours, _ = both[style]
    ids = ours.encode("The cat sat on the mat")
    for cut in range(len(ids) + 1):
        stream = ours.stream_decoder()
        assert stream.decode(ids[:cut]) + stream.decode(ids[cut:]) == "The cat sat on the mat"


@styles
def test_the_assistants_tokens_are_scored(both, style):
    ours, _ = both[style]
    end = {"gemma": "<eos>", "qwen": "<|im_end|>"}.get(style, "</s>")
    template = ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}" + end + "\n{% endfor %}"
                            "{% if add_generation_prompt %}assistant: {% endif %}")  # fmt: skip
    talk = [{"role": role, "content": f"the {role} saw 中 and e\u0301🙂"} for role in ("user", "assistant")]
    ids, marks = encode_conversation(talk, ours, template)
    assert ids.tolist() == ours.encode(template.render(talk))
    scored = ours.decode(ids[marks == SCORED].tolist())
    assert scored.strip() == unicodedata.normalize("NFC" if style == "qwen" else "NFD", talk[1]["content"]) + end
    with pytest.raises(UserError, match="unit is 'bytes'"):
        ours.encode_with_offsets("a", "bytes")


@styles
def test_encode_batch_equals_encode(both, style):
    ours, _ = both[style]
    several = ["", *TEXTS, "a</s>b", "\ud800"]
    batch = ours.encode_batch(several)
    assert batch.ids.dtype == ours.encode_array("a").dtype == np.uint16
    for i, text in enumerate(several):
        found = batch.ids[batch.offsets[i] : batch.offsets[i + 1]].tolist()
        assert found == ours.encode(text) == ours.encode_array(text).tolist()
    assert len(ours.encode_batch([]).ids) == 0
    assert ours.decode_batch([ours.encode(text) for text in TEXTS]) == [ours.decode(ours.encode(text)) for text in TEXTS]


@styles
def test_special_tokens_are_recognized_refused_or_text(both, style):
    ours, _ = both[style]
    name, other = list(ours.special_tokens)[-2:]
    text = f"a{name} b"
    assert ours.special_tokens[name] in ours.encode(text)
    assert ours.encode(text, allowed_special=[name]) == ours.encode(text)
    literal = ours.encode(text, allowed_special=(), disallowed_special=())
    assert ours.special_tokens[name] not in literal
    assert ours.decode(literal) == text
    assert ours.encode_batch(["a", text], allowed_special=(), disallowed_special=()).ids.tolist()[-len(literal) :] == literal
    with pytest.raises(UserError, match="holds the special token"):
        ours.encode(text, allowed_special=())
    with pytest.raises(UserError, match="all special tokens of a text or none"):
        ours.encode(text + other, allowed_special=[name], disallowed_special=())
    with pytest.raises(UserError, match="'nothing' is not a special token"):
        ours.encode(text, allowed_special=["nothing"])


@styles
@few
@given(parts=st.lists(texts, min_size=1, max_size=8), chunk_bytes=st.integers(1, 40))
def test_a_file_in_blocks_equals_encode(both, style, parts, chunk_bytes, tmp_path_factory):
    ours, _ = both[style]
    text = "\n".join(parts) + "."
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(text.encode())
    blocks = list(iter_encoded(path, ours, 2, chunk_bytes=chunk_bytes))
    assert np.concatenate(blocks).tolist() == ours.encode(text)


@styles
def test_text_is_cut_between_lines(both, style, text_file):
    ours, _ = both[style]
    text = "".join(TEXTS) * 20
    assert len(list(iter_encoded(text_file(text), ours, chunk_bytes=200))) > 20
    documents = list(iter_encoded(Documents(["a b", "", "c"]), ours))
    assert np.concatenate(documents).tolist() == [*ours.encode("a b"), *ours.encode("c")]


def test_other_text_is_cut_only_at_special_tokens(files, modified):
    def cut(style, function):
        return cutting_pattern(json.loads(modified(style, function).read_text()))

    for style in STYLES:
        assert cut(style, lambda document: None) == ("qwen2" if style == "qwen" else LINES)
    for function in (
        lambda document: document["model"]["vocab"].update({"a\nb": 10_000}),
        lambda document: document["model"]["vocab"].pop("<0x0B>"),
        lambda document: document["model"].update(ignore_merges=True),
        lambda document: document.update(normalizer={"type": "Lowercase"}),
        lambda document: document["added_tokens"].append({"id": 10_000, "content": "\n"}),
    ):
        assert cut("llama", function) == ""
    assert cut("qwen", lambda document: document.update(normalizer={"type": "Lowercase"})) == ""
    assert cut("qwen", lambda document: document["pre_tokenizer"]["pretokenizers"].pop(0)) == ""


@styles
def test_round_trip(both, style, tmp_path):
    ours, library = both[style]
    ours.save(tmp_path / "again.json")
    again = read_tokenizer(tmp_path / "again.json")
    (tmp_path / "compact.json").write_text(library.to_str(pretty=False))
    compact = read_tokenizer(tmp_path / "compact.json")
    assert ours.fingerprint == again.fingerprint == compact.fingerprint
    assert len({tokenizer.fingerprint for tokenizer, _ in both.values()}) == len(both)
    assert (again.vocab, again.special_tokens) == (ours.vocab, ours.special_tokens)


def test_the_fingerprint_is_independent_of_the_spelling_of_merges(both, modified):
    ours, _ = both["llama"]

    def spell(document):
        document["model"]["merges"] = [" ".join(merge) for merge in document["model"]["merges"]]

    assert read_tokenizer(modified("llama", spell)).fingerprint == ours.fingerprint
    other = read_tokenizer(modified("llama", lambda document: document["model"]["merges"].pop()))
    assert other.fingerprint != ours.fingerprint


def test_added_tokens_that_are_not_special_are_not_skipped(both):
    ours, _ = both["qwen"]
    ids = ours.encode("<think>a<|im_end|>")
    assert ours.decode(ids, skip_special_tokens=True) == "<think>a"
    assert "<think>" not in ours.special_tokens


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda document: document.update(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}), "has decoder"),
        (lambda document: document["decoder"]["decoders"].pop(1), "has decoder"),
        (lambda document: document["model"].update(dropout=0.1), r"model.dropout 0\.1"),
        (lambda document: document["added_tokens"][0].update(lstrip=True), "added token '<unk>' with lstrip true"),
        (lambda document: document["model"].update(merges=["a"]), "^tokenizers .* cannot read"),
        (lambda document: document.update(pre_tokenizer={"type": "Nothing"}), "^tokenizers .* cannot read"),
    ],
)
def test_unsupported_files_raise(modified, function, message):
    path = modified("llama", function)
    with pytest.raises(UserError, match=message) as caught:
        read_tokenizer(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_library_raises(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install 'tilewright\[hf\]'"):
        read_tokenizer(files["llama"])


def test_supported_files_become_a_tokenizer(modified, tmp_path):
    def simplify(document):
        document.update(normalizer=None)

    ours = read_tokenizer(modified("qwen", simplify))
    assert isinstance(ours, Tokenizer)
    ids = ours.encode("<think>a<|im_end|>")
    assert ours.decode(ids, skip_special_tokens=True) == "<think>a"
    ours.save(tmp_path / "tokenizer.json")
    again = read_tokenizer(tmp_path)
    assert again.decode(ids, skip_special_tokens=True) == "<think>a"
    assert again.fingerprint == ours.fingerprint


def test_a_sentencepiece_model_alone_raises(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(UserError, match=r"has a tokenizer.model but no tokenizer.json: .*save_pretrained"):
            read_tokenizer(path)


def test_nfc_text_is_encoded_without_the_library(both, text_file, monkeypatch):
    ours, library = both["qwen"]
    text, other = "Köln <think>: 中文\n", "Ko\u0308ln"
    ids = library.encode(text, add_special_tokens=False).ids
    assert ours.encode_batch([other]).ids.tolist() == ours.encode("Köln")
    monkeypatch.setattr(ours, "_library", None)
    assert ours.encode_batch([text]).ids.tolist() == ids
    assert next(iter_encoded(text_file(text), ours)).tolist() == ids
    with pytest.raises(AttributeError):
        ours.encode_batch([other])


@pytest.mark.parametrize(
    ("style", "name"), [("mistral", "LlamaTokenizer"), ("gemma", "GemmaTokenizer"), ("qwen", "Qwen2Tokenizer")]
)
def test_folders_of_transformers_give_the_same_ids(files, tmp_path, style, name):
    transformers = pytest.importorskip("transformers")
    model = json.loads(files[style].read_text())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    getattr(transformers, name)(vocab=model["vocab"], merges=merges).save_pretrained(tmp_path)
    ours, theirs = read_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (*TEXTS, f"a{theirs.eos_token} b"):
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids)
