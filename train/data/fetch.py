"""Resumable download of datasets of the Hugging Face hub to text files. An interruption does not change the output bytes."""

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import dacite
from tqdm import tqdm

from ...errors import UserError
from ...files import locked_folder, make_folder, refused_writes, write_text
from ...tokenizer import END_OF_TEXT
from .hub import PARQUET, HubFile, Snapshot, check_unchanged, find_splits
from .hub_files import HubReader, Place, column_sizes, iter_units, read_metadata
from .text_shards import ShardsState, TextShards, document

INDEX = "corpus.json"
_STATE = ".fetch.json"
_SAMPLED_FILES = 4
# Estimated bytes of text per byte of a compressed JSON lines file.
_EXPANSION = {".gz": 3, ".zst": 4}


@dataclass(frozen=True)
class Dataset:
    """The dataset, and the part of it, that becomes a corpus."""

    repo: str
    """OWNER/NAME on the hub."""
    config: str | None = None
    """Name of a config; None: the default of the dataset's card."""
    split: str = "train"
    valid_split: str | None = None
    """Split of the validation text; None: `validation` if it exists, else every `holdout`-th document of `split`."""
    column: str = "text"
    revision: str | None = None
    """A branch, a tag or a commit; None: the newest."""
    files: str | None = None
    """A glob of files in the repository, instead of a config."""
    holdout: int = 2000
    shard_megabytes: float | None = 1000.0
    """Size of each file of training text; None: a single file."""
    max_gigabytes: float | None = None
    """Stop after the document of the training split that reaches this size."""
    documents: int | None = None
    """Stop after this number of documents of the training split."""

    def __post_init__(self) -> None:
        for name in ("holdout", "shard_megabytes", "max_gigabytes", "documents"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"{name.replace('_', '-')} is {value}: it must be a finite number above 0")


DATASETS: Mapping[str, Dataset] = {
    "tinystories": Dataset("roneneldan/TinyStories", shard_megabytes=None),
    "openwebtext": Dataset("Skylion007/openwebtext", shard_megabytes=None),
    "fineweb-edu-10bt": Dataset("HuggingFaceFW/fineweb-edu", "sample-10BT"),
    "fineweb-10bt": Dataset("HuggingFaceFW/fineweb", "sample-10BT"),
    "climbmix": Dataset("karpathy/climbmix-400b-shuffle", files="shard_*.parquet"),
}


@dataclass
class _Progress:
    split: str
    place: tuple[int, int] = (0, 0)
    documents: int = 0


@dataclass
class _State:
    origin: dict[str, Any]
    snapshot: Snapshot
    progress: _Progress
    train: ShardsState = field(default_factory=ShardsState)
    valid: ShardsState = field(default_factory=ShardsState)
    complete: bool = False


def dataset_of(name: str) -> Dataset:
    """Return the preset `name`, or the dataset OWNER/NAME of the hub. Raises a `UserError` for any other name."""
    if name in DATASETS:
        return DATASETS[name]
    if name.count("/") != 1:
        raise UserError(f"dataset is {name!r}: expected one of {', '.join(DATASETS)}, or OWNER/NAME of a dataset on the hub")
    return Dataset(name)


def fetch(dataset: Dataset, folder: Path | str, save_every: int = 1 << 25) -> None:
    """Fetch a dataset into `folder`: train.txt, or the shards train/00000.txt, train/00001.txt, ..., and valid.txt.

    `END_OF_TEXT` follows each document. corpus.json, which is written last, lists the bytes, documents and hash of each file.
    The state is saved every `save_every` bytes. A second call after an interruption resumes at the row group of the last save,
    from the same commit of the dataset. A complete corpus is not fetched again. Raises a `UserError` if the hub denies the
    data or, before the fetch begins, if the text does not fit on the disk.
    """
    try:
        import huggingface_hub  # noqa: F401
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise UserError(f"cannot fetch a corpus: {error}; pip install 'tilewright[hub]'") from error
    folder = Path(folder)
    with refused_writes(folder):
        make_folder(folder)
    try:
        with locked_folder(folder, f"another process that fetches to {folder}"):
            if not _is_complete(dataset, folder):
                _Fetcher(dataset, folder).run(save_every)
    finally:
        # Removes the folder if the fetch failed before it wrote a file.
        with suppress(OSError):
            folder.rmdir()


