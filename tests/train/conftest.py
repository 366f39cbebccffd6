import dataclasses
import gc
import os
import random
from pathlib import Path

import pytest

from tilewright.model import ModelConfig
from tilewright.tokenizer import Tokenizer, train_bpe
from tilewright.train import OptimizerConfig, TrainConfig, run
from tilewright.train.metrics import FILE_NAME, read_metrics
from tilewright.train.presets import corpus_files
from tilewright.train.sweep import grid

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "small", "red", "bird", "in", "that", "old", "tree")


def write_corpus(path, num_documents, seed):
    rng = random.Random(seed)
    documents = (" ".join(rng.choices(WORDS, k=rng.randint(5, 20))) for _ in range(num_documents))
    path.write_text("".join(f"{document}.\n<|endoftext|>\n" for document in documents))


@pytest.fixture(autouse=True)
def short_runs():
    """Skip the plots of runs and sweeps, and keep the objects that a run froze.

    A plot takes longer than a short run, and so does a collection among all imported objects. Both have their own tests.
    """
    # Not `monkeypatch`, which a test may undo.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "plot_losses", lambda folder, *_: (folder / "loss.png").touch())
        patch.setattr(grid, "plot_sweep", lambda result: (result.out / "sweep.png").touch())
        patch.setattr(gc, "unfreeze", lambda: None)
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder with train.txt, valid.txt and tokenizer.json, as the commands write it."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder / "train.txt", 200, seed=0)
    write_corpus(folder / "valid.txt", 50, seed=1)
    Tokenizer(*train_bpe(folder / "train.txt", 300, ["<|endoftext|>"]), ["<|endoftext|>"]).save(folder / "tokenizer.json")
    return folder


@pytest.fixture
def config(corpus, tmp_path):
    """A run of seconds with a warm-up, a cosine schedule, validations and several checkpoints."""
    return TrainConfig(
        out=tmp_path / "run",
        model=ModelConfig(vocab_size=300, context_length=16, d_model=16, num_layers=2, num_heads=2, d_ff=24),
        data=corpus_files(corpus),
        steps=12,
        batch_size=4,
        optimizer=OptimizerConfig(lr=1e-2, final_lr=1e-3, warmup_steps=3),
        log_every=1,
        eval_every=4,
        eval_sequences=12,
        checkpoint_every=4,
        device="cpu",
    )


@pytest.fixture
def changed(config):
    """Return a function that changes options of the configuration, as in changed(steps=3)."""
    return lambda **changes: dataclasses.replace(config, **changes)


@pytest.fixture
def surviving(monkeypatch):
    """Maps each checkpoint to the steps whose metrics were flushed to disk when the checkpoint appeared."""
    if not Path("/proc/self/fd").exists():
        pytest.skip("the names of open files are read from /proc")
    synced, at_checkpoint = [], {}
    fsync, rename = os.fsync, Path.rename

    def noted_fsync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        rows = read_metrics(path.parent) if path.name == FILE_NAME else None
        fsync(descriptor)
        if rows is not None:
            synced[:] = [row["step"] for row in rows]

    def noted_rename(old, new):
        if new.name.startswith("step-"):
            at_checkpoint[new.name] = list(synced)
        return rename(old, new)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    return at_checkpoint
