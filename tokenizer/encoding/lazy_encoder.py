"""The encoder that every tokenizer has: plain Python for the first texts, compiled loops once texts pay for them."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial

import numpy as np

from ..compiled.jit import LOCK
from ..compiled.work import Work
from ..text import specials, utf8
from ..text.patterns import pattern_name, resolve_pattern
from ..text.scanner import compiled_scanner
from . import backtracking, pretoken_cache
from .decoder import TokenTable
from .encoder import Encoder, PlainEncoder, encoder_of, merge_ids, split_by_regex

_BYTES_PER_SECOND = 2e6
_COMPILE_SECONDS = 7


@cache
def encoding_work(pattern: str) -> Work:
    """Return the work of encoding text that splits by this pattern."""
    name = pattern_name(pattern)
    functions = [*([compiled_scanner(name)] if name else []), utf8, specials, backtracking, pretoken_cache]
    return Work("encoder", functions, units_per_second=_BYTES_PER_SECOND, compile_seconds=_COMPILE_SECONDS)


class LazyEncoder:
    """An `Encoder` that becomes compiled; merges that do not fit the ids, or are there twice, raise a `UserError` at once.

    To make it takes no longer than to read the merges, and compiles nothing.
    """

    encode: Callable[[np.ndarray, np.ndarray, np.ndarray, np.dtype], tuple[np.ndarray, np.ndarray]]
    """See `Encoder`."""

    def __init__(self, merges: Sequence[tuple[bytes, bytes]], ids: Mapping[bytes, int], tokens: TokenTable, pattern: str):
        self._merges = merge_ids(merges, ids)
        self._byte_ids = np.array([ids[bytes([byte])] for byte in range(256)], np.int64)
        self._tokens, self._pattern = tokens, pattern
        self._work = encoding_work(pattern)
        self._plain: Encoder | None = None
        self._final: Encoder | None = None
        self.encode = self._choose_and_encode

    def chosen(self, num_bytes: int) -> Encoder:
        """Return the encoder for a text of so many bytes, or for many texts that have as many together."""
        if self._final is None and not self._work.is_compiled(num_bytes):
            # Threads that come at the same time may make one each, and the last one stays.
            plain = self._plain
            if plain is None:
                split = partial(split_by_regex, resolve_pattern(self._pattern))
                plain = self._plain = PlainEncoder(self._merges, self._byte_ids, split)
            return plain
        with LOCK:
            if self._final is None:
                self._final, self._plain = encoder_of(self._merges, self._byte_ids, self._tokens, self._pattern), None
                # From now on nothing stands between a text and its encoder.
                self.encode = self._final.encode
            return self._final

    def _choose_and_encode(
        self, data: np.ndarray, borders: np.ndarray, border_ids: np.ndarray, dtype: np.dtype
    ) -> tuple[np.ndarray, np.ndarray]:
        return self.chosen(len(data)).encode(data, borders, border_ids, dtype)
