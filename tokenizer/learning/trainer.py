"""Learn the merges of a byte-level BPE from text, or from stored counts."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ...errors import UserError
from ..counting.count_text import count_text
from ..counting.counts_file import CountedText
from ..formats import MOST_IDS
from ..text.patterns import check_special_tokens
from ..text.sources import Inputs
from .learner import Ties, check_number, check_rules, learn_merges

Vocab = dict[int, bytes]
MergeList = list[tuple[bytes, bytes]]


def train_bpe(
    input_path: Inputs,
    vocab_size: int,
    special_tokens: Sequence[str] = (),
    *,
    pattern: str = "gpt2",
    ties: Ties = "cs336",
    min_frequency: int = 1,
    max_token_length: int | None = None,
    num_workers: int | None = None,
    memory: int | None = None,
    scratch: Path | str | None = None,
) -> tuple[Vocab, MergeList]:
    """Return (vocab, merges) learned from text.

    Ids: 0..255 are the bytes, followed by one id per merge in the order learned, and the special tokens. The most frequent
    pair merges first. Merges never cross a pretoken. Special tokens and the ends of documents are hard boundaries and are not
    counted. The result does not depend on `num_workers`. Text is UTF-8; invalid bytes become U+FFFD. Too little text for
    `vocab_size` gives a smaller vocabulary and a warning. The function calls `count_text` and then `learn_bpe`, which are
    public too.

    Args:
        input_path: Files, folders, globs, or `Files` and `Documents` with weights: see `sources.py`.
        vocab_size: Number of tokens: 256 bytes, merges and special tokens.
        special_tokens: Texts that each become one token.
        pattern: Pattern that splits text into pretokens: "gpt2", "cl100k", "o200k", ..., or a regular expression, which is
            slower.
        ties: Rule for equally frequent pairs: "cs336" merges the lexicographically greater one first, "huggingface" the one
            with the lower ids.
        min_frequency: Pairs that occur less often never merge.
        max_token_length: Maximum length of a token in bytes.
        num_workers: Number of threads, or of processes for a pattern outside `PATTERNS`, that count pretokens. None: one per
            core, or one for little text.
        memory: Approximate limit for the counts in bytes; counts beyond it are spilled to disk. None: no limit. Learning takes
            another 40 bytes or so for each byte of all distinct pretokens.
        scratch: Folder for spilled counts. None: the system's temporary folder.

    Raises a `UserError` for inputs that are missing, empty or unreadable, a `vocab_size` below 256 + the special tokens,
    special tokens that are empty, duplicate or a single byte, options out of range, a full disk and a killed worker.
    """
    check_training(vocab_size, special_tokens, ties, min_frequency, max_token_length)
    text = count_text(input_path, special_tokens, pattern=pattern, num_workers=num_workers, memory=memory, scratch=scratch)
    return learn_bpe(text, vocab_size, ties=ties, min_frequency=min_frequency, max_token_length=max_token_length)


def learn_bpe(
    text: CountedText,
    vocab_size: int,
    *,
    ties: Ties = "cs336",
    min_frequency: int = 1,
    max_token_length: int | None = None,
    known_merges: Sequence[tuple[bytes, bytes]] = (),
) -> tuple[Vocab, MergeList]:
    """Return (vocab, merges) learned from counted text, as in `train_bpe`.

    `known_merges` are the merges of a tokenizer to extend; they come first regardless of the counts. Ids are renumbered:
    special tokens follow the new merges, so models trained with the old ids cannot use them. A smaller vocabulary is a prefix
    of a larger one: see `shorten_vocab`.
    """
    check_training(vocab_size, text.special_tokens, ties, min_frequency, max_token_length, len(known_merges))
    num_merges = vocab_size - 256 - len(text.special_tokens)
    with tqdm(total=num_merges, desc="learning merges", unit="merge", disable=None) as bar:

        def show(made: int) -> None:
            bar.update(made - bar.n)

        learned = learn_merges(
            text.counts,
            num_merges,
            ties=ties,
            min_frequency=min_frequency,
            max_token_length=max_token_length,
            known=known_ids(known_merges),
            progress=show,
        )
        show(len(learned))
    vocab, merges = shorten_vocab(learned.as_bytes(), vocab_size, text.special_tokens)
    if len(merges) < num_merges:
        message = f"the text has no more pairs to merge: the vocabulary has {len(vocab)} tokens, not {vocab_size}"
        warnings.warn(message, stacklevel=3)
    return vocab, merges


def check_training(
    vocab_size: int,
    special_tokens: Sequence[str],
    ties: Ties = "cs336",
    min_frequency: int = 1,
    max_token_length: int | None = None,
    num_known: int = 0,
) -> None:
    """Raise a `UserError` for invalid options of `learn_bpe`, before hours of counting."""
    check_rules(ties, min_frequency, max_token_length)
    for token in check_special_tokens(special_tokens):
        if len(token.encode()) == 1:
            raise UserError(f"special token {token!r} is a single byte, which is a token already: expected at least two bytes")
    smallest = 256 + len(special_tokens)
    check_number("vocab_size", vocab_size, 256)
    if vocab_size > MOST_IDS:
        raise UserError(f"vocab_size is {vocab_size}: expected at most {MOST_IDS}")
    if vocab_size < smallest:
        raise UserError(
            f"vocab_size is {vocab_size}: expected at least {smallest}, 256 bytes and {len(special_tokens)} special tokens"
        )
    if vocab_size < smallest + num_known:
        raise UserError(
            f"vocab_size is {vocab_size}: expected at least {smallest + num_known}, with the {num_known} known merges"
        )


def shorten_vocab(merges: MergeList, vocab_size: int, special_tokens: Sequence[str] = ()) -> tuple[Vocab, MergeList]:
    """Return the (vocab, merges) that training with the smaller `vocab_size` gives."""
    merges = merges[: vocab_size - 256 - len(special_tokens)]
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [left + right for left, right in merges]
    tokens += [token.encode() for token in special_tokens]
    return dict(enumerate(tokens)), merges


def known_ids(merges: Sequence[tuple[bytes, bytes]]) -> np.ndarray:
    """Return the merges in ids, where byte b has id b and merge i id 256 + i: int32 of shape (n, 2).

    A merge of a token that does not exist yet, or to a token that exists already, raises a `UserError`.
    """
    ids: dict[bytes, int] = {bytes([byte]): byte for byte in range(256)}
    pairs = np.empty((len(merges), 2), np.int32)
    for index, (left, right) in enumerate(merges):
        for token in (left, right):
            if token not in ids:
                raise UserError(f"known merge {index}, {left!r} {right!r}, needs {token!r}, which no earlier merge produces")
        pairs[index] = ids[left], ids[right]
        if left + right in ids:
            raise UserError(f"known merge {index}, {left!r} {right!r}, produces {left + right!r}, which is a token already")
        ids[left + right] = 256 + index
    return pairs
