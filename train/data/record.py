"""What a run notes of its data in `data.json`, and whether the data of a resumed run are still those."""

import sys
from collections.abc import Mapping
from typing import Any

from ...errors import UserError
from ...tokenizer import AnyTokenizer
from .sampling import TrainingData
from .token_file import TokenDataset

ValidationTexts = Mapping[str | None, TokenDataset]
"""What a run is validated on, under None, and each of its sources, by name."""


def make_record(train: TrainingData, valid: ValidationTexts, tokenizer: AnyTokenizer) -> dict[str, Any]:
    """Return the record of a new run, of JSON's types: the training files, the tokenizer, and the history of the validation."""
    history = [_validation(source, data, 0) for source, data in valid.items()]
    return train.record() | {"tokenizer": tokenizer.fingerprint, "valid": history}


def _validation(source: str | None, data: TokenDataset, step: int) -> dict[str, Any]:
    """Return what says which validation data hold from `step` on."""
    item = {"step": step, "path": str(data.path), "sha256": [file.header.sha256 for file in data.files]}
    return item if source is None else {"source": source, **item}


def check_data(stored: dict[str, Any], valid: ValidationTexts, tokenizer: AnyTokenizer, accept_valid: bool) -> None:
    """Raise a `UserError` where tokenizer or validation data of a resumed run are not those of its record, `stored`.

    Other validation data are taken where `accept_valid`; `updated_record` then notes it.
    """
    known = recorded_tokenizer(stored)
    if known not in (None, tokenizer.fingerprint):
        raise UserError("the run began with another tokenizer: name that one with --data.tokenizer")
    for source, data in valid.items():
        last = _last_validation(stored, source)
        if accept_valid or last is None or _is_of(last, data):
            continue
        what, option = ("the run", "valid") if source is None else (f"source {source}", "source-valid")
        raise UserError(
            f"{data.path} is not what {what} was validated on, {last['path']} as it was at step {last['step']}: name that "
            f"one with --data.{option}, or take this one with --accept-valid; its losses do not compare with those before"
        )


def _last_validation(stored: dict[str, Any], source: str | None) -> dict[str, Any] | None:
    """Return which data a source, or the run itself, was last validated on; None where nothing is known."""
    try:
        known = [item for item in stored.get("valid", ()) if item.get("source") == source]
        if not known:
            return None
        return {name: known[-1][name] for name in ("step", "path", "sha256")}
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"the run's record of its validation data cannot be read ({error!r}): start a new run") from error


def _is_of(item: dict[str, Any], data: TokenDataset) -> bool:
    return item["sha256"] == [file.header.sha256 for file in data.files]


def updated_record(stored: dict[str, Any], valid: ValidationTexts, tokenizer: AnyTokenizer, step: int) -> dict[str, Any]:
    """Return the record of a run that goes on after `step`; what a record of earlier versions lacks is added, and said."""
    history = [item | {"step": min(item["step"], step)} for item in stored.get("valid", ())]
    if not history:
        print(f"the run has no record of its validation data: {valid[None].path} is taken for what it was", file=sys.stderr)
    for source, data in valid.items():
        last = _last_validation(stored, source)
        if last is None or not _is_of(last, data):
            history.append(_validation(source, data, step if stored.get("valid") else 0))
    return stored | {"tokenizer": tokenizer.fingerprint, "valid": history}


def validation_notes(record: dict[str, Any]) -> list[tuple[int, str]]:
    """Return the steps at which the validation data changed, and what is to be noted in the metrics."""
    notes, known = [], set()
    for item in record["valid"]:
        source = item.get("source")
        if source in known:
            whose = "" if source is None else f" of {source}"
            notes.append((item["step"], f"validation losses{whose} after this step are of {item['path']}"))
        known.add(source)
    return notes


def recorded_tokenizer(record: dict[str, Any]) -> str | None:
    """Return the fingerprint of the tokenizer in a record; None where a record of earlier versions does not say it."""
    if "tokenizer" in record:
        return record["tokenizer"]
    for source in record.get("files", ()):
        # All shards of a source are of one tokenizer.
        header = source.get("shards", [source])[0].get("header", {})
        # Of chats it is that of the tokenizer and the template.
        if not str(header.get("dtype")).endswith("+marks"):
            return header.get("tokenizer")
    return None
