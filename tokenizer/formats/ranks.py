"""tiktoken's `.tiktoken` files: one line per token, with its bytes in base64 and its rank, which is its id.

The files list no merges. A pretoken that is a token becomes that token. In any other pretoken, two adjacent parts merge if
the vocabulary has their concatenation: the lowest rank first, the leftmost of equal ranks. A list of merges is equivalent if
each merge is the last step of merging its token's bytes alone. (Proof: once the ends of a token are boundaries, its bytes
merge alike in any context, so no other two parts of it ever meet.) A token whose bytes do not merge to a single token is
never produced by merges; `ignore_merges` marks that such tokens exist. The files store neither special tokens nor the
pattern.
"""

import base64
import binascii
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from ...errors import UserError
from ...files import atomic_file, require_file
from ..reference import merge_pretoken
from .tokenizer_data import TokenizerData, check_id

# Up to this many bytes, a list of pairs is faster than a heap.
_SHORT = 48
_NEVER = 1 << 62


def save_tiktoken(path: Path | str, data: TokenizerData) -> None:
    """Write the ranks of all tokens except special ones to `path`, atomically.

    Merges that are not equivalent to ranks raise a `UserError`, because the file would give other ids.
    """
    check_ranks(data)
    with atomic_file(path) as file:
        for token, rank in _ranks_of(data).items():
            file.write(b"%s %d\n" % (base64.b64encode(token), rank))


def load_tiktoken(
    path: Path | str, pattern: str = "gpt2", special_tokens: Mapping[str, int] | Sequence[str] = ()
) -> TokenizerData:
    """Read ranks and recover the merges from them.

    The file stores neither the `pattern` nor the special tokens; special tokens without ids get the ids after the last rank.
    A missing or malformed file raises a `UserError`.
    """
    ranks = _read_ranks(require_file(path, "ranks file"))
    for byte in range(256):
        if bytes([byte]) not in ranks:
            raise UserError(f"{path} lacks the byte {bytes([byte])!r}: expected all 256 bytes")
    merges, whole = recover_merges(ranks)
    vocab = {rank: token for token, rank in ranks.items()}
    if not isinstance(special_tokens, Mapping):
        special_tokens = {name: max(vocab) + 1 + index for index, name in enumerate(special_tokens)}
    for name, id in special_tokens.items():
        check_id(id, name, path)
        if vocab.setdefault(id, name.encode()) != name.encode():
            raise UserError(f"special token {name!r} has the id {id}, which belongs to {vocab[id]!r} in {path}")
    return TokenizerData(vocab, merges, dict(special_tokens), pattern, ignore_merges=bool(whole))


def recover_merges(ranks: Mapping[bytes, int]) -> tuple[list[tuple[bytes, bytes]], dict[bytes, int]]:
    """Return the merges by ascending rank, and the number of parts of each token that no merge produces."""
    merges: list[tuple[bytes, bytes]] = []
    whole: dict[bytes, int] = {}
    # Whether each token so far consists of two tokens of lower rank.
    ordered, pairs = True, _Pairs(ranks)
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) == 1:
            continue
        rank = ranks[token]
        if len(token) <= _SHORT:
            parts = _merge_short(token, ranks)
        elif not ordered or len(parts := _merge_at_once(token, ranks, rank)) > 2:
            parts = pairs.merge(token)
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
        else:
            whole[token] = len(parts)
        ordered = ordered and len(parts) == 2 and all(len(part) == 1 or ranks[part] < rank for part in parts)
    return merges, whole


