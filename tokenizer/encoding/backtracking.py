"""Merge the bytes of a text in linear time, by a search for the final tokens.

If the parts of each merge are produced by earlier merges, as in training, then any two adjacent tokens of the result, joined,
merge to exactly these two tokens: the first merge across a border would not depend on the rest of the text. No other sequence
of tokens has this property, because merging has a unique result. The search therefore takes the longest token that is
compatible with the previous token, and backtracks if there is none. The tokens before a place are the result for the text up
to it, so no place fails twice. `reference.py` is the specification. The idea is from the crate `bpe`
(github.com/github/rust-gems).
"""

from typing import NamedTuple

import numpy as np

from ..compiled.jit import BYTES, INT32S, INT64S, UINT8S, UINT32S, UINT64S, compiled, helper, tuple_of, uint64
from .decoder import TokenTable

_NONE = -1
# Two tokens and their product share a word of the table.
_TOKEN_BITS = 21
_ANY = 1 << _TOKEN_BITS
# A larger table would not fit into the processor's cache.
_NEIGHBOUR_BITS = 14
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
# A word of the tree holds a node and a byte, and in its low bits the child node.
_NODE_BITS = np.uint64(28)
_NODE = np.uint64((1 << 28) - 1)


class MergeTable(NamedTuple):
    """The merges and tokens. Tokens are numbered in the order they are made: 0..255 are the bytes, 256 + i is merge i.

    `pairs` is a hash table from two tokens to their product. `seen` is a bitmap of the hashes of its keys; it rejects most
    pairs that do not merge. Token t consists of `parts[2 * t]` and `parts[2 * t + 1]`, has `sizes[t]` bytes and the id
    `ids[t]`; `shorter[t]` is its longest proper prefix that is a token. `branches` is a hash table from a node and a byte to
    the child node in the tree (trie) of all tokens. The node of a token has the token's number; other nodes have higher
    numbers.
    """

    pairs: np.ndarray
    seen: np.ndarray
    parts: np.ndarray
    sizes: np.ndarray
    ids: np.ndarray
    shorter: np.ndarray
    branches: np.ndarray


class Scratch(NamedTuple):
    """Buffers of the search: a bitmap of failed places, and a cache of pairs of adjacent tokens, one word each."""

    failed: np.ndarray
    neighbours: np.ndarray


SCRATCH = tuple_of(Scratch, UINT64S, UINT64S)
MERGE_TABLE = tuple_of(MergeTable, UINT64S, UINT64S, INT32S, INT32S, UINT32S, INT32S, UINT64S)


