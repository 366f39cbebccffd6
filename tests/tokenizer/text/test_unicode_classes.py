import hashlib

import numpy as np

from tilewright.tokenizer.text.unicode_classes import HAN_KANA, class_table, classes_by_regex, packed_runs, unpacked


def test_the_shipped_table_equals_regex():
    assert np.array_equal(class_table(), classes_by_regex())


def test_the_shipped_table_never_changes():
    # Another table would give other ids under the same fingerprints.
    assert (
        hashlib.sha256(class_table().tobytes()).hexdigest()
        == "c298680a5e37609135544186a246a7769da6a829d7bdc2912306e1b6bc97e3de"
    )


def test_round_trip_of_packed_runs():
    table = np.random.default_rng(0).integers(0, 3, 0x110000).astype(np.uint8) << 5
    assert np.array_equal(unpacked(packed_runs(table)), table)


def test_han_and_kana_equal_deepseeks_ranges():
    codes = np.flatnonzero(class_table() & HAN_KANA)
    assert codes.tolist() == [*range(0x3040, 0x3100), *range(0x4E00, 0x9FA6)]
