"""The borders of a block that no pretoken crosses: special tokens and the ends of documents."""

import numpy as np

from .sources import Block
from .specials import SpecialFinder
from .utf8 import repair_utf8


def borders_of(block: Block, finder: SpecialFinder) -> tuple[np.ndarray, np.ndarray]:
    """Return the text of a block as valid UTF-8, and its borders [start, end, start, end, ...], int64.

    Borders are special tokens, and the ends of documents as empty spans. No pretoken crosses a border.
    """
    data, document_ends = _repair_documents(block)
    return data, _borders(data, document_ends, finder)


def _repair_documents(block: Block) -> tuple[np.ndarray, np.ndarray]:
    """Return the data and the ends of the documents of a block, as valid UTF-8."""
    data = repair_utf8(block.data)
    if len(block.ends) == 1:
        return data, np.array([len(data)], np.int64)
    inner = block.ends[block.ends < len(data)]
    # Valid UTF-8 may still be cut inside a character.
    if data is block.data and not np.any(data[inner] & 0xC0 == 0x80):
        return data, block.ends
    documents = [repair_utf8(document) for document in np.split(block.data, block.ends[:-1])]
    return np.concatenate(documents), np.cumsum([len(document) for document in documents], dtype=np.int64)


def _borders(data: np.ndarray, document_ends: np.ndarray, finder: SpecialFinder) -> np.ndarray:
    specials = finder.find(data).reshape(-1, 2)
    inner = document_ends[:-1]
    if np.any(np.searchsorted(inner, specials[:, 0], "right") != np.searchsorted(inner, specials[:, 1], "left")):
        # A match that spans two documents is not a token.
        begins = np.concatenate(([0], inner))
        pairs = zip(begins, document_ends, strict=True)
        specials = np.concatenate([finder.find(data[begin:end]).reshape(-1, 2) + begin for begin, end in pairs])
    # Drop an end at 0: it bounds nothing, and its negative is not distinguishable from an ordinary end.
    inner = np.unique(inner[inner > 0])
    borders = np.concatenate((specials, np.stack((inner, inner), axis=1)))
    return borders[np.lexsort((borders[:, 1], borders[:, 0]))].reshape(-1)
