"""The folder of a run: what lies in it, that nothing in it is overwritten, and where a run in it goes on."""

import json
import shutil
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError
from ..files import atomic_file, require_file, write_text
from ..tokenizer import AnyTokenizer, read_tokenizer
from ..tokenizer.chat_template import CONFIG_FILE as TOKENIZER_CONFIG_FILE
from ..tokenizer.chat_template import TEMPLATE_FILE
from .checkpoint.layout import FOLDER_NAME as CHECKPOINTS
from .checkpoint.layout import checkpoint_step, list_checkpoints, newest_valid, verify_checkpoint
from .checkpoint.writer import remove_leftovers
from .config import TrainConfig, load_config, save_config
from .diagnosis import FILE_NAME as DIAGNOSIS_FILE
from .metrics import FILE_NAME as METRICS_FILE
from .plot import FILE_NAME as PLOT_FILE
from .sample_log import FILE_NAME as SAMPLES_FILE

CONFIG_FILE, TOKENIZER_FILE, DATA_FILE = "config.json", "tokenizer.json", "data.json"

# What a folder in Hugging Face's manner says of how its model is talked to: a run that begins with such a folder keeps it.
CHAT_FILES = (TOKENIZER_CONFIG_FILE, "generation_config.json", TEMPLATE_FILE)

# There while a run's folder is being made: what lies beside it then is the remains of a run that was killed before it began.
_BEGINNING = ".beginning"
_MADE = (TOKENIZER_FILE, *CHAT_FILES, DATA_FILE, METRICS_FILE, SAMPLES_FILE, PLOT_FILE, DIAGNOSIS_FILE)

Resume = Literal["auto"] | Path


def holds_run(out: Path) -> bool:
    """Return whether a run has begun in the folder."""
    return (out / CONFIG_FILE).exists()


def require_no_run(out: Path) -> None:
    """Raise a `UserError` where `out` is a file, or a folder with anything in it that a run would overwrite."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: name a folder with --out")
    if holds_run(out):
        raise UserError(f"{out} holds a run already: go on with --resume auto, or name another folder with --out")
    if (out / _BEGINNING).exists():
        return
    for name in (*_MADE, CHECKPOINTS):
        if (out / name).exists():
            raise UserError(f"{out} holds a {name} that a run would overwrite: name another folder with --out")


def mark_beginning(out: Path) -> None:
    """Make a run's folder and note that all in it, until `begin_run`, is the remains of a beginning."""
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / _BEGINNING, "")


def make_folder(config: TrainConfig, data_record: dict[str, Any]) -> None:
    """Put what the run begins with into a marked folder, in place of the remains of an earlier beginning.

    That is the tokenizer, the record of the data, and the files about chats of the folder that the weights come from.

    The caller holds the lock of the folder's checkpoints.
    """
    out = config.out
    _remove_half_written(out)
    for name in _MADE:
        (out / name).unlink(missing_ok=True)
    for folder in list_checkpoints(out):
        shutil.rmtree(folder)
    source = config.init or config.data.tokenizer.parent
    copies = {name: source / name for name in CHAT_FILES} | {TOKENIZER_FILE: config.data.tokenizer}
    if config.data.chat_template is not None:
        copies[TEMPLATE_FILE] = config.data.chat_template
    for name, path in copies.items():
        if path.is_file():
            with atomic_file(out / name) as file:
                file.write(path.read_bytes())
    write_data_record(out, data_record)


def _remove_half_written(out: Path) -> None:
    """Remove what processes that were killed while they wrote a file or a checkpoint have left beside it."""
    remove_leftovers(out)
    for name in (_BEGINNING, CONFIG_FILE, *_MADE):
        for path in out.glob(f".{name}.*.tmp"):
            path.unlink()


def begin_run(config: TrainConfig) -> None:
    """Write the configuration, once a first checkpoint is there to go on from: it is what makes the folder a run."""
    save_config(config, config.out / CONFIG_FILE)
    (config.out / _BEGINNING).unlink(missing_ok=True)


