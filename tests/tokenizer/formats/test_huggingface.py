"""Files with all features of real ones, written and used by the library tokenizers."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from tilewright.errors import UserError
from tilewright.tokenizer import Tokenizer
from tilewright.tokenizer.formats import load_tokenizer, save_huggingface
from tilewright.tokenizer.text.patterns import PATTERNS

DEEPSEEK = [
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*"
    "|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
]
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"

texts = st.text(alphabet="abAB it's12² \n\r\t.,!(_中ア・\u3040\u3099\u0301\x00é<a>|b", max_size=40)
steady = settings(derandomize=True, deadline=None, max_examples=400)


def splits(*patterns):
    return [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]


def byte_level(use_regex=True):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


@pytest.fixture
def peer(tokenizer, tmp_path):
    save_huggingface(tmp_path / "peer.json", tokenizer.data)
    return tokenizers.Tokenizer.from_file(str(tmp_path / "peer.json"))


def saved(peer, path):
    peer.save(str(path))
    return path


@pytest.mark.parametrize(
    ("steps", "pattern"),
    [
        ([*splits(*DEEPSEEK), byte_level(False)], "deepseek-v3"),
        ([pre_tokenizers.Digits(individual_digits=True), byte_level()], None),
        ([pre_tokenizers.Digits(individual_digits=False), byte_level()], None),
        ([*splits(PATTERNS["llama3"]), byte_level(False)], "llama3"),
        ([*splits(PATTERNS["qwen2"]), byte_level(False)], "qwen2"),
        ([*splits(PATTERNS["tekken"]), byte_level(False)], "tekken"),
        ([*splits(BLOOM), byte_level(False)], None),
        ([byte_level()], "gpt2"),
    ],
)
def test_steps_equivalent_to_one_pattern_are_read(peer, tmp_path, steps, pattern):
    peer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    ours = Tokenizer.load(saved(peer, tmp_path / "tokenizer.json"))
    assert pattern in (None, ours.pattern)

    @steady
    @given(text=texts)
    def check(text):
        assert ours.encode(text) == peer.encode(text).ids

    check()


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([pre_tokenizers.Punctuation(), byte_level(), pre_tokenizers.Digits()], "Punctuation \\+ ByteLevel \\+ Digits"),
        ([*splits(r"\p{N}", r"\p{L}+"), byte_level(False)], 'pre_tokenizer is "Split \\+ Split \\+ ByteLevel": expected'),
        ([*splits(r"\w+|\W"), byte_level(False)], r"has '\\\\w'"),
        ([*splits(r"\p{L}+"), byte_level()], "use_regex true after a Split"),
    ],
)
def test_other_steps_raise(peer, tmp_path, steps, message):
    peer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    with pytest.raises(UserError, match=message):
        Tokenizer.load(saved(peer, tmp_path / "tokenizer.json"))


def test_steps_without_effect_are_read(peer, tokenizer, tmp_path, real_text):
    peer.normalizer = normalizers.Sequence([normalizers.Sequence([])])
    template = processors.TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    peer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    peer.decoder = decoders.ByteLevel()
    ours = Tokenizer.load(saved(peer, tmp_path / "tokenizer.json"))
    assert ours.fingerprint == tokenizer.fingerprint
    assert ours.encode(real_text) == peer.encode(real_text).ids


def test_a_template_is_ignored_only_on_request(peer, tmp_path, real_text):
    template = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 999)])
    peer.post_processor = processors.Sequence([processors.ByteLevel(), template])
    path = saved(peer, tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=r"post_processor that adds '<\|endoftext\|>' to every text.*ignore_template=True"):
        Tokenizer.load(path)
    ours = Tokenizer.load(path, ignore_template=True)
    assert ours.encode(real_text) == peer.encode(real_text, add_special_tokens=False).ids


@pytest.mark.parametrize("form", [normalizers.NFC(), normalizers.NFKC(), normalizers.Lowercase()])
def test_normalizers_raise(peer, tmp_path, form):
    peer.normalizer = normalizers.Sequence([form])
    with pytest.raises(UserError, match=f'normalizer {{"type": "{type(form).__name__}"}}, which would give other ids'):
        Tokenizer.load(saved(peer, tmp_path / "tokenizer.json"))


def added(*groups):
    peer = tokenizers.Tokenizer(models.BPE({text: id for id, text in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    peer.pre_tokenizer = byte_level()
    for normalized, names in zip((False, True), groups, strict=True):
        peer.add_tokens([AddedToken(name, normalized=normalized) for name in names])
    return peer


@pytest.mark.parametrize(
    ("plain", "normalized"),
    [(["<a>", "b|"], ["<b>", "c"]), (["<a>"], ["a>b"]), (["<a>|"], ["<a"]), ([], ["<a>", "a>b"])],
)
def test_two_kinds_of_added_tokens_without_overlap_are_read(tmp_path, plain, normalized):
    peer = added(plain, normalized)
    ours = Tokenizer.load(saved(peer, tmp_path / "tokenizer.json"))

    @steady
    @given(text=st.text(alphabet="<a>|bc", max_size=20))
    def check(text):
        assert ours.encode(text) == peer.encode(text).ids

    check()


@pytest.mark.parametrize(("plain", "normalized", "text"), [(["a>b"], ["<a>"], "<a>b"), (["b"], ["abc"], "abc")])
def test_two_kinds_of_added_tokens_with_overlap_raise(tmp_path, plain, normalized, text):
    path = saved(peer := added(plain, normalized), tmp_path / "tokenizer.json")
    assert peer.encode(text).tokens[0] != normalized[0]
    with pytest.raises(UserError, match=f"added token '{normalized[0]}' is normalized and may overlap a token that is not"):
        load_tokenizer(path)


def test_byte_fallback_raises(peer, tmp_path):
    document = json.loads(saved(peer, tmp_path / "tokenizer.json").read_text())
    document["model"]["byte_fallback"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"model\.byte_fallback true"):
        Tokenizer.load(tmp_path / "tokenizer.json")
