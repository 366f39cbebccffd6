"""Parallel encoding of many texts to token shards. Each shard is resumable, and the number of workers does not change it."""

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
    """Stops the other encodings after one has failed."""


def default_folder(path: Path) -> Path:
    """Return the folder for the shards of a folder or a glob of texts: the path of the text folder with the suffix .tokens."""
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
    """Encode files, folders and globs of texts or chats to token shards in `folder`, one per file, and return the shards.

    Shards are in the order of the texts. Existing shards are kept and checked as in `open_encoded`. A second call, after an
    interruption or with more texts, encodes the missing shards. An index lists the shards. While shards are missing, it lists
    them without hashes, so that the folder cannot be opened. `indexed=False` does not write or change the index.
    """
    files = _files_by_shard(texts, folder)
    if indexed and not all(tokens.exists() for tokens in files):
        announce_shards(folder, [tokens.name for tokens in files])
    sizes = {tokens: text.stat().st_size for tokens, text in files.items()}
    workers = choose_workers(num_workers, sum(sizes.values()))
    # In threads, several files are encoded at once. With subprocesses, one file at a time, because each starts its own pool.
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

    # The largest file first, so that no worker is left alone with it at the end.
    found = _map(encode, sorted(files, key=lambda tokens: -sizes[tokens]), at_once, f"encoding {len(files):,} files", total)
    shards = [found[tokens] for tokens in files]
    if indexed:
        write_index(folder, shards)
    return shards


def _files_by_shard(texts: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """Return the text of each shard. A shard is named by the relative path of its text, so that more texts change no name."""
    files: dict[Path, Path] = {}
    for path in texts:
        for source in resolve(path):
            assert isinstance(source, Files)
            text = Path(source.path)
            _require_text(text, path)
            tokens = folder / ("-".join(text.relative_to(_base(path)).parts) + ENDING)
            if tokens in files:
                raise UserError(f"{text} and {files[tokens]} would both be encoded to {tokens.name}; rename one of them")
            files[tokens] = text
    return files


def _require_text(text: Path, named: Path) -> None:
    # In a folder, .json files are tokenizers, indices and records. A .json file that is named directly is a text.
    if text.suffix in (ENDING, ".part") or (text.suffix == ".json" and named.is_dir()):
        raise UserError(f"{named} has {text}, which is not a text; name a folder, or a quoted glob, of texts only")


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
    """Run `encode` for each task in `at_once` threads with one progress bar. An error in one task stops all."""
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
