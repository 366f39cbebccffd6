"""The corpus of generated stories."""

import math
from pathlib import Path

from tqdm import tqdm

from ...errors import UserError
from ...files import atomic_file, require_absent
from .stories import generate_stories
from .text_shards import document


def check_stories(megabytes: float, seed: int) -> None:
    """Raise a `UserError` for an invalid size or seed."""
    if not 0 < megabytes < math.inf:
        raise UserError(f"the size of the corpus is {megabytes:g} MB: expected a finite number above 0")
    if seed < 0:
        raise UserError(f"seed is {seed}: expected 0 or more")


def write_stories(path: Path | str, megabytes: float, seed: int = 0) -> int:
    """Write stories to `path`, each followed by `END_OF_TEXT`, and return the number of bytes written.

    The file ends with the story that reaches `megabytes` (1 MB is 10**6 bytes). The same `seed` (0 or more) always gives the
    same bytes, and a smaller corpus is a prefix of a larger one. Raises a `UserError` if `path` exists.
    """
    path = require_absent(path)
    check_stories(megabytes, seed)
    wanted, written = megabytes * 1e6, 0
    # disable=None hides the bar unless the output is a terminal.
    bar = tqdm(desc=path.name, total=wanted, unit="B", unit_scale=True, disable=None)
    with atomic_file(path) as file, bar:
        for story in generate_stories(seed):
            size = file.write(document(story))
            bar.update(size)
            written += size
            if written >= wanted:
                break
    return written
