"""Look at a tokenizer: its longest tokens, how it takes a text apart, which tokens the text never needs."""

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

# Neighbours always differ; all are readable with black on them.
_COLOURS = ("#a8d8ff", "#b9f3b0", "#ffe08a", "#ffb8b8", "#d9c2ff")
# A split longer than this is no longer looked at.
_SHOWN_CHARS = 1000


@dataclass(frozen=True)
class TextFigures:
    """What a tokenizer makes of a text: sizes, and how often each id occurs (int64, of shape (vocab_size,))."""

    num_bytes: int
    num_tokens: int
    counts: np.ndarray

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text for each token."""
        return self.num_bytes / max(1, self.num_tokens)


def longest_tokens(tokenizer: AnyTokenizer, count: int = 10) -> list[bytes]:
    """Return the `count` longest tokens that are not special, the longest first, equals by id."""
    specials = set(tokenizer.special_tokens.values())
    tokens = [token for id, token in sorted(tokenizer.vocab.items()) if id not in specials]
    return sorted(tokens, key=len, reverse=True)[:count]


def measure_text(tokenizer: AnyTokenizer, path: Path | str, num_workers: int | None = None) -> TextFigures:
    """Encode a text file and count its tokens; a missing or empty file raises a `UserError`."""
    size, num_bytes, counts = text_bytes(path), 0, np.zeros(tokenizer.vocab_size, np.int64)
    blocks = iter_blocks(path, tuple(tokenizer.special_tokens), pattern=tokenizer.pattern)
    num_workers = choose_workers(num_workers, POOL_BYTES if size is None else size)
    for block, ids in encode_blocks(blocks, size, tokenizer, num_workers):
        # Not those of the tokens, which may begin with a blank that is none of the text.
        num_bytes += len(block.data)
        counts += np.bincount(ids, minlength=len(counts))
    return TextFigures(num_bytes, int(counts.sum()), counts)


def unused_tokens(tokenizer: AnyTokenizer, figures: TextFigures) -> list[int]:
    """Return the ids, ascending, of the merged tokens that the text never uses."""
    kept = set(tokenizer.special_tokens.values())
    kept.update(id for id, token in tokenizer.vocab.items() if len(token) == 1)
    return [id for id in np.flatnonzero(figures.counts == 0).tolist() if id in tokenizer.vocab and id not in kept]


def printable(token: bytes) -> str:
    """Return a token as text of one line: bytes that are no character and what does not print are escaped, blanks are not."""
    text = token.decode(errors="backslashreplace")
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def split_of(tokenizer: AnyTokenizer, text: str) -> list[str]:
    """Return the tokens of a text as `printable` shows them; line ends stay, behind their escapes."""
    return [printable(tokenizer.vocab[id]).replace("\\n", "\\n\n") for id in tokenizer.encode(text)]


def coloured(tokens: Sequence[str]) -> Text:
    """Return the tokens side by side, each on a colour of its own."""
    text = Text()
    for index, token in enumerate(tokens):
        text.append(token, style=f"black on {_COLOURS[index % len(_COLOURS)]}")
    return text


def report(data: TokenizerData | None, tokenizer: AnyTokenizer, path: Path | str | None = None) -> dict[str, str]:
    """Return what there is to say of a tokenizer and of how it takes to a text file, if one is named: {what: figures}.

    `data` is that of the file of a `Tokenizer`, with figures of its training; None for one of another library.
    """
    num_special = len(tokenizer.special_tokens)
    if isinstance(tokenizer, Tokenizer):
        kinds = f"256 bytes, {len(tokenizer.merges):,} merges, {num_special:,} special"
        lines = {"tokens": f"{len(tokenizer.vocab):,}: {kinds}", "pattern": tokenizer.pattern}
    else:
        lines = {"tokens": f"{len(tokenizer.vocab):,}: {num_special:,} special", "run by": "tokenizers, of Hugging Face"}
    lines |= {
        "special tokens": ", ".join(f"{name!r} {id}" for name, id in tokenizer.special_tokens.items()) or "none",
        "mean length": f"{np.mean([len(token) for token in tokenizer.vocab.values()]):.2f} bytes",
        "longest": _listed(longest_tokens(tokenizer)),
    }
    training = data.training if data is not None else None
    lines |= {f"training: {name}": str(value) for name, value in (training or {}).items()}
    if path is not None:
        figures = measure_text(tokenizer, path)
        unused = unused_tokens(tokenizer, figures)
        common = np.argsort(-figures.counts, kind="stable")[:10].tolist()
        lines |= {
            "text": f"{figures.num_bytes:,} bytes, {figures.num_tokens:,} tokens, {figures.bytes_per_token:.3f} bytes/token",
            "most frequent": _listed([tokenizer.vocab[id] for id in common if figures.counts[id]]),
            "unused": f"{len(unused):,} merged tokens: {_listed([tokenizer.vocab[id] for id in unused[:10]]) or 'none'}",
        }
    return lines


def _listed(tokens: Sequence[bytes]) -> str:
    return ", ".join(f"'{printable(token)}'" for token in tokens)


def beginning(path: Path | str) -> str:
    """Return the first characters of a text file, of whatever kind `sources.py` knows, as many as are worth looking at."""
    block = next(iter_blocks(path, block_bytes=4 * _SHOWN_CHARS), None)
    return block.data[: 4 * _SHOWN_CHARS].tobytes().decode(errors="replace")[:_SHOWN_CHARS] if block else ""
