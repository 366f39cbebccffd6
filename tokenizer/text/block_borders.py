"""What no pretoken of a block crosses: special tokens and the ends of documents."""

import numpy as np

from .sources import Block
from .specials import SpecialFinder
from .utf8 import repair_utf8


def borders_of(block: Block, finder: SpecialFinder) -> tuple[np.ndarray, np.ndarray]:
    """Return the text of a block as valid UTF-8, and [start, end, start, end, ...] of what no pretoken crosses, int64.

    These are special tokens, and the ends of documents as tokens without a byte.
    """
    data, document_ends = _repair_documents(block)
    return data, _borders(data, document_ends, finder)


def _repair_documents(block: Block) -> tuple[np.ndarray, np.ndarray]:
    """Return the data and the ends of the documents of a block, as valid UTF-8."""
    data = repair_utf8(block.data)
    if len(block.ends) == 1:
        return data, np.array([len(data)], np.int64)
    inner = block.ends[block.ends < len(data)]
    # A text of whole characters may still be cut within one.
    if data is block.data and not np.any(data[inner] & 0xC0 == 0x80):
        return data, block.ends
    documents = [repair_utf8(document) for document in np.split(block.data, block.ends[:-1])]
    return np.concatenate(documents), np.cumsum([len(document) for document in documents], dtype=np.int64)


def _borders(data: np.ndarray, document_ends: np.ndarray, finder: SpecialFinder) -> np.ndarray:
    specials = finder.find(data).reshape(-1, 2)
    inner = document_ends[:-1]
    if np.any(np.searchsorted(inner, specials[:, 0], "right") != np.searchsorted(inner, specials[:, 1], "left")):
        # What looks like a token is part of two documents.
        begins = np.concatenate(([0], inner))
        pairs = zip(begins, document_ends, strict=True)
        specials = np.concatenate([finder.find(data[begin:end]).reshape(-1, 2) + begin for begin, end in pairs])
    # An end at 0 has no negative number to be told by, and bounds nothing.
    inner = np.unique(inner[inner > 0])
    borders = np.concatenate((specials, np.stack((inner, inner), axis=1)))
    return borders[np.lexsort((borders[:, 1], borders[:, 0]))].reshape(-1)
