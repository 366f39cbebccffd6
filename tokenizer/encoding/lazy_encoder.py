"""The encoder of every tokenizer: plain Python for the first texts, compiled loops once there is enough text."""

from collections.abc import Mapping, Sequence
from functools import cache, partial

import numpy as np

from ..compiled.jit import LOCK
from ..compiled.work import Work
from ..text import specials, utf8
from ..text.patterns import pattern_name, resolve_pattern
from ..text.scanner import compiled_scanner
from . import backtracking, encode_loop
from .compiled_encoder import compiled_encoder
from .decoder import TokenTable
from .encoder import Encoder, PlainEncoder, Text, merge_ids, split_by_regex

_BYTES_PER_SECOND = 2e6
_COMPILE_SECONDS = 7


@cache
def encoding_work(pattern: str) -> Work:
    """Return the `Work` of encoding text with this pattern."""
    name = pattern_name(pattern)
    # The encoder's loop contains the scanner of GPT-2's pattern.
    scanners = [compiled_scanner(name)] if name not in (None, "gpt2") else []
    functions = [*scanners, utf8, specials, backtracking, encode_loop]
    return Work("encoder", functions, units_per_second=_BYTES_PER_SECOND, compile_seconds=_COMPILE_SECONDS)


class LazyEncoder(Encoder):
    """An `Encoder` that switches to compiled code; unknown tokens in merges and duplicate merges raise a `UserError`.

    The constructor only reads the merges and compiles nothing. `whole` maps the tokens that pretokens become without merging
    to their ids. `beginnings` are the first bytes of special tokens: see `SpecialFinder`.
    """

    def __init__(
        self,
        merges: Sequence[tuple[bytes, bytes]],
        ids: Mapping[bytes, int],
        tokens: TokenTable,
        pattern: str,
        whole: Mapping[bytes, int],
        beginnings: np.ndarray,
    ):
        self._merges = merge_ids(merges, ids)
        self._byte_ids = np.array([ids[bytes([byte])] for byte in range(256)], np.int64)
        self._tokens, self._pattern, self._whole, self._beginnings = tokens, pattern, whole, beginnings
        self._work = encoding_work(pattern)
        self._plain: Encoder | None = None
        self._final: Encoder | None = None

    def encoder_for(self, num_bytes: int) -> Encoder:
        """Return the encoder for a text, or several texts, of `num_bytes` bytes in total."""
        if self._final is None and not self._work.is_compiled(num_bytes):
            # Concurrent threads may each create one; the last one is kept.
            plain = self._plain
            if plain is None:
                split = partial(split_by_regex, resolve_pattern(self._pattern))
                plain = PlainEncoder(self._merges, self._byte_ids, split, len(self._tokens.sizes), self._whole)
                self._plain = plain
            return plain
        with LOCK:
            if self._final is None:
                self._final = compiled_encoder(
                    self._merges, self._byte_ids, self._tokens, self._pattern, self._whole, self._beginnings
                )
                self._plain = None
                # From now on, calls go directly to the compiled encoder.
                for name in ("encode_with_cuts", "encode", "encode_to_list", "try_encode", "try_encode_to_list"):
                    setattr(self, name, getattr(self._final, name))
            return self._final

    def encode_with_cuts(self, data: Text, borders: np.ndarray, border_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Encoder`."""
        return self.encoder_for(len(data)).encode_with_cuts(data, borders, border_ids)
