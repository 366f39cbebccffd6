"""Files of tokenizers and tiktoken: written and read here, and used by those libraries."""

import base64
import itertools
import json

import pytest
import regex
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from tilewright.errors import UserError
from tilewright.tokenizer import Tokenizer
from tilewright.tokenizer.formats import (
    TokenizerData,
    fingerprint,
    load_tiktoken,
    load_tokenizer,
    read_gpt2_files,
    save_gpt2_files,
    save_huggingface,
    save_tiktoken,
    save_tokenizer,
)
from tilewright.tokenizer.text.patterns import PATTERNS, split_text

BYTES = {id: bytes([id]) for id in range(256)}
SPECIALS = ["<|endoftext|>", "<|end|>", "終"]

steady = settings(derandomize=True, deadline=None, max_examples=200)
texts = st.text(max_size=80) | st.text(alphabet="aeinrt \n\t\r'sS.!?123²é終中\u3000\u0301<|end|>", max_size=60)


@pytest.fixture(scope="module", params=["gpt2", "cl100k", "o200k"])
def data(request, tokenizer):
    return Tokenizer(tokenizer.vocab, tokenizer.merges, SPECIALS, request.param).data


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("formats")
    save_huggingface(folder / "huggingface.json", data)
    save_tiktoken(folder / "ranks.tiktoken", data)
    save_gpt2_files(folder, data)
    return folder


@pytest.fixture(scope="module")
def peers(data, folder):
    ranks = {}
    for line in (folder / "ranks.tiktoken").read_text().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    from_gpt2 = tokenizers.Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    from_gpt2.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIALS])
    pattern = PATTERNS[data.pattern]
    by_tiktoken = tiktoken.Encoding("own", pat_str=pattern, mergeable_ranks=ranks, special_tokens=data.special_tokens)
    by_huggingface = tokenizers.Tokenizer.from_file(str(folder / "huggingface.json"))
    from_gpt2.pre_tokenizer = by_huggingface.pre_tokenizer
    return {
        "tiktoken": lambda text: by_tiktoken.encode(text, allowed_special="all"),
        "huggingface": lambda text: by_huggingface.encode(text).ids,
        "gpt2": lambda text: from_gpt2.encode(text).ids,
    }


@pytest.fixture(scope="module")
def ours(data):
    return Tokenizer.of(data)


def test_all_formats_give_the_same_ids_on_real_text(ours, peers, real_text):
    ids = ours.encode(real_text)
    assert {name: encode(real_text) == ids for name, encode in peers.items()} == dict.fromkeys(peers, True)


@steady
@given(text=texts)
def test_all_formats_give_the_same_ids_on_any_text(ours, peers, text):
    assert {name: encode(text) for name, encode in peers.items()} == dict.fromkeys(peers, ours.encode(text))


def test_round_trip_of_all_formats(data, folder):
    expected = fingerprint(data)
    assert fingerprint(load_tokenizer(folder / "huggingface.json")) == expected
    assert fingerprint(load_tiktoken(folder / "ranks.tiktoken", data.pattern, data.special_tokens)) == expected
    vocab, merges = read_gpt2_files(folder / "vocab.json", folder / "merges.txt", SPECIALS)
    assert fingerprint(TokenizerData(vocab, merges, data.special_tokens, data.pattern)) == expected
    names_only = load_tiktoken(folder / "ranks.tiktoken", special_tokens=["<|x|>"])
    assert names_only.special_tokens == {"<|x|>": max(set(data.vocab) - set(data.special_tokens.values())) + 1}


@pytest.mark.parametrize("first", [True, False], ids=["special tokens first", "no special tokens"])
def test_huggingface_files_are_read(text_file, real_text, tmp_path, first):
    peer = tokenizers.Tokenizer(models.BPE())
    peer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    peer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|endoftext|>"] if first else []
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    peer.train([str(text_file(real_text))], trainer)
    peer.save(str(tmp_path / "tokenizer.json"))
    data = load_tokenizer(tmp_path / "tokenizer.json")
    assert data.special_tokens == ({"<|endoftext|>": 0} if first else {})
    ids = Tokenizer.of(data).encode(real_text)
    assert ids == peer.encode(real_text).ids
    assert max(ids) > 500
    # Convert on to the third library, including ids that do not start with the bytes.
    save_tiktoken(tmp_path / "ranks.tiktoken", data)
    assert load_tiktoken(tmp_path / "ranks.tiktoken", special_tokens=data.special_tokens) == data