def merge_table(merges: np.ndarray, byte_ids: np.ndarray, tokens: TokenTable) -> MergeTable | None:
    """Return the table of merges, or None if their order does not allow the search.

    `merges`, int64 of shape (n, 3), holds the ids of left, right and merged token; `byte_ids`, int64, the ids of the bytes.
    """
    num_tokens = 256 + len(merges)
    if num_tokens > _ANY:
        return None
    pairs = _hash_table(len(merges))
    table = MergeTable(
        pairs=pairs,
        seen=np.zeros(len(pairs) // 8, np.uint64),
        parts=np.zeros(2 * num_tokens, np.int32),
        sizes=np.ones(num_tokens, np.int32),
        ids=np.zeros(num_tokens, np.uint32),
        shorter=np.full(num_tokens, _NONE, np.int32),
        branches=_hash_table(0),
    )
    table.ids[:256] = byte_ids
    number = np.full(len(tokens.sizes), _NONE, np.int64)
    number[byte_ids] = np.arange(256)
    missed = np.zeros(len(number), np.uint8)
    if not _add_merges(table, merges.reshape(-1), number, missed):
        return None
    # Add shorter tokens first, so that the nodes of prefixes that are tokens exist.
    made = 256 + np.flatnonzero(table.sizes[256:] > 1)
    made = made[np.argsort(table.sizes[made], kind="stable")]
    # The path of the left part exists, so only the right part adds nodes.
    most_branches = int(table.sizes[table.parts[2 * made + 1]].sum())
    if num_tokens + most_branches > _NODE:
        return None
    table = table._replace(branches=_hash_table(most_branches))
    _add_tokens(table, made, tokens.data, tokens.offsets)
    return table


def no_merge_table() -> MergeTable:
    """Return an empty table, for use with a `RankTable`."""
    words, numbers = np.empty(0, np.uint64), np.empty(0, np.int32)
    return MergeTable(words, words, numbers, numbers, np.empty(0, np.uint32), numbers, words)


def new_scratch(num_bytes: int) -> Scratch:
    """Return the buffers for a text of `num_bytes` bytes; each belongs to one table of merges."""
    return Scratch(np.empty((num_bytes >> 6) + 1, np.uint64), np.zeros(1 << _NEIGHBOUR_BITS, np.uint64))


def _hash_table(most: int) -> np.ndarray:
    return np.zeros(1 << max(4, (most * 8 // 5).bit_length()), np.uint64)


@helper
def _merged(pairs, seen, left, right):
    """Return the token that two tokens merge to, or `_ANY`, which is above all tokens, if they do not merge."""
    key = uint64(left) << uint64(_TOKEN_BITS) | uint64(right)
    place = key * _SPREAD
    bit = place >> uint64(34) & uint64(len(seen) * 64 - 1)
    if not seen[bit >> uint64(6)] >> (bit & uint64(63)) & uint64(1):
        return np.int64(_ANY)
    mask = uint64(len(pairs) - 1)
    place = place >> uint64(40) & mask
    while True:
        entry = pairs[place]
        if entry >> uint64(_TOKEN_BITS) == key and entry:
            return np.int64(entry & uint64(_ANY - 1))
        if entry == 0:
            return np.int64(_ANY)
        place = (place + uint64(1)) & mask


@helper
def _stay_apart(pairs, seen, parts, left, right, limit):
    """Return whether no merge before `limit` crosses the border of two adjacent tokens.

    Undo the merges, the last one first. After each, check whether the tokens at the border would have merged before it. Of
    equal merges, the left one is applied first.
    """
    while True:
        if _merged(pairs, seen, left, right) < limit:
            return False
        if left > right:
            if left < 256:
                return True
            limit = left
            left = np.int64(parts[2 * left + 1])
        else:
            if right < 256:
                return True
            limit = right + 1
            right = np.int64(parts[2 * right])


@helper
def _are_neighbours(pairs, seen, parts, known, left, right):
    """Return whether two tokens can be adjacent; the result is cached, one entry per hash."""
    key = uint64(left) << uint64(_TOKEN_BITS) | uint64(right)
    place = (key * _SPREAD) >> uint64(64 - _NEIGHBOUR_BITS)
    # Two more bits: whether the entry is used, and the answer.
    if known[place] >> uint64(1) != (key << uint64(1) | uint64(1)):
        apart = uint64(_stay_apart(pairs, seen, parts, left, right, np.int64(_ANY)))
        known[place] = key << uint64(2) | uint64(2) | apart
    return known[place] & uint64(1) != 0


@compiled(MERGE_TABLE, INT64S, INT64S, UINT8S)
def _add_merges(table, merges, number, missed):
    """Add the merges that can ever apply; `number` maps ids to tokens. Return False for an unsupported order.

    `missed` is 1 for ids that were part of a merge before a merge produced them.
    """
    mask = uint64(len(table.pairs) - 1)
    for merge in range(len(merges) // 3):
        left, right, id = merges[3 * merge], merges[3 * merge + 1], merges[3 * merge + 2]
        if number[left] == _NONE:
            missed[left] = 1
        if number[right] == _NONE:
            missed[right] = 1
        left, right = number[left], number[right]
        if left == _NONE or right == _NONE or number[id] != _NONE:
            continue
        token = 256 + merge
        # Otherwise other merges always split the text of this token.
        if not _stay_apart(table.pairs, table.seen, table.parts, left, right, token):
            continue
        if missed[id]:
            return False
        number[id] = token
        table.parts[2 * token], table.parts[2 * token + 1] = left, right
        table.sizes[token] = table.sizes[left] + table.sizes[right]
        table.ids[token] = id
        key = uint64(left) << uint64(_TOKEN_BITS) | uint64(right)
        place = (key * _SPREAD) >> uint64(40) & mask
        while table.pairs[place]:
            place = (place + uint64(1)) & mask
        bit = (key * _SPREAD) >> uint64(34) & uint64(len(table.seen) * 64 - 1)
        table.seen[bit >> uint64(6)] |= uint64(1) << (bit & uint64(63))
        table.pairs[place] = key << uint64(_TOKEN_BITS) | uint64(token)
    return True


@helper
def _branch(branches, node, byte):
    """Return the place in `branches` of the edge from a node by a byte, or an empty place if there is none."""
    mask = uint64(len(branches) - 1)
    key = uint64(node) << uint64(8) | uint64(byte)
    place = (key * _SPREAD) >> uint64(32) & mask
    while branches[place] and branches[place] >> _NODE_BITS != key:
        place = (place + uint64(1)) & mask
    return place


@compiled(MERGE_TABLE, INT64S, BYTES, INT64S)
def _add_tokens(table, made, data, offsets):
    """Add the tokens to the tree, in order of increasing length."""
    next_node = len(table.sizes)
    for token in made:
        left = np.int64(table.parts[2 * token])
        start, end = offsets[table.ids[token]], offsets[table.ids[token] + 1]
        node = left
        for at in range(start + table.sizes[left], end):
            if node < len(table.sizes):
                table.shorter[token] = node
            place = _branch(table.branches, node, data[at])
            if table.branches[place] == 0:
                after = next_node
                if at + 1 == end:
                    after = token
                else:
                    next_node += 1
                table.branches[place] = (uint64(node) << uint64(8) | uint64(data[at])) << _NODE_BITS | uint64(after)
            node = np.int64(table.branches[place] & _NODE)


@helper
def _longest(branches, num_tokens, data, i, end):
    """Return the longest token that is a prefix of the text at i."""
    token = node = np.int64(data[i])
    for at in range(i + 1, end):
        branch = branches[_branch(branches, node, data[at])]
        if branch == 0:
            break
        node = np.int64(branch & _NODE)
        if node < num_tokens:
            token = node
    return token


@helper
def merge_bytes(table, scratch, data, start, end, out, begin):
    """Write the ids of `data[start:end]` to `out` from `begin` on, and return their end."""
    failed, known = scratch
    pairs, seen, parts, sizes, ids, shorter, branches = table
    for word in range((end - start >> 6) + 1):
        failed[word] = 0
    size = begin
    i = start
    token = _longest(branches, len(sizes), data, i, end)
    while True:
        after = i + sizes[token]
        at = after - start
        if not (failed[at >> 6] >> uint64(at & 63)) & uint64(1) and (
            size == begin or _are_neighbours(pairs, seen, parts, known, np.int64(out[size - 1]), token)
        ):
            out[size] = token
            size += 1
            i = after
            if i == end:
                break
            token = _longest(branches, len(sizes), data, i, end)
        elif shorter[token] != _NONE:
            token = np.int64(shorter[token])
        else:
            at = i - start
            failed[at >> 6] |= uint64(1) << uint64(at & 63)
            size -= 1
            token = np.int64(out[size])
            i -= sizes[token]
    for at in range(begin, size):
        out[at] = ids[out[at]]
    return size
