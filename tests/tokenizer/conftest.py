"""A naive implementation of the specification, for comparison, and shared fixtures."""

import argparse
import itertools
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import regex

from tilewright.tokenizer import Tokenizer, train_bpe
from tilewright.tokenizer.compiled.jit import Compiled
from tilewright.tokenizer.compiled.work import Work

PATTERN = regex.compile(r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""")


def naive_split(text, special_tokens=()):
    """Return special tokens and pretokens in order; of several special tokens at one place, the longest."""
    parts, run, place = [], "", 0
    while place < len(text):
        special = max((token for token in special_tokens if text.startswith(token, place)), key=len, default=None)
        if special is None:
            run += text[place]
            place += 1
        else:
            parts += [*PATTERN.findall(run), special]
            run = ""
            place += len(special)
    return parts + PATTERN.findall(run)


def naive_train(text, num_merges, special_tokens=()):
    """Learn merges; count every pair again for each merge."""
    pretokens = Counter(part for part in naive_split(text, special_tokens) if part not in special_tokens)
    words = [([bytes([byte]) for byte in pretoken.encode()], count) for pretoken, count in pretokens.items()]
    merges = []
    while len(merges) < num_merges:
        counts = Counter()
        for word, count in words:
            for pair in itertools.pairwise(word):
                counts[pair] += count
        if not counts:
            break
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        for word, _ in words:
            merge_all(word, best)
    return merges


def merge_all(word, pair):
    place = 0
    while place + 1 < len(word):
        if (word[place], word[place + 1]) == pair:
            word[place : place + 2] = [pair[0] + pair[1]]
        place += 1


def naive_encode(vocab, merges, special_tokens, text):
    """Apply one merge at a time: the first applicable one in the list, at the leftmost place."""
    ids = {token: id for id, token in vocab.items()}
    encoded = []
    for part in naive_split(text, special_tokens):
        word = [part.encode()] if part in special_tokens else [bytes([byte]) for byte in part.encode()]
        while found := [(merges.index(pair), place) for place, pair in enumerate(itertools.pairwise(word)) if pair in merges]:
            place = min(found)[1]
            word[place : place + 2] = [word[place] + word[place + 1]]
        encoded += [ids[token] for token in word]
    return encoded


@pytest.fixture(scope="session", autouse=True)
def compiled():
    """Use compiled code for all work: the texts here are too small to trigger compiling."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Work, "is_compiled", lambda work, units: True)
        patch.setattr(Compiled, "is_ready", True)
        yield


_decide = Work.is_compiled


@pytest.fixture
def real_decision(monkeypatch):
    """Restore the real decision between plain Python and compiled code."""
    monkeypatch.setattr(Work, "is_compiled", _decide)


@pytest.fixture(scope="session")
def specification():
    return SimpleNamespace(split=naive_split, train=naive_train, encode=naive_encode)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """Return a function that writes a text, or bytes, to a new file."""
    folder = tmp_path_factory.mktemp("texts")
    numbers = itertools.count()

    def write(content):
        path = folder / f"{next(numbers)}.txt"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


@pytest.fixture(scope="session")
def real_text():
    """Return some 100 kB of prose and code, in documents, with letters of many scripts."""
    source = Path(argparse.__file__).read_text(encoding="utf-8")
    others = (
        "Grüße aus Köln\u3000中文沒有空格，但有標點。日本語も。 ¿Qué tal? Привет, мир! 🙂👩\u200d👩\u200d👧 x² ½ ①"
        "\u00a0\u2003\t\r\n it's WE'LL they've\n\n\n"
    )
    return source.replace("\n\n\n", "<|endoftext|>") + others * 3


@pytest.fixture(scope="session")
def tokenizer(text_file, real_text):
    specials = ["<|endoftext|>"]
    return Tokenizer(*train_bpe(text_file(real_text), 1000, specials), specials)