# StarCoder's pattern, which has two steps in tokenizers, and a custom one.
OTHERS = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+",
    r"\$\p{N}+|\s*\p{Lu}?\p{L}++|(?:.|\s)",
)


@pytest.mark.parametrize("pattern", [*PATTERNS, *OTHERS])
def test_every_pattern_splits_like_huggingfaces_engine(tmp_path, pattern):
    path = tmp_path / "tokenizer.json"
    data = TokenizerData(BYTES, [], {}, pattern)
    save_huggingface(path, data)
    assert load_tokenizer(path) == data
    theirs = tokenizers.Tokenizer.from_file(str(path)).pre_tokenizer

    @settings(steady, max_examples=500)
    @given(st.text(alphabet="ab AZ1234'sStTlLvVeErRmMdD\u017f \n\r\t.!?/é中ア・\u3040\u3099\u3000\x85²ǅʰ\u0301ß", max_size=20))
    def check(text):
        pieces = [text[start:end] for _, (start, end) in theirs.pre_tokenize_str(text)]
        assert pieces == split_text(text, PATTERNS.get(pattern, pattern))

    check()


def test_a_special_tokens_id_may_leave_a_gap(tmp_path):
    (tmp_path / "ranks.tiktoken").write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(BYTES[id]), id) for id in BYTES))
    data = load_tiktoken(tmp_path / "ranks.tiktoken", "cl100k", {"<|a|>": 258, "<|b|>": 300})
    assert data.vocab == BYTES | {258: b"<|a|>", 300: b"<|b|>"}
    assert data.pattern == "cl100k"
    save_huggingface(tmp_path / "tokenizer.json", data)
    save_tokenizer(tmp_path / "native.json", data)
    assert load_tokenizer(tmp_path / "tokenizer.json") == load_tokenizer(tmp_path / "native.json") == data
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("é<|b|>").ids == [0xC3, 0xA9, 300]


