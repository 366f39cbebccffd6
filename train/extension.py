"""What may change when a run goes on, by the rules that stand beside the options, and how that is noted in its history."""

import contextlib
import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError
from .checkpoint.layout import checkpoint_step, list_checkpoints, verify_checkpoint
from .config import Change, TrainConfig, flatten, in_json
from .data.record import recorded_tokenizer
from .data.sampling import TrainingData, check_record
from .folder import Resume, find_newest_valid, read_data_record
from .schedule import decay_start

Extend = float | Literal["keep"]
"""keep: batch size and data may change, and the schedule goes on; a learning rate: the schedule begins anew from it, too."""


def check_same_run(stored: TrainConfig, wanted: TrainConfig) -> None:
    """Raise a `UserError` where `wanted` would train differently from the stored run."""
    for name, (before, after) in _differences(stored, wanted).items():
        raise UserError(f"the run in {stored.out} has {name} {before}, not {after}: resume it with {before}")


def settle(stored: TrainConfig, wanted: TrainConfig, extend: Extend | None) -> TrainConfig:
    """Return `wanted` with the stored run's history, with its batch size in place of auto, and with the rate of `extend`.

    What differs otherwise and must not, is a `UserError`.
    """
    wanted = dataclasses.replace(wanted, history=stored.history)
    if wanted.batch_size == "auto":
        wanted = dataclasses.replace(wanted, batch_size=stored.batch_size)
    if isinstance(extend, float | int):
        given = wanted.optimizer.lr
        if not 0 < extend < math.inf:
            raise UserError(f"extend is {extend}: it must be keep, or a learning rate above 0")
        if given not in (extend, *(then.optimizer.lr for _, then in stored.phases)):
            raise UserError(f"optimizer.lr is {given}, extend {extend}: leave out optimizer.lr")
        wanted = dataclasses.replace(wanted, optimizer=dataclasses.replace(wanted.optimizer, lr=float(extend)))
    for option, (before, after) in _differences(stored, wanted).items():
        remedy = _remedy(option, grows=option == "steps" and after > before, stored=stored, extend=extend)
        if remedy is not None:
            raise UserError(f"the run in {wanted.out} has {option} {before}, not {after}: resume it with {before}{remedy}")
    return wanted


def _remedy(option: str, grows: bool, stored: TrainConfig, extend: Extend | None) -> str | None:
    """Return what to do beside leaving an option as it was, None where it may change."""
    rule, schedule = _rule(option), stored.optimizer.schedule
    falls = option == "steps" and schedule in ("cosine", "linear")
    if rule == "fixed":
        return ""
    if (rule == "restarts" or falls) and (extend is None or extend == "keep"):
        why = f" (a {schedule} falls until the last step)" if falls else ""
        return f", or begin its schedule anew from a learning rate with --extend RATE{why}"
    return ", or change it from here on with --extend keep" if extend is None and not grows else None


def extended(
    stored: TrainConfig, wanted: TrainConfig, extend: Extend | None, resume: Resume, data: TrainingData
) -> tuple[TrainConfig, Resume]:
    """Return `wanted`, which `settle` gave, with what it changes noted in its history, and the checkpoint to go on from.

    Where it changes nothing, both are returned as they are; so they are where the stored run has noted all of it, so that a
    command that is repeated extends a run once. Data that differs though `extend` does not allow it is a `UserError`.
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
        raise UserError(f"{found} has taken {step} steps of {wanted.steps}: a run is extended between its first and its last")
    then = stored.at(step)
    changes = _differences(then, wanted)
    if restarts:
        changes["optimizer.lr"] = [then.optimizer.lr, wanted.optimizer.lr]
    if _is_new(data, then, wanted, extend):
        changes["data.train"] = [[str(path) for path in config.data.train] for config in (then, wanted)]
    # Gone back from what it had changed, a run may be as it was.
    history = (*then.history, Change(step, changes)) if changes else then.history
    return dataclasses.replace(wanted, history=history), found


def _is_new(data: TrainingData, before: TrainConfig, wanted: TrainConfig, extend: Extend | None) -> bool:
    """Return whether the samples come from other files, or in other shares, than before."""
    record = read_data_record(wanted.out, before.since("data.train"))
    try:
        check_record(record, data)
    except UserError as error:
        if extend is None:
            raise
        if before.data.train == wanted.data.train:
            raise UserError(f"{error}; what an extension brings has another name in --data.train") from error
        if recorded_tokenizer({"files": record["files"]}) not in (None, data.datasets[0].header.tokenizer):
            raise
        return True
    return before.data.weights != wanted.data.weights


def _checkpoint(run: Path, resume: Resume, latest: float) -> Path:
    """Return the checkpoint named, or the newest valid one, up to step `latest`, until which the learning rate is constant."""
    remedy = "begin the schedule anew from a learning rate with --extend RATE"
    if isinstance(resume, Path):
        if checkpoint_step(resume) > latest:
            raise UserError(f"{resume} is of a learning rate that falls since step {latest}: name an earlier one, or {remedy}")
        return resume
    if latest == math.inf:
        return find_newest_valid(run)
    for folder in reversed(list_checkpoints(run)):
        with contextlib.suppress(UserError):
            if checkpoint_step(folder) <= latest:
                verify_checkpoint(folder)
                return folder
    raise UserError(f"{run} has no valid checkpoint up to step {latest}, since which the learning rate falls: {remedy}")


def _rule(option: str) -> str:
    """Return what may become of an option when a run goes on: "free", "grows", "restarts" or "fixed"."""
    *groups, last = option.split(".")
    owner: Any = TrainConfig
    for group in groups:
        owner = owner.__dataclass_fields__[group].type
    return owner.__dataclass_fields__[last].metadata.get("on_resume", "fixed")


def _differences(stored: TrainConfig, wanted: TrainConfig) -> dict[str, list[Any]]:
    """Return each option that differs and is not free, with its value in both, as JSON holds them."""
    before, after = flatten(in_json(stored)), flatten(in_json(wanted))
    return {name: [value, after[name]] for name, value in before.items() if after[name] != value and _rule(name) != "free"}
