"""The compiled loop of the encoder: text to pretokens to ids. Each distinct pretoken is merged once and then cached.

The loop finds the pretokens of a group, hashes them, prefetches their cache entries, and then looks them up. For GPT-2's
pattern it finds the ends of pretokens itself, in 64 bytes of text at a time. For other patterns the ends are given.
"""

from ..compiled.intrinsics import (
    bytes_at,
    copy_bytes,
    count_ones,
    fill_list,
    int32s_at,
    int64s_at,
    load64,
    load_acquire,
    prefetch,
    release_gil,
    take_gil,
    trailing_zeros,
    uint8s_at,
    uint16s_at,
    uint32s_at,
    uint64s_at,
    words_at,
)
from ..compiled.jit import INT64, compiled, int64, uint64
from ..compiled.pretoken_keys import HIGH_MASKS, INLINE, LOW_MASKS, pretoken_key
from ..text.scanner import borders_gpt2, next_gpt2
from ..text.specials import may_hold_special
from .backtracking import merge_bytes
from .encoder import NO_ID
from .pretoken_cache import LONGEST, add_entry, find_entry, first_entry, has_room, write_cached, write_packed
from .rank_merging import merge_by_rank
from .workspace import BORDER, COUNT, FRAME_SIZE, GIVEN, GROUP, NEEDED, PLACES, SCANS, SIZE, SLACK, START, TOTAL, WINDOW

# Status codes, returned in place of the number of ids: the loop has to be called again.
CACHE_IS_FULL, OUTPUT_IS_FULL, MAY_HOLD_SPECIAL = range(-3, 0)
# Modes: begin a text; begin a text unless it may hold a special token; resume at the state in the frame.
BEGIN, PLAIN, RESUME = range(3)

# Text size above which the GIL is released. Less text is encoded in the time that other threads need to acquire it.
_MUCH_TEXT = 1 << 12

_ENTRIES, _TEXTS, _CACHED, _USED = (PLACES[name] for name in ("entries", "texts", "cached_ids", "used"))
_PAIRS, _SEEN, _PARTS, _SIZES = (PLACES[f"table_{name}"] for name in ("pairs", "seen", "parts", "sizes"))
_TOKEN_IDS, _SHORTER, _BRANCHES = (PLACES[f"table_{name}"] for name in ("ids", "shorter", "branches"))
_RANK_PAIRS, _BYTE_IDS, _RANKS = (PLACES[f"rank_{name}"] for name in ("pairs", "byte_ids", "ranks"))
_BEFORE, _AFTER, _HEAP = (PLACES[f"rank_{name}"] for name in ("before", "after", "heap"))
_FAILED, _NEIGHBOURS, _CLASSES, _BEGINNINGS = (PLACES[name] for name in ("failed", "neighbours", "classes", "beginnings"))
_KEYS, _ENDS, _GIVEN_ENDS, _TAIL = (PLACES[name] for name in ("keys", "ends", "given_ends", "tail"))
_BORDERS, _BORDER_IDS, _CUTS = (PLACES[name] for name in ("borders", "border_ids", "cuts"))
_OUT, _SHORT_OUT, _OBJECTS = (PLACES[name] for name in ("out", "short_out", "numbers"))


