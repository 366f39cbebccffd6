"""The folder of a run: create it without overwriting files, and find the checkpoint to resume from."""

import json
import shutil
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import atomic_file, require_file, write_text
from ..tokenizer import AnyTokenizer, read_tokenizer
from ..tokenizer.chat_template import CONFIG_FILE as TOKENIZER_CONFIG_FILE
from ..tokenizer.chat_template import TEMPLATE_FILE
from .checkpoint.layout import FOLDER_NAME as CHECKPOINTS
from .checkpoint.layout import checkpoint_step, list_checkpoints, newest_valid, verify_checkpoint
from .checkpoint.writer import remove_leftovers
from .config import CONFIG_FILE, TOKENIZER_FILE, Resume, TrainConfig, holds_run, load_config, save_config
from .diagnosis import FILE_NAME as DIAGNOSIS_FILE
from .metrics import FILE_NAME as METRICS_FILE
from .plot import FILE_NAME as PLOT_FILE
from .sample_log import FILE_NAME as SAMPLES_FILE

DATA_FILE = "data.json"

# Chat and generation files of a Hugging Face folder. A run that starts from such a folder copies them.
CHAT_FILES = (TOKENIZER_CONFIG_FILE, "generation_config.json", TEMPLATE_FILE)

# Marker that exists while the folder is created. A folder with it was left by a run killed before its first checkpoint.
_BEGINNING = ".beginning"
_MADE = (TOKENIZER_FILE, *CHAT_FILES, DATA_FILE, METRICS_FILE, SAMPLES_FILE, PLOT_FILE, DIAGNOSIS_FILE)


def require_no_run(out: Path) -> None:
    """Raise a `UserError` if `out` is a file, or a folder with files that a run would overwrite."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: choose a folder with --out")
    if holds_run(out):
        raise UserError(f"{out} already contains a run: resume it with --resume auto, or choose another folder with --out")
    if (out / _BEGINNING).exists():
        return
    for name in (*_MADE, CHECKPOINTS):
        if (out / name).exists():
            raise UserError(f"{out} contains {name}, which a run would overwrite: choose another folder with --out")


def mark_beginning(out: Path) -> None:
    """Create a run's folder and mark it as incomplete until `begin_run`."""
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / _BEGINNING, "")


def make_run_folder(config: TrainConfig, data_record: dict[str, Any]) -> None:
    """Write the initial files of a run into a marked folder, and remove those of an incomplete earlier run.

    The files are the tokenizer, the data record, and the chat files of the folder that the weights come from. The caller must
    hold the lock of the folder's checkpoints.
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
    """Remove temporary files and checkpoints of processes that were killed while writing."""
    remove_leftovers(out)
    for name in (_BEGINNING, CONFIG_FILE, *_MADE):
        for path in out.glob(f".{name}.*.tmp"):
            path.unlink()


def begin_run(config: TrainConfig) -> None:
    """Write the configuration, which makes the folder a run. A first checkpoint must exist."""
    save_config(config, config.out / CONFIG_FILE)
    (config.out / _BEGINNING).unlink(missing_ok=True)


def _read_data_file(run: Path) -> dict[str, Any]:
    path = require_file(run / DATA_FILE, "the run's data record", "the run cannot be resumed without it")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not a data record ({error}): the run cannot be resumed without it") from error


def write_data_record(run: Path, record: dict[str, Any]) -> None:
    """Write the run's data record."""
    write_text(run / DATA_FILE, json.dumps(record, indent=2) + "\n")


def restore_tokenizer(config: TrainConfig, tokenizer: AnyTokenizer) -> None:
    """Copy the tokenizer into the run's folder if the file there is missing or differs from `tokenizer`."""
    path, source = config.out / TOKENIZER_FILE, config.data.tokenizer
    try:
        if read_tokenizer(require_file(path, "tokenizer")).fingerprint == tokenizer.fingerprint:
            return
    except UserError:
        pass
    with atomic_file(path) as file:
        file.write(source.read_bytes())
    print(f"restored {path} from {source}", file=sys.stderr)


def read_data_record(run: Path, since: int = 0) -> dict[str, Any]:
    """Return the record of the run's data, or of the data that an extension at step `since` introduced."""
    record = _read_data_file(run)
    if since == 0:
        return record
    for later in record.get("history", ()):
        if later["step"] == since:
            return later
    raise UserError(f"{run / DATA_FILE} has no record of the data since step {since}: the run cannot be resumed without it")


def record_extension(config: TrainConfig, data_record: dict[str, Any]) -> None:
    """Write the changes of an extension to the run's folder, unless they are already there.

    Write the configuration last: a new data record has no effect without it.
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
    """Return the newest valid checkpoint of a run; raise a `UserError` if there is none.

    Print skipped checkpoints and the reasons to stderr. `names` as in `verify_checkpoint`.
    """
    found, skipped = newest_valid(run, names)
    for folder, reason in skipped:
        print(f"skipped {folder.name}: {reason}", file=sys.stderr)
    if found is None:
        what = f"no valid checkpoint among {len(skipped)}" if skipped else "no checkpoint"
        raise UserError(f"{run} has {what}, so the run cannot be resumed: start a new run in another folder with --out")
    return found


def checkpoint_to_resume(config: TrainConfig, resume: Resume) -> Path:
    """Return the checkpoint to resume from: the newest valid one, or the named one, which must be valid.

    Rename later checkpoints to `set-aside-...`, because the resumed run reaches their steps again.
    """
    run = config.out
    if resume == "auto":
        found = find_newest_valid(run)
    else:
        found = resume
        if found.resolve() not in {folder.resolve() for folder in list_checkpoints(run)}:
            names = ", ".join(folder.name for folder in list_checkpoints(run)) or "none"
            raise UserError(f"{found} is not a checkpoint of the run in {run}: {run / CHECKPOINTS} contains {names}")
        verify_checkpoint(found)
    if checkpoint_step(found) < config.since("data.train"):
        raise UserError(
            f"{found} is from before step {config.since('data.train')}, where the training data changed: add --extend keep, "
            "and choose the data with --data.train"
        )
    checkpoints = list_checkpoints(run)
    for folder in checkpoints[[path.resolve() for path in checkpoints].index(found.resolve()) + 1 :]:
        aside = folder.with_name(f"set-aside-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        print(f"renamed {folder.name} to {aside.name}: the run resumes from {found.name}", file=sys.stderr)
    _remove_half_written(run)
    # Left behind if the process was killed between the two statements of `begin_run`.
    (run / _BEGINNING).unlink(missing_ok=True)
    return found