def test_merges_as_pairs_of_every_split_are_read(data, folder, tmp_path, real_text, ours):
    # As converters from tiktoken write them: all pairs of tokens that form a third one, with `ignore_merges`.
    document = json.loads((folder / "huggingface.json").read_text())
    ranks = {token: id for id, token in data.vocab.items() if id not in data.special_tokens.values()}
    splits = [
        (rank, ranks[token[:cut]], ranks[token[cut:]])
        for token, rank in ranks.items()
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    names = {id: text for text, id in document["model"]["vocab"].items()}
    document["model"]["merges"] = [[names[left], names[right]] for _, left, right in sorted(splits)]
    document["model"]["ignore_merges"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert len(loaded.merges) > len(data.merges)
    assert Tokenizer.of(loaded).encode(real_text) == ours.encode(real_text)
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(real_text).ids == ours.encode(real_text)


def change(document, path, value):
    *parents, last = path
    for name in parents:
        document = document[name]
    document[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["normalizer"], {"type": "Sequence"}, "normalizers is null: expected a list"),
        (["post_processor"], {"type": "TemplateProcessing", "single": [3]}, "single.SpecialToken is null: expected an object"),
        (["pre_tokenizer"], {"type": "Sequence"}, "pretokenizers is null: expected a list"),
        (["pre_tokenizer"], {"type": "Split"}, "pre_tokenizer.pattern is null: expected an object"),
        (
            ["pre_tokenizer"],
            {"type": "Split", "pattern": {"Regex": ["a"]}, "behavior": "Isolated"},
            "pre_tokenizer.pattern.Regex is .*: expected a string",
        ),
        (["normalizer"], {"type": "NFC"}, 'normalizer {"type": "NFC"}, which would give other ids'),
        (["truncation"], {"max_length": 5}, "truncation"),
        (["padding"], {"strategy": "BatchLongest"}, "padding"),
        (["post_processor"], {"type": "TemplateProcessing"}, "post_processor"),
        (["decoder"], {"type": "Metaspace"}, "decoder"),
        (["model", "type"], "Unigram", "expected BPE"),
        (["model", "dropout"], 0.1, "model.dropout 0.1"),
        (["model", "byte_fallback"], True, "model.byte_fallback true"),
        (["model", "end_of_word_suffix"], "</w>", "model.end_of_word_suffix"),
        (["model", "continuing_subword_prefix"], "##", "model.continuing_subword_prefix"),
        (["model", "vocab", "!"], "7", "'!' the id '7'"),
        (["model", "vocab", "zzz"], 3_000_000_000, "'zzz' the id 3000000000: expected an integer from 0 to 16777215"),
        (["added_tokens", 0, "id"], 10**12, "the id 1000000000000: expected an integer"),
        (["added_tokens", 0, "id"], "257", "the id '257': expected an integer"),
        (["added_tokens", 0, "id"], 257.0, "the id 257.0: expected an integer"),
        (["added_tokens", 0, "content"], "\ud800", "holds a surrogate"),
        (["model", "merges", 0], "ab", "merge 'ab'"),
        (["model"], {}, "has an unknown format|expected BPE"),
        (["model", "merges", 0], ["a", "b", "c"], "merge \\['a', 'b', 'c'\\]: expected two tokens with a space between them"),
        (["model", "merges", 0], "a b c", "merge 'a b c': expected two tokens with a space between them"),
        (["model", "merges", 0], 3, "merge 3: expected two tokens"),
        (["model", "merges"], None, "model.merges is null: expected a list"),
        (["model", "vocab"], [["a", 1]], "model.vocab is .*: expected an object"),
        (["added_tokens"], {"<a>": 1}, "added_tokens is .*: expected a list"),
        (["added_tokens", 0], "<a>", r"added_tokens\[0\].content is null: expected a string"),
        (["added_tokens", 0], {"content": "<a>"}, "'<a>' the id None"),
        (["pre_tokenizer"], None, 'pre_tokenizer is "null"'),
        (["pre_tokenizer"], {"kind": 1}, 'pre_tokenizer is "{"kind": 1}"'),
        (["pre_tokenizer"], {"type": "Whitespace"}, 'pre_tokenizer is "Whitespace"'),
        (["pre_tokenizer", "add_prefix_space"], True, "add_prefix_space true"),
        (["pre_tokenizer", "use_regex"], False, "use_regex false"),
        (["added_tokens", 0, "lstrip"], True, "lstrip true"),
        (["added_tokens", 0, "id"], 5, "'<|endoftext|>' the id 5, which belongs to"),
    ],
)
def test_features_that_would_change_ids_raise(tmp_path, path, value, message):
    save_huggingface(tmp_path / "tokenizer.json", Tokenizer(BYTES | {256: b"ab"}, [(b"a", b"b")], SPECIALS).data)
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    change(document, path, value)
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(UserError) as refused:
        load_tokenizer(tmp_path / "tokenizer.json")
    assert regex.search(message.replace("|endoftext|", r"\|endoftext\|"), str(refused.value))
    assert "\n" not in str(refused.value)


def test_gpt2s_file_without_a_model_type_is_read(tmp_path):
    # As on the Hub: it predates type, byte_fallback and ignore_merges.
    ours = Tokenizer(BYTES | {256: b"ab"}, [(b"a", b"b")], SPECIALS)
    save_huggingface(tmp_path / "tokenizer.json", ours.data)
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    for name in ("type", "byte_fallback", "ignore_merges"):
        del document["model"][name]
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        document["model"][name] = ""
    document["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    assert load_tokenizer(tmp_path / "tokenizer.json") == ours.data
    document["model"]["type"] = "Unigram"
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=r'model\.type "Unigram"'):
        load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"invert": True}, "pre_tokenizer.invert"),
        ({"behavior": "Removed"}, "pre_tokenizer.behavior"),
        ({"pattern": {"String": " "}}, "pre_tokenizer.pattern"),
        ({"pattern": {"Regex": r"\p{N}{1,3}+|\P{N}"}}, r"has '\{1,3}\+'"),
        ({"pattern": {"Regex": r"\w+|\W"}}, r"has '\\\\w'"),
        ({"pattern": {"Regex": r".+$"}}, r"has '\$'"),
    ],
)
def test_unsupported_splits_raise(tmp_path, changes, message):
    save_huggingface(tmp_path / "tokenizer.json", TokenizerData(BYTES, [], {}, "cl100k"))
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    document["pre_tokenizer"]["pretokenizers"][0].update(changes)
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"YQ== 0\nYg==\n", "line 2"),
        (b"YQ== 0\n\nYQ== 1\n", "line 3.*a duplicate"),
        (b"YQ== 0\nYg== 0\n", "line 2.*a duplicate"),
        (b"Y! 0\n", "line 1"),
        (b"YQ== zero\n", "line 1"),
        (b"YQ== 0\nYg== 1\nYWJi 2\n", r"lacks the byte b'\\x00': expected all 256 bytes"),
    ],
)
def test_malformed_ranks_raise(tmp_path, content, message):
    (tmp_path / "ranks.tiktoken").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_tiktoken(tmp_path / "ranks.tiktoken")