@compiled(INT64, INT64, INT64, INT64, releases_gil=False)
def encode_pretokens(frame_address, address, size, mode):
    """Write the ids of the `size` bytes at an address to the frame's `out`; return their number.

    For the frame see `EncoderWorkspace`. If the loop returns `CACHE_IS_FULL` or `OUTPUT_IS_FULL`, the frame holds its state
    and the ids so far, and the next call, with `RESUME`, continues.
    """
    frame = words_at(frame_address, FRAME_SIZE)
    entries, texts = uint64s_at(frame, _ENTRIES), uint8s_at(frame, _TEXTS)
    cached, used = uint32s_at(frame, _CACHED), uint64s_at(frame, _USED)
    keys, ends, tail, out = uint64s_at(frame, _KEYS), int64s_at(frame, _ENDS), uint8s_at(frame, _TAIL), uint32s_at(frame, _OUT)
    classes, given = uint8s_at(frame, _CLASSES), int64s_at(frame, _GIVEN_ENDS)
    borders, border_ids, cuts = int64s_at(frame, _BORDERS), uint32s_at(frame, _BORDER_IDS), int64s_at(frame, _CUTS)
    table = (
        uint64s_at(frame, _PAIRS),
        uint64s_at(frame, _SEEN),
        int32s_at(frame, _PARTS),
        int32s_at(frame, _SIZES),
        uint32s_at(frame, _TOKEN_IDS),
        int32s_at(frame, _SHORTER),
        uint64s_at(frame, _BRANCHES),
    )
    rank_pairs, byte_ids = uint64s_at(frame, _RANK_PAIRS), uint32s_at(frame, _BYTE_IDS)
    rank_scratch = (
        uint64s_at(frame, _RANKS),
        int32s_at(frame, _BEFORE),
        int32s_at(frame, _AFTER),
        uint64s_at(frame, _HEAP),
    )
    scratch = uint64s_at(frame, _FAILED), uint64s_at(frame, _NEIGHBOURS)
    if mode == PLAIN and may_hold_special(bytes_at(address, size), int64s_at(frame, _BEGINNINGS)):
        return int64(MAY_HOLD_SPECIAL)
    # Releasing the GIL takes as long as ten pretokens.
    state = release_gil() if size > _MUCH_TEXT else 0
    if mode != RESUME:
        frame[START] = frame[BORDER] = frame[TOTAL] = frame[SIZE] = 0
    start, border, done, scans = frame[START], frame[BORDER], frame[GIVEN], frame[SCANS]
    data = bytes_at(address, size if scans else size + SLACK)
    # Hot indices are unsigned: for a signed index, Numba emits a check for negative values.
    place = uint64(frame[SIZE])
    status = int64(0)
    while start < size:
        # Find the ends of the next pretokens, or a border.
        number = 0
        if scans:
            stop = borders[2 * border] if border < len(border_ids) else size
            at_border = start == stop
            border_end = borders[2 * border + 1] if at_border else int64(0)
            scanned = start
            while number < GROUP and scanned < stop:
                if scanned + WINDOW + SLACK > len(data):
                    if number:
                        break
                    # Address the padded copy of the end of the text with the offsets of the text.
                    copy_bytes(tail, 0, data, start, size - start)
                    data = bytes_at(frame[_TAIL] - start, start + len(tail))
                found = borders_gpt2(data, scanned, stop - scanned, classes)
                if found == 0:
                    ends[number] = scanned = next_gpt2(data, scanned, stop, classes)
                    number += 1
                    continue
                after = number + count_ones(found)
                # Write a fixed number of ends: a branch on their number would often be mispredicted.
                for k in range(20):
                    ends[uint64(number + k)] = scanned + trailing_zeros(found)
                    found &= found - uint64(1)
                k = uint64(number + 20)
                while found:
                    ends[k] = scanned + trailing_zeros(found)
                    found &= found - uint64(1)
                    k += uint64(1)
                number = after
                scanned = ends[number - 1]
        else:
            at_border = False
            border_end = int64(0)
            while number < GROUP and done + number < frame[COUNT]:
                end = given[done + number]
                if end <= 0:
                    at_border = number == 0
                    border_end = -end
                    break
                ends[number] = end
                number += 1
            if number == 0 and not at_border:
                break
        if at_border:
            cuts[border] = frame[TOTAL] + int64(place)
            if border_ids[border] != NO_ID:
                if place == uint64(len(out)):
                    frame[NEEDED] = 1
                    status = int64(OUTPUT_IS_FULL)
                    break
                out[place] = border_ids[border]
                place += uint64(1)
            border += 1
            done += 1
            start = border_end
            continue
        group = uint64(number)
        if int64(place) + ends[number - 1] - start + 2 > len(out):
            frame[NEEDED] = ends[number - 1] - start
            status = int64(OUTPUT_IS_FULL)
            break
        # The inner loops contain no call, so they keep their variables in registers.
        begin, k = start, uint64(0)
        while k < group:
            while k < group:
                length = uint64(ends[k] - begin)
                if length > uint64(INLINE):
                    break
                low = load64(data, begin) & LOW_MASKS[length]
                high = load64(data, begin + 8) & HIGH_MASKS[length]
                entry = first_entry(entries, low, high, length)
                prefetch(entries, int64(entry))
                at = uint64(3) * k
                keys[at], keys[at + uint64(1)], keys[at + uint64(2)] = low, high, entry
                begin = ends[k]
                k += uint64(1)
            if k < group:
                size_of_long = ends[k] - begin
                if size_of_long <= LONGEST:
                    low, high = pretoken_key(data, begin, size_of_long)
                    entry = first_entry(entries, low, high, uint64(size_of_long))
                    at = uint64(3) * k
                    keys[at], keys[at + uint64(1)], keys[at + uint64(2)] = low, high, entry
                begin = ends[k]
                k += uint64(1)
        k = uint64(0)
        while True:
            # The most frequent case: a short pretoken with few ids in its first entry.
            while k < group:
                at = uint64(3) * k
                entry = keys[at + uint64(2)]
                value = load_acquire(entries, entry + uint64(3))
                length = uint64(ends[k] - start)
                differs = entries[entry] ^ keys[at] | entries[entry + uint64(1)] ^ keys[at + uint64(1)]
                differs |= entries[entry + uint64(2)] ^ length
                if differs != uint64(0) or length > uint64(INLINE) or value & uint64(3) == uint64(0):
                    break
                place = write_packed(value, out, place)
                start = ends[k]
                k += uint64(1)
            if k == group:
                break
            end, size_of_this = ends[k], ends[k] - start
            at = uint64(3) * k
            low, high, entry = keys[at], keys[at + uint64(1)], keys[at + uint64(2)]
            value = uint64(0)
            can_be_cached = size_of_this <= LONGEST
            if can_be_cached:
                entry, value = find_entry(entries, texts, entry, low, high, data, start, size_of_this)
                can_be_cached = entry < uint64(len(entries))
            if value:
                place = write_cached(value, cached, out, place)
            elif can_be_cached and not has_room(entries, texts, cached, used, size_of_this):
                status = int64(CACHE_IS_FULL)
                break
            else:
                if len(rank_pairs):
                    count = merge_by_rank(rank_pairs, byte_ids, rank_scratch, data, start, size_of_this, out, int64(place))
                else:
                    count = merge_bytes(table, scratch, data, start, end, out, int64(place)) - int64(place)
                if can_be_cached:
                    add_entry(entries, texts, cached, used, entry, low, high, data, start, size_of_this, out, place, count)
                place += uint64(count)
            start = end
            k += uint64(1)
        done += int64(k)
        if status < 0:
            break
    frame[START], frame[BORDER], frame[GIVEN], frame[SIZE] = start, border, done, int64(place)
    short_out = uint16s_at(frame, _SHORT_OUT)
    if status == 0 and place <= uint64(len(short_out)):
        for k in range(place):
            short_out[k] = out[k]
    if state != 0:
        take_gil(state)
    return status if status < 0 else int64(place)


@compiled(INT64, INT64, INT64, releases_gil=False)
def write_list(frame_address, list_address, size):
    """Set the items of a Python list of `size` items to the int objects of the ids in the frame's `out`."""
    frame = words_at(frame_address, FRAME_SIZE)
    fill_list(list_address, uint64s_at(frame, _OBJECTS), uint32s_at(frame, _OUT), size)
    return size
