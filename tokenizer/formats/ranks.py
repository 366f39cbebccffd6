"""tiktoken's `.tiktoken` files: a line for each token, its bytes in base64 and its rank, which is its id.

There are no merges in them: two neighbours merge where the vocabulary has what they make, the lowest rank first. Merges
say the same where every token, merged by the ranks below its own, ends as the two halves that its merge names. (Proof: a
token's bytes, once their ends are borders, merge alike wherever they stand, so at the token's rank they are those halves
everywhere, and no other halves of it ever meet.) Special tokens and the pattern are not stored.
"""

import base64
import binascii
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from ...errors import UserError
from ...files import atomic_file, require_file
from .tokenizer_data import TokenizerData, check_id


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
    A file that is missing or malformed, and ranks that merges cannot stand for, raise a `UserError`.
    """
    ranks = _read_ranks(require_file(path, "ranks file"))
    merges = list(recover_merges(ranks))
    vocab = {rank: token for token, rank in ranks.items()}
    if not isinstance(special_tokens, Mapping):
        special_tokens = {name: max(vocab) + 1 + index for index, name in enumerate(special_tokens)}
    for name, id in special_tokens.items():
        check_id(id, name, path)
        if vocab.setdefault(id, name.encode()) != name.encode():
            raise UserError(f"special token {name!r} has the id {id}, which is that of {vocab[id]!r} in {path}")
    return TokenizerData(vocab, merges, dict(special_tokens), pattern)


def recover_merges(ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Yield the merge of each token of more than one byte, by ascending rank.

    A token that lower ranks do not make of two others raises a `UserError`.
    """
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) > 1:
            parts = _merge_below(token, ranks, ranks[token])
            if len(parts) != 2:
                raise UserError(f"token {token!r}, rank {ranks[token]}, is made of {len(parts)} others: a merge needs two")
            yield parts[0], parts[1]


def check_ranks(data: TokenizerData) -> None:
    """Raise a `UserError` where the ids of the tokens, taken as ranks, give other ids than the merges do."""
    ranks = _ranks_of(data)
    merges = set(data.merges)
    for left, right in recover_merges(ranks):
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


def _merge_below(token: bytes, ranks: Mapping[bytes, int], limit: int) -> list[bytes]:
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