def test_a_special_token_with_a_used_id_raises(folder):
    with pytest.raises(UserError, match=r"'<\|x\|>' has the id 0"):
        load_tiktoken(folder / "ranks.tiktoken", special_tokens={"<|x|>": 0})


@pytest.mark.parametrize(
    ("tokens", "merges", "message"),
    [
        ([b"bc", b"ab", b"abc"], [(b"b", b"c"), (b"a", b"b"), (b"ab", b"c")], "no merge of b'a' and b'bc'"),
        ([b"ab", b"bc"], [(b"b", b"c"), (b"a", b"b")], "b'ab' has a lower id than b'bc' but merges after it"),
        ([b"abc"], [], "consists of 3 others"),
    ],
)
def test_merges_that_are_not_equivalent_to_ranks_raise(tmp_path, tokens, merges, message):
    with pytest.raises(UserError, match=message):
        save_tiktoken(tmp_path / "ranks.tiktoken", TokenizerData(BYTES | dict(enumerate(tokens, 256)), merges, {}))
    assert not list(tmp_path.iterdir())


@st.composite
def vocabularies(draw):
    """Tokens over few letters, each of two earlier ones, in an order that training need not give."""
    tokens, merges = [b"a", b"b"], []
    for _ in range(draw(st.integers(0, 10))):
        pair = draw(st.sampled_from(tokens)), draw(st.sampled_from(tokens))
        if pair[0] + pair[1] not in tokens:
            merges.append(pair)
            tokens.append(pair[0] + pair[1])
    return merges


@settings(derandomize=True, deadline=None, max_examples=300)
@given(merges=vocabularies())
def test_written_ranks_give_the_same_ids_in_tiktoken(tmp_path_factory, merges):
    vocab = BYTES | {256 + index: left + right for index, (left, right) in enumerate(merges)}
    path = tmp_path_factory.getbasetemp() / "ranks.tiktoken"
    try:
        save_tiktoken(path, TokenizerData(vocab, merges, {}))
    except UserError:
        return
    ranks = {token: id for id, token in vocab.items()}
    reference = tiktoken.Encoding("own", pat_str=r".+", mergeable_ranks=ranks, special_tokens={})
    ours = Tokenizer(vocab, merges)
    for letters in itertools.product("ab", repeat=8):
        assert ours.encode("".join(letters)) == reference.encode("".join(letters))
    assert load_tiktoken(path).merges == merges


def test_ranks_with_a_special_token_that_a_merge_produces_raise(tmp_path):
    with pytest.raises(UserError, match="token b'ab' is special and the result of a merge"):
        save_tiktoken(tmp_path / "ranks.tiktoken", Tokenizer(BYTES | {256: b"ab"}, [(b"a", b"b")], ["ab"]).data)


def test_round_trip_of_very_long_tokens(tmp_path):
    merges = [(b"a" * 2**power,) * 2 for power in range(18)]
    data = TokenizerData(BYTES | {256 + index: left + right for index, (left, right) in enumerate(merges)}, merges, {})
    save_tiktoken(tmp_path / "ranks.tiktoken", data)
    assert load_tiktoken(tmp_path / "ranks.tiktoken") == data


def test_gpt2s_pattern_is_recognized_in_all_spellings(tmp_path):
    spellings = (PATTERNS["gpt2"], r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""")
    for spelling in spellings:
        save_huggingface(tmp_path / "tokenizer.json", TokenizerData(BYTES, [], {}, spelling))
        assert load_tokenizer(tmp_path / "tokenizer.json").pattern == "gpt2"


def test_tokens_with_equal_text_raise_in_json_formats(tmp_path):
    data = TokenizerData(BYTES | {256: "Ġ".encode()}, [], {"Ġ": 256})
    for save in (save_huggingface, save_gpt2_files):
        with pytest.raises(UserError, match="'Ġ' has the same text as another token, ids 32 and 256"):
            save(tmp_path / "x", data)
    save_tokenizer(tmp_path / "native.json", data)
    assert load_tokenizer(tmp_path / "native.json") == data
