"""Learn the merges of a byte-level BPE from text, or from pretokens counted before."""

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

    Ids: 0..255 are the bytes, then one id a merge in the order learned, special tokens last. The most frequent pair merges
    first. Merges never cross a pretoken; special tokens and the ends of documents are hard boundaries and never counted. The
    result does not depend on `num_workers`. Text is UTF-8, what is not becomes U+FFFD. Too little text for `vocab_size` gives a
    smaller vocabulary and a warning. This is `count_text` and then `learn_bpe`, which can also be called one by one.

    Args:
        input_path: Files, folders, globs, or `Files` and `Documents` with weights: see `sources.py`.
        vocab_size: Tokens in all: 256 bytes, merges, special tokens.
        special_tokens: Texts that are a token each.
        pattern: How text splits into pretokens: "gpt2", "cl100k", "o200k", or a regular expression, which is slower.
        ties: Which of several most frequent pairs merges first: "cs336", the lexicographically greater one, or
            "huggingface", the one of the lesser ids.
        min_frequency: A pair that occurs less often never merges.
        max_token_length: In bytes; a longer token is never made.
        num_workers: How many count pretokens, as threads, or as processes for a pattern of one's own. None: one a core, and one
            only for little text.
        memory: Bytes that the counts may take, about; what is more is kept on disk. None: no bound. Learning takes, besides,
            some 40 bytes for each byte of all distinct pretokens.
        scratch: The folder for that. None: the system's for temporary files.

    Raises `UserError` for inputs that are missing, empty or unreadable, a `vocab_size` below 256 + the special tokens, special
    tokens that are empty, doubled or a single byte, options out of range, a full disk and a killed worker.
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
    """Return (vocab, merges) learned from counted text, as `train_bpe` does.

    `known_merges` are those of a tokenizer that is extended: they come first, whatever the counts say. Ids are numbered anew:
    special tokens come after the new merges, and no model of the former ids can use them. A smaller vocabulary is the
    beginning of a larger one: see `shorten_vocab`.
    """
    check_training(vocab_size, text.special_tokens, ties, min_frequency, max_token_length, len(known_merges))
    wanted = vocab_size - 256 - len(text.special_tokens)
    with tqdm(total=wanted, desc="learning merges", unit="merge", disable=None) as bar:

        def show(made: int) -> None:
            bar.update(made - bar.n)

        learned = learn_merges(
            text.counts,
            wanted,
            ties=ties,
            min_frequency=min_frequency,
            max_token_length=max_token_length,
            known=known_ids(known_merges),
            progress=show,
        )
        show(len(learned))
    vocab, merges = shorten_vocab(learned.as_bytes(), vocab_size, text.special_tokens)
    if len(merges) < wanted:
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
    """Raise a `UserError` for what makes no sense, so that nobody counts for hours before `learn_bpe` says so."""
    check_rules(ties, min_frequency, max_token_length)
    for token in check_special_tokens(special_tokens):
        if len(token.encode()) == 1:
            raise UserError(f"special token {token!r} is a single byte, and every byte is in the vocabulary already")
    smallest = 256 + len(special_tokens)
    check_number("vocab_size", vocab_size, 256)
    if vocab_size > MOST_IDS:
        raise UserError(f"vocab_size is {vocab_size}: at most {MOST_IDS} is possible")
    if vocab_size < smallest:
        raise UserError(
            f"vocab_size is {vocab_size}: at least {smallest} is needed, 256 bytes and {len(special_tokens)} special"
        )
    if vocab_size < smallest + num_known:
        raise UserError(
            f"vocab_size is {vocab_size}: at least {smallest + num_known} is needed, as {num_known} merges are known already"
        )


def shorten_vocab(merges: MergeList, vocab_size: int, special_tokens: Sequence[str] = ()) -> tuple[Vocab, MergeList]:
    """Return the (vocab, merges) of the first merges, as training for just this `vocab_size` gives them."""
    merges = merges[: vocab_size - 256 - len(special_tokens)]
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [left + right for left, right in merges]
    tokens += [token.encode() for token in special_tokens]
    return dict(enumerate(tokens)), merges


def known_ids(merges: Sequence[tuple[bytes, bytes]]) -> np.ndarray:
    """Return the merges in ids, a byte its own and merge i 256 + i: int32 of shape (n, 2).

    What cannot be learned on from raises a `UserError`: a merge of what is not there yet, or to what is there already.
    """
    ids: dict[bytes, int] = {bytes([byte]): byte for byte in range(256)}
    pairs = np.empty((len(merges), 2), np.int32)
    for index, (left, right) in enumerate(merges):
        for token in (left, right):
            if token not in ids:
                raise UserError(f"known merge {index}, {left!r} {right!r}, needs {token!r}, which no merge before it makes")
        pairs[index] = ids[left], ids[right]
        if left + right in ids:
            raise UserError(f"known merge {index}, {left!r} {right!r}, makes {left + right!r}, which is a token already")
        ids[left + right] = 256 + index
    return pairs
