"""Corpora on disk: written by the story generator, or fetched from the Hugging Face hub."""

import json
import math
import os
import socket
import ssl
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from ...errors import UserError
from ...files import atomic_file, require_absent, write_text
from ...tokenizer import END_OF_TEXT
from .stories import generate_stories


def _document(text: str) -> bytes:
    return f"{text}\n{END_OF_TEXT}\n".encode()


def _progress(path: Path, total: float | None = None, initial: int = 0) -> "tqdm[Any]":
    # disable=None: silent where the output is not a terminal.
    return tqdm(desc=path.name, total=total, initial=initial, unit="B", unit_scale=True, disable=None)


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
    with atomic_file(path) as file, _progress(path, wanted) as bar:
        for story in generate_stories(seed):
            size = file.write(_document(story))
            bar.update(size)
            written += size
            if written >= wanted:
                break
    return written


@dataclass(frozen=True)
class Source:
    """A corpus that `datasets.load_dataset` can stream, and the splits that become train.txt and valid.txt."""

    path: str
    text_column: str = "text"
    train: str = "train"
    valid: str | None = "validation"
    """None: every `holdout`-th document of `train` is validation text."""
    holdout: int = 2000
    data_files: Mapping[str, str] | None = None
    """Local files by split, for a `path` such as "json" that names a format; None for a dataset on the hub."""


SOURCES: Mapping[str, Source] = {
    "tinystories": Source("roneneldan/TinyStories"),
    "openwebtext": Source("Skylion007/openwebtext", valid=None),
}


def fetch(name: str, folder: Path | str, source: Source | None = None, save_every: int = 32_000_000) -> None:
    """Download the corpus `name` into `folder` as train.txt and valid.txt, each document followed by `END_OF_TEXT`.

    An interrupted download goes on where its state was last saved, every `save_every` bytes, and gives the same bytes as one
    that was not interrupted; a finished file is not fetched again. `source` replaces the one in `SOURCES`. Raises `UserError`
    for an unknown name, for a missing `datasets` package, and when the hub cannot be reached.
    """
    if source is None and name not in SOURCES:
        raise UserError(f"there is no corpus {name!r}: the known ones are {', '.join(SOURCES)}")
    source = source or SOURCES[name]
    train, valid = (Path(folder) / file for file in ("train.txt", "valid.txt"))
    if source.valid is None:
        _Download(name, source, source.train, [train, valid]).run(save_every)
    else:
        _Download(name, source, source.train, [train]).run(save_every)
        _Download(name, source, source.valid, [valid]).run(save_every)


@dataclass
class _State:
    origin: dict[str, Any]
    documents: int
    sizes: list[int]
    position: dict[str, Any] | None
    """The dataset's own state; None before the first document."""
    complete: bool = False