def _is_complete(dataset: Dataset, folder: Path) -> bool:
    index, state = folder / INDEX, folder / _STATE
    if index.exists():
        try:
            content = json.loads(index.read_bytes())
            origin, shards = content["origin"], [*content["train"], *content["valid"]]
            sizes = {shard["name"]: shard["bytes"] for shard in shards}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{index} is not the index of a corpus; remove {folder} to fetch it again") from error
        if origin != asdict(dataset):
            raise UserError(f"{folder} holds another corpus, or another part of this one; name another folder with --out")
        for name, size in sizes.items():
            if not (folder / name).exists() or (folder / name).stat().st_size != size:
                raise UserError(f"{folder / name} has changed since it was fetched; remove {folder} to fetch it again")
        state.unlink(missing_ok=True)
    elif not state.exists():
        present = [folder / name for name in ("train.txt", "train", "valid.txt") if (folder / name).exists()]
        # Earlier versions fetched exactly these two files, without an index.
        if dataset.shard_megabytes is not None or len(present) < 2:
            for path in present:
                raise UserError(f"{path} exists already; remove it, or name another folder with --out")
            return False
    else:
        return False
    print(f"{folder}: already complete, not fetched again")
    return True


class _Fetcher:
    def __init__(self, dataset: Dataset, folder: Path):
        self.dataset, self.folder, self.state_file = dataset, folder, folder / _STATE
        self.remedy = f"remove {folder} to fetch again"
        self.state = self._saved_state() or self._first_state()
        self.reader = HubReader(dataset.repo, self.state.snapshot.commit)

    def run(self, save_every: int) -> None:
        dataset, state = self.dataset, self.state
        if not state.complete:
            self._check_disk()
            # Before any text, so that an interrupted folder is recognized as a fetch.
            write_text(self.state_file, json.dumps(asdict(state)))
        shard_bytes = None if dataset.shard_megabytes is None else round(dataset.shard_megabytes * 1e6)
        self.train = TextShards(self.folder, "train", shard_bytes, state.train, self.remedy)
        self.valid = TextShards(self.folder, "valid", None, state.valid, self.remedy)
        try:
            if not state.complete:
                self._read_splits(save_every)
                state.complete = True
                self._save()
            self.train.publish(last=True)
            self.valid.publish(last=True)
        finally:
            self.train.close()
            self.valid.close()
        index = {"origin": state.origin, "commit": state.snapshot.commit}
        index |= {"train": asdict(self.train.state)["shards"], "valid": asdict(self.valid.state)["shards"]}
        write_text(self.folder / INDEX, json.dumps(index, indent=1))
        self.state_file.unlink()

    def _saved_state(self) -> _State | None:
        if not self.state_file.exists():
            return None
        try:
            config = dacite.Config(cast=[tuple], strict=True)
            state = dacite.from_dict(_State, json.loads(self.state_file.read_bytes()), config)
        except (ValueError, TypeError, AttributeError, dacite.DaciteError) as error:
            raise UserError(f"{self.state_file} is not the state of a fetch; {self.remedy}") from error
        if state.origin != asdict(self.dataset):
            raise UserError(f"{self.state_file} belongs to a fetch with other options; repeat those options, or {self.remedy}")
        if not state.complete:
            check_unchanged(self.dataset.repo, state.snapshot)
        return state

    def _first_state(self) -> _State:
        dataset = self.dataset
        snapshot = find_splits(dataset.repo, dataset.config, dataset.revision, dataset.files)
        valid = dataset.valid_split or ("validation" if "validation" in snapshot.splits else None)
        wanted = [dataset.split] if valid is None else [dataset.split, valid]
        for split in wanted:
            if split not in snapshot.splits:
                raise UserError(f"{dataset.repo} has no split {split!r}: expected one of {', '.join(snapshot.splits)}")
        if valid is None and dataset.documents is not None and dataset.documents < dataset.holdout:
            raise UserError(
                f"documents is {dataset.documents}: it must be at least holdout, {dataset.holdout}, to hold out a document"
            )
        snapshot = replace(snapshot, splits={split: snapshot.splits[split] for split in wanted})
        return _State(asdict(dataset), snapshot, _Progress(dataset.split))

    def _check_disk(self) -> None:
        """Print the estimated sizes. Raises a `UserError` if the text does not fit on the disk; see `_estimate`."""
        commit, splits = self.state.snapshot.commit, self.state.snapshot.splits
        estimates = [self._estimate(split, files) for split, files in splits.items()]
        read, written = (sum(sizes) for sizes in zip(*estimates, strict=True))
        written -= sum(shard.bytes for part in (self.state.train, self.state.valid) for shard in part.shards)
        free = shutil.disk_usage(self.folder).free
        sizes = f"{written / 1e9:,.2f} GB of text to write, {free / 1e9:,.2f} GB free"
        if written > free:
            raise UserError(
                f"cannot fetch {self.dataset.repo} to {self.folder}: about {sizes}; set --max-gigabytes, or name a folder on "
                "another disk with --out"
            )
        count = sum(map(len, splits.values()))
        print(f"{self.dataset.repo} at {commit[:8]}: {count} files, about {read / 1e9:,.2f} GB to read, {sizes}")

    def _estimate(self, split: str, files: tuple[HubFile, ...]) -> tuple[float, float]:
        """Estimate the bytes to read and the bytes of text, from the footers of a sample of files or a typical compression."""
        column, total = self.dataset.column, sum(file.size for file in files)
        if tables := [file for file in files if file.path.endswith(PARQUET)]:
            sample = tables[:: -(-len(tables) // _SAMPLED_FILES)]
            footers = [read_metadata(self.reader, file, column) for file in sample]
            sizes = [column_sizes(footer, column) for footer in footers]
            rows = sum(footer.num_rows for footer in footers)
            scale = total / max(1, sum(file.size for file in sample))
            read = scale * sum(compressed for compressed, _ in sizes)
            text = scale * (sum(plain for _, plain in sizes) + rows * len(document("")))
            per_document = text / max(1, scale * rows)
        else:
            read, per_document = float(total), 0.0
            text = float(sum(file.size * _EXPANSION.get(Path(file.path).suffix, 1) for file in files))
        limits = [text]
        if split == self.dataset.split:
            limits += [self.dataset.max_gigabytes * 1e9] if self.dataset.max_gigabytes else []
            limits += [self.dataset.documents * per_document] if self.dataset.documents and per_document else []
        written = min(limits)
        return read * written / max(1.0, text), written

    def _read_splits(self, save_every: int) -> None:
        progress = self.state.progress
        splits = list(self.state.snapshot.splits)
        for split in splits[splits.index(progress.split) :]:
            if split != progress.split:
                progress.split, progress.place, progress.documents = split, (0, 0), 0
            self._read_split(split, save_every)

    def _read_split(self, split: str, save_every: int) -> None:
        progress, files = self.state.progress, self.state.snapshot.splits[split]
        is_train = split == self.dataset.split
        holds_out = len(self.state.snapshot.splits) == 1
        wanted = (self.dataset.documents or float("inf")) if is_train else float("inf")
        most = (self.dataset.max_gigabytes or float("inf")) * 1e9 if is_train else float("inf")
        written = self.train.size if is_train else self.valid.size
        saved = written
        initial = self.train.size + self.valid.size
        with tqdm(desc=f"{self.folder.name} {split}", initial=initial, unit="B", unit_scale=True, disable=None) as bar:
            for place, texts in iter_units(self.reader, files, self.dataset.column, Place(*progress.place)):
                for text in texts:
                    if progress.documents >= wanted or (is_train and written >= most):
                        return
                    if not (text := _clean(text)):
                        continue
                    progress.documents += 1
                    held_out = holds_out and progress.documents % self.dataset.holdout == 0
                    data = document(text)
                    (self.train if is_train and not held_out else self.valid).write(data)
                    written += 0 if held_out else len(data)
                    bar.update(len(data))
                progress.place = (place.file, place.unit)
                if written - saved >= save_every:
                    self._save()
                    saved = written

    def _save(self) -> None:
        # Syncs the text before the state, so that the state never counts bytes that a crash could lose.
        self.state.train, self.state.valid = self.train.sync(), self.valid.sync()
        write_text(self.state_file, json.dumps(asdict(self.state)))
        self.train.publish()


def _clean(text: str | None) -> str:
    text = text or ""
    # Repeated, because a removal can join the text around it to another mark.
    while END_OF_TEXT in text:
        text = text.replace(END_OF_TEXT, "")
    return text.strip()
