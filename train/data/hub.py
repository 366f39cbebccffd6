"""Datasets on the Hugging Face hub: which files the split of a dataset consists of, and what the hub's errors mean."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ...errors import UserError, one_line

PARQUET = ".parquet"
JSON_LINES = re.compile(r".*\.(jsonl?|ndjson)(\.gz|\.zst)?")
# Where the hub keeps what it converted by itself, as CONFIG/SPLIT/0000.parquet.
_CONVERTED = "refs/convert/parquet"
# The hub has changed its HTTP library twice, so its errors are known by where they come from.
_HTTP_LIBRARIES = {"httpx", "httpx2", "requests"}
# Seconds for the first answer, so that a machine without a network is told at once.
_PATIENCE = 10


@dataclass(frozen=True)
class HubFile:
    """A file of a repository; `oid` is the hash of its content."""

    path: str
    size: int
    oid: str


@dataclass(frozen=True)
class Snapshot:
    """The files of each split at one commit, which no later upload changes."""

    commit: str
    splits: Mapping[str, tuple[HubFile, ...]]


def find_splits(repo: str, config: str | None, revision: str | None, files: str | None) -> Snapshot:
    """Return the splits of a dataset, each of Parquet files or JSON lines.

    `files` is a glob of the files of the repository, a single split "train"; by default they are those that the dataset's card
    names for `config` (by default the card's own default), or those that the hub has converted to Parquet. Raises a `UserError`
    for a dataset, a revision or a config that is not there, for one that is gated, and without a network.
    """
    from huggingface_hub import HfApi

    with hub_errors(repo):
        info = HfApi().dataset_info(repo, revision=revision, timeout=_PATIENCE)
        commit = info.sha or ""
        if files is not None:
            found = _matching(repo, commit, {"train": [files]})
            if not found:
                raise UserError(f"{repo} has no Parquet files or JSON lines that match {files!r}")
            return Snapshot(commit, found)
        card = info.card_data.to_dict() if info.card_data else {}
        if declared := _declared(card.get("configs") or []):
            default = next((entry["config_name"] for entry in card["configs"] if entry.get("default")), None)
            found = _matching(repo, commit, declared[_chosen(repo, config, declared, default)])
            if found:
                return Snapshot(commit, found)
        return _converted(repo, config)


def list_files(repo: str, commit: str, folder: str = "") -> dict[str, HubFile]:
    """Return the files of a repository below a folder, by their paths."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.hf_api import RepoFile

    try:
        entries = list(HfApi().list_repo_tree(repo, folder or None, recursive=True, revision=commit, repo_type="dataset"))
    except EntryNotFoundError:
        return {}
    return {each.path: HubFile(each.path, each.size, each.blob_id) for each in entries if isinstance(each, RepoFile)}


def check_unchanged(repo: str, snapshot: Snapshot) -> None:
    """Raise a `UserError` that names a file which the commit no longer holds as it was."""
    files = [file for files in snapshot.splits.values() for file in files]
    with hub_errors(repo):
        now = list_files(repo, snapshot.commit, _common_folder(file.path for file in files))
    for file in files:
        if now.get(file.path) != file:
            raise UserError(
                f"{file.path} of {repo} has changed on the hub since the fetch began: begin again in another folder"
            )


def _declared(configs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[str]]]:
    """Return the globs of the files by config and split, out of the forms in which a card may write them."""
    declared: dict[str, dict[str, list[str]]] = {}
    for entry in configs:
        folder = str(entry.get("data_dir") or "").strip("/")
        files = entry.get("data_files") or ("**" if folder else [])
        listed = [files] if isinstance(files, str) else files
        splits = declared.setdefault(str(entry["config_name"]), {})
        for each in listed:
            each = {"split": "train", "path": each} if isinstance(each, str) else each
            paths = [each["path"]] if isinstance(each["path"], str) else each["path"]
            splits.setdefault(str(each["split"]), []).extend(f"{folder}/{path}".strip("/") for path in paths)
    return {config: splits for config, splits in declared.items() if splits}


def _chosen(repo: str, config: str | None, configs: Mapping[str, Any], default: str | None = None) -> str:
    if config is None:
        config = default or ("default" if "default" in configs else next(iter(configs)) if len(configs) == 1 else None)
        if config is None:
            raise UserError(f"{repo} has several configs: choose one with --config, of {_names(configs)}")
    if config not in configs:
        raise UserError(f"{repo} has no config {config!r}, only {_names(configs)}")
    return config


def _names(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:30]) + (f" and {len(listed) - 30} more" if len(listed) > 30 else "")


def _matching(repo: str, commit: str, splits: Mapping[str, Sequence[str]]) -> dict[str, tuple[HubFile, ...]]:
    """Return the files of each split that match its globs and can be read; splits without any are left out."""
    from fsspec.utils import glob_translate

    globs = [glob for each in splits.values() for glob in each]
    files = list_files(repo, commit, _common_folder(re.split(r"[*?[]", glob)[0] + "x" for glob in globs))
    readable = {path: file for path, file in files.items() if path.endswith(PARQUET) or JSON_LINES.fullmatch(path)}
    found = {}
    for split, wanted in splits.items():
        patterns = [re.compile(glob_translate(glob)) for glob in wanted]
        matching = [readable[path] for path in sorted(readable) if any(pattern.match(path) for pattern in patterns)]
        if matching:
            found[split] = tuple(matching)
    return found


def _common_folder(paths: Iterable[str]) -> str:
    folder = os.path.commonpath([os.path.dirname(path) or "." for path in paths])
    return "" if folder == "." else folder


def _converted(repo: str, config: str | None) -> Snapshot:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        commit = HfApi().dataset_info(repo, revision=_CONVERTED, timeout=_PATIENCE).sha or ""
    except RevisionNotFoundError:
        raise UserError(
            f"{repo} has no Parquet files or JSON lines by its card, and the hub has converted none: name files with --files"
        ) from None
    configs: dict[str, dict[str, list[HubFile]]] = {}
    for path, file in sorted(list_files(repo, commit).items()):
        if path.endswith(PARQUET) and path.count("/") == 2:
            name, split, _ = path.split("/")
            configs.setdefault(name, {}).setdefault(split, []).append(file)
    if not configs:
        raise UserError(f"the hub has converted no file of {repo} to Parquet: name files with --files")
    splits = configs[_chosen(repo, config, configs)]
    return Snapshot(commit, {split: tuple(files) for split, files in splits.items()})


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Turn what the hub and the network raise into a `UserError` of one line; a full disk and the like pass unchanged."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise UserError(
            f"{repo} is gated: accept its terms on https://huggingface.co/datasets/{repo}, then log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"the hub has no dataset {repo!r}, or a private one: check the name, or log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{repo} has no such revision (any more): {one_line(error)}") from error
    except HFValidationError as error:
        raise UserError(f"{repo!r} is no name of a dataset: {one_line(error)}") from error
    except Exception as error:
        modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
        known = isinstance(error, HfHubHTTPError | OfflineModeIsEnabled | ConnectionError | TimeoutError)
        if not known and _HTTP_LIBRARIES.isdisjoint(modules):
            raise
        status = getattr(getattr(error, "response", None), "status_code", None)
        limited = "its rate limit is reached: wait, or log in with `hf auth login` for a higher one"
        raise UserError(
            f"cannot fetch {repo} from the Hugging Face hub: {limited if status == 429 else one_line(error)};"
            " what was fetched so far is kept and the same command resumes; `tilewright corpus stories` makes a corpus offline"
        ) from error