class _Download:
    """One split on its way to one file, or to two: the second takes every `holdout`-th document."""

    def __init__(self, name: str, source: Source, split: str, outputs: list[Path]) -> None:
        self.name, self.source, self.split, self.outputs = name, source, split, outputs
        self.parts = [output.with_name(f"{output.name}.part") for output in outputs]
        self.state_file = outputs[0].with_name(f"{outputs[0].name}.state")

    def run(self, save_every: int) -> None:
        files = " and ".join(map(str, self.outputs))
        if not self.state_file.exists() and all(output.exists() for output in self.outputs):
            print(f"{files}: complete already, not fetched again")
            return
        state = self._saved_state()
        if not state.complete:
            for output in self.outputs:
                require_absent(output, "remove it to fetch it again")
            self._stream(state, save_every)
        # A crash between two renames leaves the complete state, and the next run renames the rest.
        for part, output in zip(self.parts, self.outputs, strict=True):
            if part.exists():
                part.replace(output)
        self.state_file.unlink()

    def _saved_state(self) -> _State:
        # Another version of the package may take a state of this one for the very beginning, without a word.
        origin = {**asdict(self.source), "split": self.split, "datasets": _datasets_version()}
        if not self.state_file.exists():
            return _State(origin, documents=0, sizes=[0] * len(self.parts), position=None)
        remedy = f"delete {' and '.join(map(str, [self.state_file, *self.parts]))} to start again"
        try:
            state = _State(**json.loads(self.state_file.read_bytes()))
        except (ValueError, TypeError) as error:
            raise UserError(f"{self.state_file} is not the state of a download: {remedy}") from error
        if state.origin != origin:
            raise UserError(f"{self.state_file} belongs to another download, or to another version of datasets: {remedy}")
        for part, size in zip(self.parts, state.sizes, strict=True):
            if not state.complete and (not part.exists() or part.stat().st_size < size):
                raise UserError(f"{part} is shorter than {self.state_file} says: {remedy}")
        return state

    def _stream(self, state: _State, save_every: int) -> None:
        dataset = _open(self.name, self.source, self.split)
        if state.position is not None:
            dataset.load_state_dict(state.position)
        self.outputs[0].parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            files = [stack.enter_context(_reopen(*at)) for at in zip(self.parts, state.sizes, strict=True)]
            bar = stack.enter_context(_progress(self.outputs[0], initial=sum(state.sizes)))
            unsaved = 0
            for text in _documents(self.name, self.source, dataset):
                state.documents += 1
                # With one file, the last is also the first.
                file = files[-1] if state.documents % self.source.holdout == 0 else files[0]
                size = file.write(_document(text))
                bar.update(size)
                unsaved += size
                if unsaved >= save_every:
                    self._save(state, files, dataset)
                    unsaved = 0
            state.complete = True
            self._save(state, files, dataset)

    def _save(self, state: _State, files: list[BinaryIO], dataset: Any) -> None:
        # The text before the state, so that the state never promises bytes that a crash could lose.
        for file in files:
            file.flush()
            os.fsync(file.fileno())
        state.sizes = [file.tell() for file in files]
        state.position = dataset.state_dict()
        write_text(self.state_file, json.dumps(asdict(state)))


def _reopen(part: Path, size: int) -> BinaryIO:
    file = part.open("r+b" if part.exists() else "w+b")
    file.truncate(size)
    file.seek(size)
    return file


def _datasets_version() -> str:
    try:
        from datasets import __version__
    except ImportError as error:
        raise UserError(f"fetching a corpus needs one more package: pip install 'tilewright[hub]' ({error})") from error
    return __version__


def _open(name: str, source: Source, split: str) -> Any:
    from datasets import config, load_dataset
    from huggingface_hub import constants, get_session

    # Each of these holds the hub's own retries, 6 in 23 s: the 20 of them by default would wait ten minutes for a broken line.
    config.STREAMING_READ_MAX_RETRIES = 1
    config.STREAMING_OPEN_MAX_RETRIES = 1
    with _network_errors(name, source):
        if source.data_files is None:
            # One question without retries, for a quick answer where there is no network.
            get_session().head(constants.ENDPOINT, timeout=10)
        return load_dataset(source.path, data_files=source.data_files, split=split, streaming=True)


def _documents(name: str, source: Source, dataset: Any) -> Iterator[str]:
    with _network_errors(name, source):
        for row in dataset:
            if source.text_column not in row:
                raise UserError(f"{name!r} ({source.path}) has no column {source.text_column!r}, only {', '.join(row)}")
            text = row[source.text_column] or ""
            # Again and again, because what is left can close up to another one.
            while END_OF_TEXT in text:
                text = text.replace(END_OF_TEXT, "")
            if text := text.strip():
                yield text


# The hub has changed its HTTP library twice, so its errors are known by where they come from.
_HTTP_LIBRARIES = {"aiohttp", "httpx", "httpx2", "huggingface_hub", "requests"}


@contextmanager
def _network_errors(name: str, source: Source) -> Iterator[None]:
    """Turn a broken or missing connection into a `UserError`; a full disk and the like pass unchanged."""
    try:
        yield
    except Exception as error:
        modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
        broken = isinstance(error, (ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError))
        if not broken and _HTTP_LIBRARIES.isdisjoint(modules) and "datasets" not in modules:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"cannot fetch {name!r} ({source.path}) from the Hugging Face hub: {reason}; what was fetched so far is kept and "
            "the same command resumes; `tilewright corpus stories` makes a corpus offline"
        ) from error
