"""Datasets on the Hugging Face hub: the files of each split, and translation of the hub's errors."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ...errors import UserError, one_line

PARQUET = ".parquet"
JSON_LINES = re.compile(r".*\.(jsonl?|ndjson)(\.gz|\.zst)?")
# The branch of the hub's automatic conversion, with files CONFIG/SPLIT/0000.parquet.
_CONVERTED = "refs/convert/parquet"
# huggingface_hub has changed its HTTP library twice, so errors are recognized by their package.
_HTTP_LIBRARIES = {"httpx", "httpx2", "requests"}
# Short timeout of the first request, so that a machine without a network fails soon.
_TIMEOUT_S = 10


@dataclass(frozen=True)
class HubFile:
    """A file of a repository. `oid` is the hash of its contents."""

    path: str
    size: int
    oid: str


@dataclass(frozen=True)
class Snapshot:
    """The files of each split at a fixed commit."""

    commit: str
    splits: Mapping[str, tuple[HubFile, ...]]


def find_splits(repo: str, config: str | None, revision: str | None, files: str | None) -> Snapshot:
    """Return the splits of a dataset, each a list of Parquet or JSON lines files.

    With `files`, a glob of paths in the repository, the matching files are the split "train". Otherwise the dataset's card
    lists the files of `config` (None: the default config of the card). If it lists none that can be read, the files are those
    that the hub has converted to Parquet. Raises a `UserError` if the dataset, the revision or the config does not exist, if
    access is denied, or without a network.
    """
    from huggingface_hub import HfApi

    with hub_errors(repo):
        info = HfApi().dataset_info(repo, revision=revision, timeout=_TIMEOUT_S)
        commit = info.sha or ""
        if files is not None:
            found = _match(repo, commit, {"train": [files]})
            if not found:
                raise UserError(f"{repo} has no Parquet files or JSON lines that match {files!r}")
            return Snapshot(commit, found)
        card = info.card_data.to_dict() if info.card_data else {}
        if declared := _globs_in_card(card.get("configs") or []):
            default = next((entry["config_name"] for entry in card["configs"] if entry.get("default")), None)
            found = _match(repo, commit, declared[_choose_config(repo, config, declared, default)])
            if found:
                return Snapshot(commit, found)
        return _converted_snapshot(repo, config)


def list_files(repo: str, commit: str, folder: str = "") -> dict[str, HubFile]:
    """Return the files in a folder of a repository, recursively, by path."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.hf_api import RepoFile

    try:
        entries = list(HfApi().list_repo_tree(repo, folder or None, recursive=True, revision=commit, repo_type="dataset"))
    except EntryNotFoundError:
        return {}
    return {each.path: HubFile(each.path, each.size, each.blob_id) for each in entries if isinstance(each, RepoFile)}


def check_unchanged(repo: str, snapshot: Snapshot) -> None:
    """Raise a `UserError` if a file of the snapshot has changed or is gone."""
    files = [file for files in snapshot.splits.values() for file in files]
    with hub_errors(repo):
        now = list_files(repo, snapshot.commit, _common_folder(file.path for file in files))
    for file in files:
        if now.get(file.path) != file:
            raise UserError(
                f"{file.path} of {repo} has changed on the hub since the fetch began; fetch again to another folder"
            )


def _globs_in_card(configs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[str]]]:
    """Return the globs of a card's files by config and split. A card may write them in several forms."""
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


def _choose_config(repo: str, config: str | None, configs: Mapping[str, Any], default: str | None = None) -> str:
    if config is None:
        config = default or ("default" if "default" in configs else next(iter(configs)) if len(configs) == 1 else None)
        if config is None:
            raise UserError(f"{repo} has several configs: choose one of {_names(configs)} with --config")
    if config not in configs:
        raise UserError(f"{repo} has no config {config!r}: expected one of {_names(configs)}")
    return config


def _names(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:30]) + (f" and {len(listed) - 30} more" if len(listed) > 30 else "")


def _match(repo: str, commit: str, splits: Mapping[str, Sequence[str]]) -> dict[str, tuple[HubFile, ...]]:
    """Return the readable files that match the globs of each split. Omits splits without a match."""
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


def _converted_snapshot(repo: str, config: str | None) -> Snapshot:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        commit = HfApi().dataset_info(repo, revision=_CONVERTED, timeout=_TIMEOUT_S).sha or ""
    except RevisionNotFoundError:
        raise UserError(
            f"the card of {repo} lists no Parquet or JSON lines files, and the hub has converted none; name files with --files"
        ) from None
    configs: dict[str, dict[str, list[HubFile]]] = {}
    for path, file in sorted(list_files(repo, commit).items()):
        if path.endswith(PARQUET) and path.count("/") == 2:
            name, split, _ = path.split("/")
            configs.setdefault(name, {}).setdefault(split, []).append(file)
    if not configs:
        raise UserError(f"the hub has converted no file of {repo} to Parquet; name files with --files")
    splits = configs[_choose_config(repo, config, configs)]
    return Snapshot(commit, {split: tuple(files) for split, files in splits.items()})


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Convert errors of the hub and the network to one-line `UserError`s. Other errors, such as a full disk, pass through."""
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
            f"{repo} is gated; accept its terms on https://huggingface.co/datasets/{repo}, then log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"the hub has no dataset {repo!r}, or it is private; check the name, or log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{repo} does not have this revision: {one_line(error)}") from error
    except HFValidationError as error:
        raise UserError(f"{repo!r} is not a valid name of a dataset: {one_line(error)}") from error
    except Exception as error:
        modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
        known = isinstance(error, HfHubHTTPError | OfflineModeIsEnabled | ConnectionError | TimeoutError)
        if not known and _HTTP_LIBRARIES.isdisjoint(modules):
            raise
        status = getattr(getattr(error, "response", None), "status_code", None)
        limited = "the rate limit is reached; wait, or log in with `hf auth login` for a higher limit"
        raise UserError(
            f"cannot fetch {repo} from the Hugging Face hub: {limited if status == 429 else one_line(error)};"
            " the same command resumes the fetch; `tilewright corpus stories` generates a corpus offline"
        ) from error
