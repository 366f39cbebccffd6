"""Count the distinct pretokens of any amount of text: in parallel, in bounded memory, with a deterministic result."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial, reduce
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ...errors import UserError
from ..compiled.work import Work
from ..text import specials, utf8
from ..text.block_borders import borders_of
from ..text.patterns import check_special_tokens, pattern_name, resolve_pattern, split_pretokens
from ..text.scanner import Scanner, compiled_scanner, scanner_of
from ..text.sources import BLOCK_BYTES, Block, Inputs, iter_blocks, resolve, text_bytes
from ..text.specials import SpecialFinder
from ..workers import POOL_BYTES, choose_workers, map_in_threads, ordered_map
from . import counter, pretoken_counts
from .counter import PretokenCounter
from .counts_file import CountedText
from .pretoken_counts import PretokenCounts, merge_counts, sorted_by_hash
from .spill import Spill

# Minimum per worker: with less, the disk would fill with tiny runs.
LEAST_MEMORY = 1 << 24

# Pretokens per call into compiled code: enough to amortize the call, few enough for the processor's cache.
_BATCH = 1 << 15

# Limit for a block, and for the long pretokens counted before it: their sum stays within the table's 32 bits.
_MOST_BYTES = 1 << 31


def count_text(
    inputs: Inputs,
    special_tokens: Sequence[str] = (),
    *,
    pattern: str = "gpt2",
    num_workers: int | None = None,
    memory: int | None = None,
    scratch: Path | str | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> CountedText:
    """Return the number of occurrences of each pretoken.

    Special tokens and the ends of documents bound pretokens and are not counted. The counts and their order do not depend on
    `num_workers` (None: one per core, or one for little text) or `block_bytes`. Workers are threads for the patterns with a
    compiled scanner, and processes for other patterns. When the tables of all workers take more than about `memory` bytes,
    they are spilled to a temporary folder in `scratch` (None: the system's) and merged from there. Invalid UTF-8 becomes
    U+FFFD. For errors in the inputs see `iter_blocks`; a full disk and a killed worker raise a `UserError` too.
    """
    special_tokens = check_special_tokens(special_tokens)
    inputs = resolve(inputs)
    size = text_bytes(inputs)
    num_workers = choose_workers(num_workers, POOL_BYTES if size is None else size)
    if memory is not None and memory < (least := LEAST_MEMORY * num_workers):
        raise UserError(f"memory is {memory} bytes: expected at least {least} for {num_workers} workers")
    name, expression = pattern_name(pattern), resolve_pattern(pattern)
    source = iter_blocks(inputs, special_tokens, pattern=pattern, block_bytes=block_bytes)
    read = weighed = 0

    def checked_blocks() -> Iterator[Block]:
        nonlocal read, weighed
        for block in source:
            # An upper bound of all counts, of pretokens and of pairs.
            weighed += len(block.data) * block.weight
            if weighed >= 1 << 63:
                raise UserError(f"the text has {weighed} bytes times weights, but counts have 64 bits: choose smaller weights")
            yield block
            read += len(block.data)
            bar.update(len(block.data))

    with Spill(scratch) as spill, tqdm(total=size, desc="counting pretokens", unit="B", unit_scale=True, disable=None) as bar:
        allowance = None if memory is None else memory // num_workers
        new_part = partial(_Part, spill, allowance)
        blocks = checked_blocks()
        # The memory limit does not cover a Python dictionary.
        few, blocks = _count_little(blocks, size, expression, special_tokens) if memory is None else (None, blocks)
        parts: list[_Part] = []
        if blocks is not None and name:
            count = partial(_count_block, scanner_of(name), SpecialFinder(special_tokens))
            parts = _count_in_threads(count, blocks, num_workers, new_part)
        elif blocks is not None:
            parts = [new_part()]
            for block, counts in ordered_map(_count_by_regex, (expression, special_tokens), blocks, num_workers):
                parts[0].add(counts.data, 0, counts.ends, counts.counts * block.weight)
        if not read:
            raise UserError("the input holds no text: expected at least one byte")
        return CountedText(_sum(parts, few, spill), name or expression, special_tokens, read)


@cache
def _counting(expression: str) -> Work:
    """Return the `Work` of counting pretokens of this pattern; a unit is a byte."""
    name = pattern_name(expression)
    functions = [*([compiled_scanner(name)] if name else []), utf8, specials, counter, pretoken_counts]
    return Work("counter", functions, units_per_second=2e6, compile_seconds=7)


def _count_little(
    blocks: Iterator[Block], size: int | None, expression: str, special_tokens: tuple[str, ...]
) -> tuple[PretokenCounts | None, Iterator[Block] | None]:
    """Count in plain Python until compiling is worthwhile; return the counts and the remaining blocks, None for none."""
    work = _counting(expression)
    if work.is_compiled(size or 0):
        return None, blocks
    totals: Counter[bytes] = Counter()
    for block in blocks:
        if size is None and work.is_compiled(len(block.data)):
            return sorted_by_hash(totals) if totals else None, chain([block], blocks)
        for pretoken, count in _count_by_regex((expression, special_tokens), block).items():
            totals[pretoken] += count * block.weight
    return sorted_by_hash(totals), None


class _Part:
    """The counts of one worker that are in memory."""

    def __init__(self, spill: Spill, allowance: int | None):
        self._spill, self._allowance = spill, allowance
        self._counter = PretokenCounter()

    def add(self, data: np.ndarray, start: int, ends: np.ndarray, counts: np.ndarray) -> None:
        if len(data) > _MOST_BYTES:
            raise UserError(
                f"{len(data)} bytes of text have no place to cut them: expected at most {_MOST_BYTES} between two places"
            )
        self._counter.add(data, start, ends, counts)
        # The table doubles when it is half full, and both copies are in memory then; sorting takes less.
        full = self._allowance is not None and 3 * self._counter.num_bytes > self._allowance
        if full or self._counter.long_bytes > _MOST_BYTES:
            self.spill()

    def spill(self) -> None:
        self._spill.add(self.counts())

    def counts(self) -> PretokenCounts:
        """Return the counts and reset the counter."""
        counts = self._counter.counts()
        self._counter = PretokenCounter()
        return counts


def _sum(parts: list[_Part], few: PretokenCounts | None, spill: Spill) -> PretokenCounts:
    if len(spill):
        for part in parts:
            part.spill()
        if few is not None:
            spill.add(few)
        return spill.merged()
    counts = [*([few] if few is not None else []), *(part.counts() for part in parts)]
    return reduce(merge_counts, counts)


def _count_in_threads(
    count: Callable[[Block, _Part], None], blocks: Iterator[Block], num_workers: int, new_part: Callable[[], _Part]
) -> list[_Part]:
    idle = [new_part() for _ in range(num_workers)]

    def work(block: Block) -> None:
        # list.pop and list.append are atomic.
        part = idle.pop()
        count(block, part)
        idle.append(part)

    for _ in map_in_threads(work, blocks, num_workers):
        pass
    return idle


def _count_block(scan: Scanner, finder: SpecialFinder, block: Block, part: _Part) -> None:
    data, borders = borders_of(block, finder)
    counts = np.full(1, block.weight, np.int64)
    ends = np.empty(_BATCH, np.int64)
    start = 0
    while start < len(data):
        found = scan(data, start, len(data), ends, borders)
        part.add(data, start, ends[:found], counts)
        start = abs(int(ends[found - 1]))


def _count_by_regex(shared: tuple[str, tuple[str, ...]], block: Block) -> PretokenCounts:
    pattern, special_tokens = shared
    counts: Counter[str] = Counter()
    start = 0
    for end in block.ends.tolist():
        text = block.data[start:end].tobytes().decode(errors="replace")
        for run, _ in split_pretokens([text], special_tokens, pattern=pattern):
            counts.update(run)
        start = end
    return PretokenCounts.of({pretoken.encode(): count for pretoken, count in counts.items()})
