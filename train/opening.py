"""How a run is opened: all that can be wrong is checked before a folder is made, then it begins, or goes on."""

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
from .config import TrainConfig, load_config
from .data.datasets import ENDING, check_fits, open_data, open_source_valid
from .data.packing import Packing
from .data.record import check_data, make_record, updated_record
from .data.sampling import TrainingData
from .data.token_file import TokenDataset
from .data.validation import ValidationData
from .distributed import World, check_parallel
from .extension import Extend, extended, settle
from .folder import (
    CONFIG_FILE,
    TOKENIZER_FILE,
    Resume,
    begin_run,
    checkpoint_to_resume,
    make_folder,
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
    """Check everything that can be wrong before a folder is made, then build the model; its tokenizer comes with it.

    Last comes what the run resumes from: an extension names the checkpoint.
    """
    run = config.out
    # The folder may have moved since.
    stored = dataclasses.replace(load_config(run / CONFIG_FILE), out=run) if resume else None
    if stored:
        config = settle(stored, config, extend)
    else:
        if extend is not None:
            raise UserError(f"extend is {extend}, but no run goes on: add --resume auto, with the folder of a run as --out")
        world.on_first(lambda: require_no_run(run))
    check_parallel(config, world)
    config = fit_memory(config, world.on_first(lambda: device_memory(world.device)), world.num_readers)
    check_tracker(config.tracker)
    tokenizer = _read_tokenizer(config, bool(resume))
    if resume:
        _require_data(config)
    if config.data.documents and tokenizer.end_of_text_id is None:
        raise UserError(f"data.documents is set, but {config.data.tokenizer} has no {END_OF_TEXT} that bounds documents")
    check_samples(config, tokenizer)
    datasets, valid_data = world.first_before_others(lambda: open_data(config.data, tokenizer))
    source_valid = world.first_before_others(lambda: open_source_valid(config.data, tokenizer))
    context_length, packing = config.model.context_length, Packing(config.data.packing, tokenizer.end_of_text_id)
    for dataset in (*datasets, valid_data, *source_valid):
        check_fits(dataset, config.model.vocab_size, context_length)
    train_data = TrainingData(datasets, context_length, config.seed, config.data.weights, packing)
    if train_data.packed and world.is_first:
        epochs = sequences(config, 0, config.steps) / sum(train_data.num_windows)
        summaries = [windows.summary() for windows in train_data.packed]
        print("\n".join([*summaries, f"{config.steps:,} steps read {epochs:.1f} times as many windows"]), file=sys.stderr)
    sources = None
    if (names := config.data.source_names) is not None:
        valid = [ValidationData(data, config.eval_sequences, context_length, packing) for data in source_valid]
        by_source = config.data.names is not None and len(names) > 1
        sources = Sources(names, valid, token_sizes(tokenizer), trains_apart=by_source)
    if resume and stored:
        config, resume = extended(stored, config, extend, resume, train_data)
        check_data(read_data_record(run), _validation_texts(valid_data, sources), tokenizer, accept_valid)
    # So few that reading them all is nothing; the training files are verified meanwhile.
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
    remedy = "make one with `tilewright tokenizer train`"
    if resumes and own.is_file():
        remedy = f"name where it is now, or the run's own, with --data.tokenizer {own}"
    return read_tokenizer(require_file(path, "tokenizer", remedy))


def _require_data(config: TrainConfig) -> None:
    # Of a run that was copied, the paths are those of where it was.
    data = config.data
    named = {"train": data.train, "valid": (data.valid,), "source-valid": data.source_valid or ()}
    for option, path in ((option, path) for option, paths in named.items() for path in paths):
        remote_or_several = ":/" in str(path) or glob.has_magic(str(path))
        if not (remote_or_several or path.exists() or path.with_suffix(ENDING).exists()):
            raise UserError(f"{path} does not exist: name where the run's data are now with --data.{option}")


def begin(trainer: Trainer, tokenizer: AnyTokenizer, writer: CheckpointWriter) -> None:
    """Make the folder of a new run, with a first checkpoint."""
    on_first = trainer.world.on_first
    record = make_record(trainer.train_data, _validation_texts(trainer.valid_data, trainer.sources), tokenizer)
    on_first(lambda: make_folder(trainer.config, record))
    # So that a run can go on from wherever it is interrupted.
    writer.save(0, trainer.tensors(), {"unfinished_row": None})
    writer.wait()
    on_first(lambda: begin_run(trainer.config))


def resume_run(trainer: Trainer, tokenizer: AnyTokenizer, resume: Resume) -> dict[str, Any] | None:
    """Load the checkpoint; return the row of its step if the run was stopped while it was being validated.

    The record of the data and the copy of the tokenizer in the folder become again what the run goes on with.
    """
    run, on_first = trainer.config.out, trainer.world.on_first
    folder = on_first(lambda: checkpoint_to_resume(trainer.config, resume))
    # After later checkpoints are set aside, which are not of the run as it is extended.
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
