"""Inspect a tokenizer: its longest tokens, the split of a text, and the tokens that a text never uses."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.text import Text

from .encode_file import encode_blocks
from .formats import TokenizerData
from .reading import AnyTokenizer
from .text.sources import iter_blocks, text_bytes
from .tokenizer import Tokenizer
from .workers import POOL_BYTES, choose_workers

# Adjacent colors differ, and black text is readable on all of them.
_COLOURS = ("#a8d8ff", "#b9f3b0", "#ffe08a", "#ffb8b8", "#d9c2ff")
# Length limit of the split that is shown, in characters.
_SHOWN_CHARS = 1000


@dataclass(frozen=True)
class TextFigures:
    """Sizes of an encoded text, and the number of occurrences of each id: int64 of shape (vocab_size,)."""

    num_bytes: int
    num_tokens: int
    counts: np.ndarray

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per token."""
        return self.num_bytes / max(1, self.num_tokens)


def longest_tokens(tokenizer: AnyTokenizer, count: int = 10) -> list[bytes]:
    """Return the `count` longest tokens that are not special, longest first, equal lengths by id."""
    specials = set(tokenizer.special_tokens.values())
    tokens = [token for id, token in sorted(tokenizer.vocab.items()) if id not in specials]
    return sorted(tokens, key=len, reverse=True)[:count]


def measure_text(tokenizer: AnyTokenizer, path: Path | str, num_workers: int | None = None) -> TextFigures:
    """Encode a text file and count its tokens; a missing or empty file raises a `UserError`."""
    size, num_bytes, counts = text_bytes(path), 0, np.zeros(tokenizer.vocab_size, np.int64)
    blocks = iter_blocks(path, tuple(tokenizer.special_tokens), pattern=tokenizer.pattern)
    num_workers = choose_workers(num_workers, POOL_BYTES if size is None else size)
    for block, ids in encode_blocks(blocks, size, tokenizer, num_workers):
        # Not the bytes of the tokens: their first one may begin with a space that is not in the text.
        num_bytes += len(block.data)
        counts += np.bincount(ids, minlength=len(counts))
    return TextFigures(num_bytes, int(counts.sum()), counts)


def unused_tokens(tokenizer: AnyTokenizer, figures: TextFigures) -> list[int]:
    """Return the ids, ascending, of the merged tokens that the text never uses."""
    kept = set(tokenizer.special_tokens.values())
    kept.update(id for id, token in tokenizer.vocab.items() if len(token) == 1)
    return [id for id in np.flatnonzero(figures.counts == 0).tolist() if id in tokenizer.vocab and id not in kept]


def printable(token: bytes) -> str:
    """Return a token as one line of text: invalid UTF-8 and unprintable characters are escaped, spaces are not."""
    text = token.decode(errors="backslashreplace")
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def split_of(tokenizer: AnyTokenizer, text: str) -> list[str]:
    """Return the tokens of a text as `printable` shows them, with a newline after each escaped newline."""
    return [printable(tokenizer.vocab[id]).replace("\\n", "\\n\n") for id in tokenizer.encode(text)]


def coloured(tokens: Sequence[str]) -> Text:
    """Return the tokens as one text with alternating background colors."""
    text = Text()
    for index, token in enumerate(tokens):
        text.append(token, style=f"black on {_COLOURS[index % len(_COLOURS)]}")
    return text


def report(data: TokenizerData | None, tokenizer: AnyTokenizer, path: Path | str | None = None) -> dict[str, str]:
    """Return figures of a tokenizer, and of its encoding of the text file at `path`, as {name: figures}.

    `data` is the file of a `Tokenizer`, with figures of its training; None for another library's tokenizer.
    """
    num_special = len(tokenizer.special_tokens)
    if isinstance(tokenizer, Tokenizer):
        kinds = f"256 bytes, {len(tokenizer.merges):,} merges, {num_special:,} special"
        lines = {"tokens": f"{len(tokenizer.vocab):,}: {kinds}", "pattern": tokenizer.pattern}
    else:
        lines = {"tokens": f"{len(tokenizer.vocab):,}: {num_special:,} special", "backend": "Hugging Face tokenizers"}
    lines |= {
        "special tokens": ", ".join(f"{name!r} {id}" for name, id in tokenizer.special_tokens.items()) or "none",
        "mean length": f"{np.mean([len(token) for token in tokenizer.vocab.values()]):.2f} bytes",
        "longest": _quoted_list(longest_tokens(tokenizer)),
    }
    training = data.training if data is not None else None
    lines |= {f"training: {name}": str(value) for name, value in (training or {}).items()}
    if path is not None:
        figures = measure_text(tokenizer, path)
        unused = unused_tokens(tokenizer, figures)
        common = np.argsort(-figures.counts, kind="stable")[:10].tolist()
        lines |= {
            "text": f"{figures.num_bytes:,} bytes, {figures.num_tokens:,} tokens, {figures.bytes_per_token:.3f} bytes/token",
            "most frequent": _quoted_list([tokenizer.vocab[id] for id in common if figures.counts[id]]),
            "unused": f"{len(unused):,} merged tokens: {_quoted_list([tokenizer.vocab[id] for id in unused[:10]]) or 'none'}",
        }
    return lines


def _quoted_list(tokens: Sequence[bytes]) -> str:
    return ", ".join(f"'{printable(token)}'" for token in tokens)


def beginning(path: Path | str) -> str:
    """Return the first `_SHOWN_CHARS` characters of a text file of any kind in `sources.py`."""
    block = next(iter_blocks(path, block_bytes=4 * _SHOWN_CHARS), None)
    return block.data[: 4 * _SHOWN_CHARS].tobytes().decode(errors="replace")[:_SHOWN_CHARS] if block else ""
