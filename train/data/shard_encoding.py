"""Many texts encoded to token shards: several at once, each resumed by itself, the same for any number of workers."""

import glob
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from ...errors import UserError
from ...tokenizer import AnyTokenizer
from ...tokenizer.chat_template import ChatTemplate
from ...tokenizer.encode_file import Advance, encodes_in_threads
from ...tokenizer.text.sources import Files, resolve, text_bytes
from ...tokenizer.workers import POOL_BYTES, choose_workers
from .encoded_file import open_encoded
from .shards import ENDING, announce_shards, write_index
from .token_file import TokenDataset


class _Stopped(Exception):
    """Ends the encodings that still run when one has failed."""


def default_folder(path: Path) -> Path:
    """Return where the shards of a folder or a glob of texts go: beside the folder, under its name and the ending .tokens."""
    folder = _base(path).resolve()
    return folder.with_name(folder.name + ENDING)


def encode_shards(
    texts: Sequence[Path],
    folder: Path,
    tokenizer: AnyTokenizer,
    template: ChatTemplate | None = None,
    num_workers: int | None = None,
    indexed: bool = True,
) -> list[TokenDataset]:
    """Encode files, folders and globs of texts or chats to token shards in `folder`, one a file, with an index; return them.

    Shards are in the order of the texts, whatever the number of workers. Those that are there stay, and are checked as
    `open_encoded` does. Until all are whole, the index names those to come, so that nobody reads the folder; without
    `indexed` it is left alone. Called again after an interruption, or with more texts, this goes on from there.
    """
    files = _files_by_shard(texts, folder)
    if indexed and not all(tokens.exists() for tokens in files):
        announce_shards(folder, [tokens.name for tokens in files])
    sizes = {tokens: text.stat().st_size for tokens, text in files.items()}
    workers = choose_workers(num_workers, sum(sizes.values()))
    # Small files keep one worker busy each. Where processes encode, each text starts its own.
    at_once = min(workers, len(files)) if encodes_in_threads(tokenizer) else 1
    known = [text_bytes(text) for text in files.values()]
    total = None if None in known else sum(size or 0 for size in known)
    tokenizer.expect(total or sum(sizes.values()))

    def encode(tokens: Path, advance: Advance) -> TokenDataset:
        own = workers // at_once if sizes[tokens] >= POOL_BYTES else 1
        exists = tokens.exists()
        dataset = open_encoded(files[tokens], tokens, tokenizer, template, own, advance)
        if exists:
            advance(dataset.header.text_bytes)
        return dataset

    # The largest first, so that none is left to a single worker at the end.
    found = _map(encode, sorted(files, key=lambda tokens: -sizes[tokens]), at_once, f"encoding {len(files):,} files", total)
    shards = [found[tokens] for tokens in files]
    if indexed:
        write_index(folder, shards)
    return shards


def _files_by_shard(texts: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """Return the text of each shard. Its name is the text's in its folder, so that more texts change no name."""
    files: dict[Path, Path] = {}
    for path in texts:
        for source in resolve(path):
            assert isinstance(source, Files)
            text = Path(source.path)
            _require_text(text, path)
            tokens = folder / ("-".join(text.relative_to(_base(path)).parts) + ENDING)
            if tokens in files:
                raise UserError(f"{text} and {files[tokens]} would both be {tokens.name}: name one of them differently")
            files[tokens] = text
    return files


def _require_text(text: Path, named: Path) -> None:
    # A folder's tokenizer, indices and records are no texts; whoever names such a file itself means it.
    if text.suffix in (ENDING, ".part") or (text.suffix == ".json" and named.is_dir()):
        raise UserError(f"{named} has {text}, which is no text: name a folder, or a quoted glob, of texts alone")


def _base(path: Path) -> Path:
    if path.is_dir():
        return path
    base = path.parent
    while glob.has_magic(str(base)):
        base = base.parent
    return base


def _map(
    encode: Callable[[Path, Advance], TokenDataset], tasks: Sequence[Path], at_once: int, what: str, total: int | None
) -> dict[Path, TokenDataset]:
    """Return `encode` of each task, `at_once` in threads under one progress bar; an error in one ends all."""
    stop, lock = threading.Event(), threading.Lock()

    def advance(num_bytes: int) -> None:
        if stop.is_set():
            raise _Stopped
        with lock:
            bar.update(num_bytes)

    with (
        tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=None) as bar,
        ThreadPoolExecutor(at_once) as pool,
    ):
        running = {pool.submit(encode, task, advance): task for task in tasks}
        try:
            return {running[future]: future.result() for future in as_completed(running)}
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