def check_ranks(data: TokenizerData) -> None:
    """Raise a `UserError` unless the ids of the tokens, used as ranks, give the ids of the merges."""
    ranks = _ranks_of(data)
    recovered, whole = recover_merges(ranks)
    if whole and not data.ignore_merges:
        token = next(iter(whole))
        raise UserError(
            f"token {token!r}, rank {ranks[token]}, consists of {whole[token]} others: expected two, which a merge can join"
        )
    merges = set(data.merges)
    for left, right in recovered:
        if (left, right) not in merges:
            raise UserError(f"token {left + right!r} has no merge of {left!r} and {right!r}, which its id implies")
    products = [left + right for left, right in data.merges]
    for product in products:
        if product not in ranks:
            raise UserError(f"token {product!r} is special and the result of a merge: a file of ranks cannot store both")
    for first, second in pairwise(products):
        if ranks[first] > ranks[second]:
            raise UserError(f"token {second!r} has a lower id than {first!r} but merges after it")


def _ranks_of(data: TokenizerData) -> dict[bytes, int]:
    specials = set(data.special_tokens.values())
    return {data.vocab[id]: id for id in sorted(data.vocab) if id not in specials}


def _merge_short(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """Return the parts that the bytes of a token merge to, without the last merge to the token itself."""
    parts = [token[place : place + 1] for place in range(len(token))]
    found = [ranks.get(left + right, _NEVER) for left, right in pairwise(parts)]
    while len(parts) > 2 and (rank := min(found)) != _NEVER:
        place = found.index(rank)
        merged = parts[place] + parts[place + 1]
        parts[place : place + 2] = [merged]
        del found[place]
        if place:
            found[place - 1] = ranks.get(parts[place - 1] + merged, _NEVER)
        if place < len(found):
            found[place] = ranks.get(merged + parts[place + 1], _NEVER)
    return parts


def _merge_at_once(token: bytes, ranks: Mapping[bytes, int], limit: int) -> list[bytes]:
    """Merge by ranks below `limit`, given that each token consists of two tokens of lower rank."""
    parts = [token[place : place + 1] for place in range(len(token))]
    while len(parts) > 1:
        found = [min(ranks.get(left + right, limit), limit) for left, right in pairwise(parts)]
        rank = min(found)
        if rank == limit:
            break
        # Merge all places at once, from the left: a token may have millions of bytes.
        merged, place = [], 0
        while place < len(parts):
            size = 2 if place < len(found) and found[place] == rank else 1
            merged.append(b"".join(parts[place : place + size]))
            place += size
        parts = merged
    return parts


class _Pairs(dict[tuple[int, int], int]):
    """The `ranks` argument of `merge_pretoken`: the rank of the concatenation of two tokens. Ids are ranks."""

    def __init__(self, ranks: Mapping[bytes, int]):
        super().__init__()
        self._ranks, self._excluded = ranks, b""
        self._names: dict[int, bytes] = {}

    def merge(self, token: bytes) -> list[bytes]:
        """Return the result of `_merge_short` in O(n log n) steps."""
        self._names = self._names or {rank: name for name, rank in self._ranks.items()}
        self._excluded = token
        ids = merge_pretoken([self._ranks[token[k : k + 1]] for k in range(len(token))], self, range(max(self._names) + 1))
        return [self._names[id] for id in ids]

    def get(self, pair: tuple[int, int], default: int | None = None) -> int | None:  # pyright: ignore
        left, right = map(self._names.get, pair)
        made = left and right and left + right
        return self._ranks.get(made, default) if made and made != self._excluded else default

    def __contains__(self, pair: object) -> bool:
        return self.get(pair) is not None  # pyright: ignore

    def __getitem__(self, pair: tuple[int, int]) -> int:
        return self.get(pair)  # pyright: ignore


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    used: set[int] = set()
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            text, rank_text = line.split()
            token, rank = base64.b64decode(text, validate=True), int(rank_text)
        except (ValueError, binascii.Error):
            raise UserError(f"{path}, line {number} is {line[:60]!r}: expected a token in base64 and a rank") from None
        if not token or token in ranks or rank in used or rank < 0:
            raise UserError(f"{path}, line {number}: token {token!r} or rank {rank} is empty, negative or a duplicate")
        ranks[token] = rank
        used.add(rank)
    return ranks
