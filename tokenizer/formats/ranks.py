"""tiktoken's `.tiktoken` files: a line for each token, its bytes in base64 and its rank, which is its id.

There are no merges in them. A pretoken that is a token stays one; in any other, two neighbours merge where the vocabulary has
what they make, the lowest rank first and the leftmost of equals. Merges say the same if each is the last one that gives a
token when its bytes stand alone. (Proof: once the ends of a token are borders, its bytes merge alike wherever they stand, so
other halves of it never meet.) A token whose bytes give no single one is never merged: `ignore_merges` says that it is there
for pretokens. Special tokens and the pattern are not stored.
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

# Up to so many bytes a list of pairs is faster than a heap.
_SHORT = 48
_NEVER = 1 << 62


def save_tiktoken(path: Path | str, data: TokenizerData) -> None:
    """Write the ranks of all tokens but the special ones to `path`, atomically.

    Merges that ranks cannot stand for raise a `UserError`: the file would give other ids.
    """
    check_ranks(data)
    with atomic_file(path) as file:
        for token, rank in _ranks_of(data).items():
            file.write(b"%s %d\n" % (base64.b64encode(token), rank))


def load_tiktoken(
    path: Path | str, pattern: str = "gpt2", special_tokens: Mapping[str, int] | Sequence[str] = ()
) -> TokenizerData:
    """Read ranks and recover the merges from them.

    The file stores neither the `pattern` nor the special tokens; where these come without ids, they follow the last rank.
    A file that is missing or malformed raises a `UserError`.
    """
    ranks = _read_ranks(require_file(path, "ranks file"))
    for byte in range(256):
        if bytes([byte]) not in ranks:
            raise UserError(f"{path} lacks the byte {bytes([byte])!r}: all 256 are needed")
    merges, whole = recover_merges(ranks)
    vocab = {rank: token for token, rank in ranks.items()}
    if not isinstance(special_tokens, Mapping):
        special_tokens = {name: max(vocab) + 1 + index for index, name in enumerate(special_tokens)}
    for name, id in special_tokens.items():
        check_id(id, name, path)
        if vocab.setdefault(id, name.encode()) != name.encode():
            raise UserError(f"special token {name!r} has the id {id}, which is that of {vocab[id]!r} in {path}")
    return TokenizerData(vocab, merges, dict(special_tokens), pattern, ignore_merges=bool(whole))


def recover_merges(ranks: Mapping[bytes, int]) -> tuple[list[tuple[bytes, bytes]], dict[bytes, int]]:
    """Return the merges, by the ranks of what they make, and of how many others those tokens are made that no merge makes."""
    merges: list[tuple[bytes, bytes]] = []
    whole: dict[bytes, int] = {}
    # Whether each token so far is made of two lower ones.
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
    """Raise a `UserError` where the ids of the tokens, taken as ranks, give other ids than the merges do."""
    ranks = _ranks_of(data)
    recovered, whole = recover_merges(ranks)
    if whole and not data.ignore_merges:
        token = next(iter(whole))
        raise UserError(
            f"token {token!r}, rank {ranks[token]}, is made of {whole[token]} others: a merge needs two, but ranks need none"
        )
    merges = set(data.merges)
    for left, right in recovered:
        if (left, right) not in merges:
            raise UserError(f"token {left + right!r} has no merge of {left!r} and {right!r}, which is what its id stands for")
    products = [left + right for left, right in data.merges]
    for product in products:
        if product not in ranks:
            raise UserError(f"token {product!r} is special and made by a merge: a file of ranks cannot hold both")
    for first, second in pairwise(products):
        if ranks[first] > ranks[second]:
            raise UserError(f"token {second!r} has a lower id than {first!r} but merges after it")


def _ranks_of(data: TokenizerData) -> dict[bytes, int]:
    specials = set(data.special_tokens.values())
    return {data.vocab[id]: id for id in sorted(data.vocab) if id not in specials}


def _merge_short(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """Return what the bytes of a token merge to, if they do not merge to the token itself."""
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
    """Merge by ranks below `limit`, where each token is made of two lower ones."""
    parts = [token[place : place + 1] for place in range(len(token))]
    while len(parts) > 1:
        found = [min(ranks.get(left + right, limit), limit) for left, right in pairwise(parts)]
        rank = min(found)
        if rank == limit:
            break
        # All places at once, from the left: tokens may be millions of bytes long.
        merged, place = [], 0
        while place < len(parts):
            size = 2 if place < len(found) and found[place] == rank else 1
            merged.append(b"".join(parts[place : place + size]))
            place += size
        parts = merged
    return parts


class _Pairs(dict[tuple[int, int], int]):
    """What `merge_pretoken` asks for: the rank of what two tokens make. Ids are ranks."""

    def __init__(self, ranks: Mapping[bytes, int]):
        super().__init__()
        self._ranks, self._left_out = ranks, b""
        self._names: dict[int, bytes] = {}

    def merge(self, token: bytes) -> list[bytes]:
        """Do what `_merge_short` does, in no more than O(n log n) steps."""
        self._names = self._names or {rank: name for name, rank in self._ranks.items()}
        self._left_out = token
        ids = merge_pretoken([self._ranks[token[k : k + 1]] for k in range(len(token))], self, range(max(self._names) + 1))
        return [self._names[id] for id in ids]

    def get(self, pair: tuple[int, int], default: int | None = None) -> int | None:  # pyright: ignore
        left, right = map(self._names.get, pair)
        made = left and right and left + right
        return self._ranks.get(made, default) if made and made != self._left_out else default

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
            raise UserError(f"{path}, line {number}: {line[:60]!r} is not a token in base64 and a rank") from None
        if not token or token in ranks or rank in used or rank < 0:
            raise UserError(f"{path}, line {number}: token {token!r} and rank {rank} are empty, negative or there already")
        ranks[token] = rank
        used.add(rank)
    return ranks
