"""The record of a run's data, `data.json`, and the check of a resumed run against it."""

import sys
from collections.abc import Mapping
from typing import Any

from ...errors import UserError
from ...tokenizer import AnyTokenizer
from .sampling import TrainingData
from .token_file import TokenDataset

ValidationTexts = Mapping[str | None, TokenDataset]
"""The validation data of the run, under the key None, and of its sources, by name."""


def make_record(train: TrainingData, valid: ValidationTexts, tokenizer: AnyTokenizer) -> dict[str, Any]:
    """Return the record of a new run (JSON types): training files, tokenizer, and history of the validation data."""
    history = [_validation(source, data, 0) for source, data in valid.items()]
    return train.record() | {"tokenizer": tokenizer.fingerprint, "valid": history}


def _validation(source: str | None, data: TokenDataset, step: int) -> dict[str, Any]:
    """Return the history entry of validation data in use from `step` on."""
    item = {"step": step, "path": str(data.path), "sha256": [file.header.sha256 for file in data.files]}
    return item if source is None else {"source": source, **item}


def check_data(stored: dict[str, Any], valid: ValidationTexts, tokenizer: AnyTokenizer, accept_valid: bool) -> None:
    """Raise a `UserError` if the tokenizer or the validation data of a resumed run differ from its record `stored`.

    `accept_valid` accepts other validation data; `updated_record` then records the change.
    """
    known = recorded_tokenizer(stored)
    if known not in (None, tokenizer.fingerprint):
        raise UserError("the run began with another tokenizer; name that tokenizer with --data.tokenizer")
    for source, data in valid.items():
        last = _last_validation(stored, source)
        if accept_valid or last is None or _matches(last, data):
            continue
        what, option = ("the run", "valid") if source is None else (f"source {source}", "source-valid")
        raise UserError(
            f"{data.path} is not the validation data of {what}: expected {last['path']} as of step {last['step']}; name that "
            f"file with --data.{option}, or use --accept-valid (earlier losses are then not comparable)"
        )


def _last_validation(stored: dict[str, Any], source: str | None) -> dict[str, Any] | None:
    """Return the last history entry of a source, or of the run (None); None if there is no entry."""
    try:
        known = [item for item in stored.get("valid", ()) if item.get("source") == source]
        if not known:
            return None
        return {name: known[-1][name] for name in ("step", "path", "sha256")}
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"cannot read the run's record of its validation data: {error!r}; start a new run") from error


def _matches(item: dict[str, Any], data: TokenDataset) -> bool:
    return item["sha256"] == [file.header.sha256 for file in data.files]


def updated_record(stored: dict[str, Any], valid: ValidationTexts, tokenizer: AnyTokenizer, step: int) -> dict[str, Any]:
    """Return the record of a run that resumes after `step`. Adds what earlier versions did not record, and prints that."""
    history = [item | {"step": min(item["step"], step)} for item in stored.get("valid", ())]
    if not history:
        print(f"the run has no record of its validation data: assuming {valid[None].path}", file=sys.stderr)
    for source, data in valid.items():
        last = _last_validation(stored, source)
        if last is None or not _matches(last, data):
            history.append(_validation(source, data, step if stored.get("valid") else 0))
    return stored | {"tokenizer": tokenizer.fingerprint, "valid": history}


def validation_notes(record: dict[str, Any]) -> list[tuple[int, str]]:
    """Return each step at which validation data changed, with a note for the metrics."""
    notes, known = [], set()
    for item in record["valid"]:
        source = item.get("source")
        if source in known:
            whose = "" if source is None else f" of {source}"
            notes.append((item["step"], f"validation losses{whose} after this step are of {item['path']}"))
        known.add(source)
    return notes


def recorded_tokenizer(record: dict[str, Any]) -> str | None:
    """Return the fingerprint of the tokenizer in a record; None if an earlier version did not record it."""
    if "tokenizer" in record:
        return record["tokenizer"]
    for source in record.get("files", ()):
        # All shards of a source have the same tokenizer.
        header = source.get("shards", [source])[0].get("header", {})
        # The header of chats has the joint fingerprint of tokenizer and template instead.
        if not str(header.get("dtype")).endswith("+marks"):
            return header.get("tokenizer")
    return None
