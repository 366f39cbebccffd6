"""The corpus of stories, written by the generator."""

import math
from pathlib import Path

from tqdm import tqdm

from ...errors import UserError
from ...files import atomic_file, require_absent
from .stories import generate_stories
from .text_shards import document


def check_stories(megabytes: float, seed: int) -> None:
    """Raise a `UserError` for a size or a seed that no corpus can have."""
    if not 0 < megabytes < math.inf:
        raise UserError(f"the size of a corpus is a positive number of megabytes, not {megabytes}")
    if seed < 0:
        raise UserError(f"a seed is 0 or more, not {seed}")


def write_stories(path: Path | str, megabytes: float, seed: int = 0) -> int:
    """Write stories to `path`, each followed by `END_OF_TEXT`, and return the number of bytes written.

    The file ends with the first whole story at or past `megabytes` (1 MB is 10**6 bytes). The same `seed` (0 or more) gives
    the same bytes, and a larger corpus begins with the smaller one. Raises `UserError` if `path` exists already.
    """
    path = require_absent(path)
    check_stories(megabytes, seed)
    wanted, written = megabytes * 1e6, 0
    # disable=None: silent where the output is not a terminal.
    bar = tqdm(desc=path.name, total=wanted, unit="B", unit_scale=True, disable=None)
    with atomic_file(path) as file, bar:
        for story in generate_stories(seed):
            size = file.write(document(story))
            bar.update(size)
            written += size
            if written >= wanted:
                break
    return written