def _read_data_file(run: Path) -> dict[str, Any]:
    path = require_file(run / DATA_FILE, "the run's record of its data", "it cannot be resumed without")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not a record of data ({error}): the run cannot be resumed without") from error


def write_data_record(run: Path, record: dict[str, Any]) -> None:
    """Note what the run has of data."""
    write_text(run / DATA_FILE, json.dumps(record, indent=2) + "\n")


def restore_tokenizer(config: TrainConfig, tokenizer: AnyTokenizer) -> None:
    """Put `tokenizer`, which the run was trained with, into its folder where another file, or none, is."""
    path, source = config.out / TOKENIZER_FILE, config.data.tokenizer
    try:
        if read_tokenizer(require_file(path, "tokenizer")).fingerprint == tokenizer.fingerprint:
            return
    except UserError:
        pass
    with atomic_file(path) as file:
        file.write(source.read_bytes())
    print(f"restored {path}, from {source}", file=sys.stderr)


def read_data_record(run: Path, since: int = 0) -> dict[str, Any]:
    """Return what the run has noted of its data, or of those that an extension at step `since` has given it."""
    record = _read_data_file(run)
    if since == 0:
        return record
    for later in record.get("history", ()):
        if later["step"] == since:
            return later
    raise UserError(f"{run / DATA_FILE} has no record of the data since step {since}: the run cannot be resumed without")


def record_extension(config: TrainConfig, data_record: dict[str, Any]) -> None:
    """Write what an extension has changed to the run's folder, unless it is there.

    The configuration comes last, for without it nobody looks at the record of data.
    """
    path = config.out / CONFIG_FILE
    stored = load_config(path).history
    if stored == config.history:
        return
    for change in config.history:
        if change not in stored and "data.train" in change.changes:
            record = _read_data_file(config.out)
            earlier = [later for later in record.get("history", ()) if later["step"] < change.step]
            record["history"] = [*earlier, {"step": change.step, **data_record}]
            write_data_record(config.out, record)
    save_config(config, path)
    for change in config.history:
        if change not in stored:
            print(f"from step {change.step} on: {change}", file=sys.stderr)


def find_newest_valid(run: Path, names: Collection[str] | None = None) -> Path:
    """Return the newest valid checkpoint of a run, and say on stderr which were passed over, and why; none is a `UserError`.

    `names` as in `verify_checkpoint`.
    """
    found, skipped = newest_valid(run, names)
    for folder, reason in skipped:
        print(f"skipped {folder.name}: {reason}", file=sys.stderr)
    if found is None:
        what = f"no valid checkpoint among {len(skipped)}" if skipped else "no checkpoint"
        raise UserError(f"{run} has {what}: a run cannot go on from nothing; begin anew in another folder with --out")
    return found


def checkpoint_to_resume(config: TrainConfig, resume: Resume) -> Path:
    """Return the checkpoint that a run goes on from: the newest valid one, or the one named, which has to be valid.

    Later checkpoints are set aside, under names that begin with `set-aside-`, because the run comes past their steps again.
    """
    run = config.out
    if resume == "auto":
        found = find_newest_valid(run)
    else:
        found = resume
        if found.resolve() not in {folder.resolve() for folder in list_checkpoints(run)}:
            names = ", ".join(folder.name for folder in list_checkpoints(run)) or "none"
            raise UserError(f"{found} is not a checkpoint of the run in {run}: it has {names} in {run / CHECKPOINTS}")
        verify_checkpoint(found)
    if checkpoint_step(found) < config.since("data.train"):
        raise UserError(
            f"{found} is from before step {config.since('data.train')}, since which the run has other data: add --extend keep, "
            "and name in --data.train what it goes on with"
        )
    checkpoints = list_checkpoints(run)
    for folder in checkpoints[[path.resolve() for path in checkpoints].index(found.resolve()) + 1 :]:
        aside = folder.with_name(f"set-aside-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        print(f"set {folder.name} aside as {aside.name}: the run goes on from {found.name}", file=sys.stderr)
    _remove_half_written(run)
    # A kill just after the configuration was written has left it.
    (run / _BEGINNING).unlink(missing_ok=True)
    return found
