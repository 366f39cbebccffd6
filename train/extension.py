"""Check which options may change when a run resumes, and record the changes in its history.

The rule of each option is in the metadata of its field (see `config`).
"""

import contextlib
import dataclasses
import math
from pathlib import Path
from typing import Any

from ..errors import UserError
from .checkpoint.layout import checkpoint_step, list_checkpoints, verify_checkpoint
from .config import Change, Extend, Resume, TrainConfig, flatten, in_json
from .data.record import recorded_tokenizer
from .data.sampling import TrainingData, check_record
from .folder import find_newest_valid, read_data_record
from .schedule import decay_start


def check_same_run(stored: TrainConfig, wanted: TrainConfig) -> None:
    """Raise a `UserError` if `wanted` would train differently from the stored run."""
    for name, (before, after) in _differences(stored, wanted).items():
        raise UserError(f"the run in {stored.out} has {name} {before}, not {after}: keep {before}")


def reconcile(stored: TrainConfig, wanted: TrainConfig, extend: Extend | None) -> TrainConfig:
    """Return `wanted` with the stored run's history, its batch size instead of auto, and the learning rate of `extend`.

    Raise a `UserError` if an option differs that must not change.
    """
    wanted = dataclasses.replace(wanted, history=stored.history)
    if wanted.batch_size == "auto":
        wanted = dataclasses.replace(wanted, batch_size=stored.batch_size)
    if isinstance(extend, float | int):
        given = wanted.optimizer.lr
        if not 0 < extend < math.inf:
            raise UserError(f"extend is {extend}: expected keep, or a learning rate above 0")
        if given not in (extend, *(then.optimizer.lr for _, then in stored.phases)):
            raise UserError(f"optimizer.lr is {given}, but extend is {extend}: omit optimizer.lr")
        wanted = dataclasses.replace(wanted, optimizer=dataclasses.replace(wanted.optimizer, lr=float(extend)))
    for option, (before, after) in _differences(stored, wanted).items():
        remedy = _remedy(option, grows=option == "steps" and after > before, stored=stored, extend=extend)
        if remedy is not None:
            raise UserError(f"the run in {wanted.out} has {option} {before}, not {after}: keep {before}{remedy}")
    return wanted


def _remedy(option: str, grows: bool, stored: TrainConfig, extend: Extend | None) -> str | None:
    """Return alternatives to keeping the option's value, "" if there are none; None if the option may change."""
    rule, schedule = _rule(option), stored.optimizer.schedule
    falls = option == "steps" and schedule in ("cosine", "linear")
    if rule == "fixed":
        return ""
    if (rule == "restarts" or falls) and (extend is None or extend == "keep"):
        why = f" (schedule {schedule} decays until the last step)" if falls else ""
        return f", or restart the schedule from a learning rate with --extend RATE{why}"
    return ", or change it from this step on with --extend keep" if extend is None and not grows else None


def extended(
    stored: TrainConfig, wanted: TrainConfig, extend: Extend | None, resume: Resume, data: TrainingData
) -> tuple[TrainConfig, Resume]:
    """Return `wanted` with its changes added to the history, and the checkpoint to resume from.

    `wanted` comes from `reconcile`. If there are no changes, or the stored history already contains them, return both arguments
    unchanged; repeating a command therefore extends a run once. Raise a `UserError` if the data differ and `extend` does not
    allow it.
    """
    options, new_data = _differences(stored, wanted), _is_new(data, stored, wanted, extend)
    restarted = bool(stored.history) and "optimizer.lr" in stored.history[-1].changes
    restarts = isinstance(extend, float | int) and (bool(options) or new_data or not restarted)
    if not (options or new_data or restarts):
        return wanted, resume
    decays = [decay_start(config) for config in (stored, wanted) if "steps" in options and not restarts]
    latest = min((start for start in decays if start is not None), default=math.inf)
    found = _checkpoint(wanted.out, resume, latest)
    step = checkpoint_step(found)
    if not 0 < step < wanted.steps:
        raise UserError(
            f"cannot extend a run from {found}, step {step} of {wanted.steps}: expected a step after 0 and before the last"
        )
    then = stored.at(step)
    changes = _differences(then, wanted)
    if restarts:
        changes["optimizer.lr"] = [then.optimizer.lr, wanted.optimizer.lr]
    if _is_new(data, then, wanted, extend):
        changes["data.train"] = [[str(path) for path in config.data.train] for config in (then, wanted)]
    # An extension can undo all earlier changes.
    history = (*then.history, Change(step, changes)) if changes else then.history
    return dataclasses.replace(wanted, history=history), found


def _is_new(data: TrainingData, before: TrainConfig, wanted: TrainConfig, extend: Extend | None) -> bool:
    """Return whether the training files or their weights differ from before."""
    record = read_data_record(wanted.out, before.since("data.train"))
    try:
        check_record(record, data)
    except UserError as error:
        if extend is None:
            raise
        if before.data.train == wanted.data.train:
            raise UserError(f"{error}; give new data another file name in --data.train") from error
        if recorded_tokenizer({"files": record["files"]}) not in (None, data.datasets[0].header.tokenizer):
            raise
        return True
    return before.data.weights != wanted.data.weights


def _checkpoint(run: Path, resume: Resume, latest: float) -> Path:
    """Return the named or newest valid checkpoint, at most at step `latest`, the last before the learning rate decays."""
    remedy = "restart the schedule from a learning rate with --extend RATE"
    if isinstance(resume, Path):
        if checkpoint_step(resume) > latest:
            raise UserError(f"{resume} is after step {latest}, where the learning rate decays: use an earlier one, or {remedy}")
        return resume
    if latest == math.inf:
        return find_newest_valid(run)
    for folder in reversed(list_checkpoints(run)):
        with contextlib.suppress(UserError):
            if checkpoint_step(folder) <= latest:
                verify_checkpoint(folder)
                return folder
    raise UserError(f"{run} has no valid checkpoint up to step {latest}, where the learning rate starts to decay: {remedy}")


def _rule(option: str) -> str:
    """Return how an option may change when a run resumes: "free", "grows", "restarts" or "fixed" (see `config`)."""
    *groups, last = option.split(".")
    owner: Any = TrainConfig
    for group in groups:
        owner = owner.__dataclass_fields__[group].type
    return owner.__dataclass_fields__[last].metadata.get("on_resume", "fixed")


def _differences(stored: TrainConfig, wanted: TrainConfig) -> dict[str, list[Any]]:
    """Return each option that differs and is not "free", with both values in JSON form."""
    before, after = flatten(in_json(stored)), flatten(in_json(wanted))
    return {name: [value, after[name]] for name, value in before.items() if after[name] != value and _rule(name) != "free"}
