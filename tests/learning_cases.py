"""A naive BPE trainer as the reference, and random inputs for trainers."""

import itertools
from collections import Counter

from tilewright.tokenizer.formats import from_printable, to_printable

# Small alphabets produce ties and long runs; the others contain bytes that sort differently in GPT-2's alphabet.
ALPHABETS = (b"a", b"ab", b"abc", b"\x00\x01", b"etaoin \xc3\xa9\xad", bytes(range(256)))


def naive_merges(counts, num_merges, ties="cs336", min_frequency=1, max_token_length=None, known=()):
    """Return the merges, recounting all pairs for each merge."""
    ids = {from_printable(character): id for id, character in enumerate(sorted(to_printable(bytes(range(256)))))}
    words = [([bytes([byte]) for byte in word], count) for word, count in counts.items()]
    merges = []
    while len(merges) < num_merges:
        frequencies = Counter()
        for word, count in words:
            for pair in itertools.pairwise(word):
                frequencies[pair] += count
        pairs = [pair for pair, frequency in frequencies.items() if frequency >= min_frequency]
        pairs = [pair for pair in pairs if max_token_length is None or len(pair[0] + pair[1]) <= max_token_length]
        if len(merges) < len(known):
            best = known[len(merges)]
        elif not pairs:
            break
        elif ties == "cs336":
            best = max(pairs, key=lambda pair: (frequencies[pair], pair))
        else:
            best = min(pairs, key=lambda pair: (-frequencies[pair], ids[pair[0]], ids[pair[1]]))
        merges.append(best)
        ids.setdefault(best[0] + best[1], len(ids))
        for word, _ in words:
            place = 0
            while place + 1 < len(word):
                if (word[place], word[place + 1]) == best:
                    word[place : place + 2] = [best[0] + best[1]]
                place += 1
    return merges


def random_counts(rng):
    letters = rng.choice(ALPHABETS)
    counts = {}
    for _ in range(rng.randint(1, 12)):
        counts[bytes(rng.choices(letters, k=rng.randint(1, rng.choice([3, 8, 40]))))] = rng.choice([1, 1, 2, 3, 100])
    return counts
