"""Open a run: check the configuration and data before creating a folder, then start or resume the run."""

import dataclasses
import functools
import glob
import sys
from typing import Any

from ..errors import UserError
from ..files import require_file
from ..tokenizer import END_OF_TEXT, AnyTokenizer, read_tokenizer
from .batch_size import device_memory, fit_memory
from .bits_per_byte import token_sizes
from .callbacks.samples import check_samples
from .checkpoint.reader import read_state
from .checkpoint.writer import CheckpointWriter
from .config import CONFIG_FILE, TOKENIZER_FILE, Extend, Resume, TrainConfig, load_config
from .data.datasets import ENDING, check_tokens, open_data, open_source_valid
from .data.packing import Packing
from .data.record import check_data, make_record, updated_record
from .data.sampling import TrainingData
from .data.token_file import TokenDataset
from .data.validation import ValidationData
from .distributed import World, check_parallel
from .extension import extended, reconcile
from .folder import (
    begin_run,
    checkpoint_to_resume,
    make_run_folder,
    read_data_record,
    record_extension,
    require_no_run,
    restore_tokenizer,
    write_data_record,
)
from .pretrained import initialise
from .schedule import sequences
from .sources import Sources
from .tracker import check_tracker
from .trainer import Trainer


def open_run(
    config: TrainConfig, resume: Resume | None, extend: Extend | None, accept_valid: bool, world: World
) -> tuple[Trainer, AnyTokenizer, Resume | None]:
    """Check the configuration and data before creating a folder, then build the model.

    Return the trainer, the tokenizer, and `resume`, which names a checkpoint if the run is extended.
    """
    run = config.out
    # The folder may have been moved.
    stored = dataclasses.replace(load_config(run / CONFIG_FILE), out=run) if resume else None
    if stored:
        config = reconcile(stored, config, extend)
    else:
        if extend is not None:
            raise UserError(f"extend is {extend}, but no run is resumed: add --resume auto, and the run's folder as --out")
        world.on_first(lambda: require_no_run(run))
    check_parallel(config, world)
    config = fit_memory(config, world.on_first(lambda: device_memory(world.device)), world.num_readers)
    check_tracker(config.tracker)
    tokenizer = _read_tokenizer(config, bool(resume))
    if resume:
        _require_data(config)
    if config.data.documents and tokenizer.end_of_text_id is None:
        raise UserError(f"data.documents is set, but {config.data.tokenizer} has no {END_OF_TEXT} token to end documents")
    check_samples(config, tokenizer)
    datasets, valid_data = world.first_before_others(lambda: open_data(config.data, tokenizer))
    source_valid = world.first_before_others(lambda: open_source_valid(config.data, tokenizer))
    context_length, packing = config.model.context_length, Packing(config.data.packing, tokenizer.end_of_text_id)
    for dataset in (*datasets, valid_data, *source_valid):
        check_tokens(dataset, config.model.vocab_size, context_length)
    train_data = TrainingData(datasets, context_length, config.seed, config.data.weights, packing)
    if train_data.packed and world.is_first:
        epochs = sequences(config, 0, config.steps) / sum(train_data.num_windows)
        summaries = [windows.summary() for windows in train_data.packed]
        print("\n".join([*summaries, f"{config.steps:,} steps read the windows {epochs:.1f} times"]), file=sys.stderr)
    sources = None
    if (names := config.data.source_names) is not None:
        valid = [ValidationData(data, config.eval_sequences, context_length, packing) for data in source_valid]
        by_source = config.data.names is not None and len(names) > 1
        sources = Sources(names, valid, token_sizes(tokenizer), log_training_losses=by_source)
    if resume and stored:
        config, resume = extended(stored, config, extend, resume, train_data)
        check_data(read_data_record(run), _validation_texts(valid_data, sources), tokenizer, accept_valid)
    # Validation files are small, so verify them now. Training files are verified in the background.
    for dataset in (valid_data, *source_valid):
        world.on_first(dataset.verify)
    first = None if resume or config.init is None else functools.partial(initialise, folder=config.init, tokenizer=tokenizer)
    end_of_text, resumes = tokenizer.end_of_text_id, bool(resume)
    trainer = Trainer(config, train_data, valid_data, end_of_text, first, world, resumes, sources)
    return trainer, tokenizer, resume


def _validation_texts(valid: TokenDataset, sources: Sources | None) -> dict[str | None, TokenDataset]:
    return {None: valid} | ({} if sources is None else {name: data.dataset for name, data in sources.valid.items()})


def _read_tokenizer(config: TrainConfig, resumes: bool) -> AnyTokenizer:
    path, own = config.data.tokenizer, config.out / TOKENIZER_FILE
    remedy = "train one with `tilewright tokenizer train`"
    if resumes and own.is_file():
        remedy = f"pass its new path, or use the run's copy with --data.tokenizer {own}"
    return read_tokenizer(require_file(path, "tokenizer", remedy))


def _require_data(config: TrainConfig) -> None:
    # If the run was copied from another machine, its paths may not exist here.
    data = config.data
    named = {"train": data.train, "valid": (data.valid,), "source-valid": data.source_valid or ()}
    for option, path in ((option, path) for option, paths in named.items() for path in paths):
        remote_or_several = ":/" in str(path) or glob.has_magic(str(path))
        if not (remote_or_several or path.exists() or path.with_suffix(ENDING).exists()):
            raise UserError(f"{path} does not exist: pass the new path of the run's data with --data.{option}")


def begin(trainer: Trainer, tokenizer: AnyTokenizer, writer: CheckpointWriter) -> None:
    """Create the folder of a new run, with a first checkpoint."""
    on_first = trainer.world.on_first
    record = make_record(trainer.train_data, _validation_texts(trainer.valid_data, trainer.sources), tokenizer)
    on_first(lambda: make_run_folder(trainer.config, record))
    # A checkpoint at step 0 lets a run resume wherever it is interrupted.
    writer.save(0, trainer.tensors(), {"unfinished_row": None})
    writer.wait()
    on_first(lambda: begin_run(trainer.config))


def resume_run(trainer: Trainer, tokenizer: AnyTokenizer, resume: Resume) -> dict[str, Any] | None:
    """Load the checkpoint. Return the metrics row of its step if a signal stopped the run during validation, else None.

    Update the folder's data record and tokenizer to match the data and tokenizer in use.
    """
    run, on_first = trainer.config.out, trainer.world.on_first
    folder = on_first(lambda: checkpoint_to_resume(trainer.config, resume))
    # Only after `checkpoint_to_resume` has renamed later checkpoints, which do not belong to the extended run.
    on_first(lambda: record_extension(trainer.config, trainer.train_data.record()))
    trainer.load(folder)

    def update() -> None:
        restore_tokenizer(trainer.config, tokenizer)
        texts = _validation_texts(trainer.valid_data, trainer.sources)
        record = read_data_record(run)
        updated = updated_record(record, texts, tokenizer, trainer.step)
        if updated != record:
            write_data_record(run, updated)

    on_first(update)
    return read_state(folder)["unfinished_row"]
