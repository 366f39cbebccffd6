import dataclasses
import json
import math

import pytest
import torch

from tilewright.errors import UserError
from tilewright.tokenizer import Tokenizer
from tilewright.train import train
from tilewright.train.data.datasets import open_data
from tilewright.train.data.record import validation_notes
from tilewright.train.data.sampling import TrainingData
from tilewright.train.data.token_file import HEADER_BYTES
from tilewright.train.device import resolve_device
from tilewright.train.distributed import World
from tilewright.train.distributed.layout import Layout
from tilewright.train.metrics import read_metrics
from tilewright.train.sources import Sources
from tilewright.train.trainer import Trainer


@pytest.fixture
def mixed(config, corpus):
    """A run on two sources, each with validation data."""
    files = (corpus / "train.txt", corpus / "valid.txt")
    data = dataclasses.replace(config.data, train=files, weights=(3.0, 1.0), source_valid=files[::-1])
    return dataclasses.replace(config, data=data, micro_batch_size=2)


def test_source_losses_average_to_the_step_loss(mixed, tmp_path):
    plain = dataclasses.replace(mixed, data=dataclasses.replace(mixed.data, source_valid=None), out=tmp_path / "plain")
    train(plain)
    named = dataclasses.replace(mixed, data=dataclasses.replace(mixed.data, names=("old", "new")))
    train(named)
    expected, rows = read_metrics(plain.out), read_metrics(named.out)
    # Logging by source does not change training.
    assert [row["loss"] for row in rows] == [row["loss"] for row in expected]
    for row in rows:
        assert 0.75 * row["loss/old"] + 0.25 * row["loss/new"] == pytest.approx(row["loss"], rel=1e-5)
    assert not any("loss/" in name for row in expected for name in row)


def test_each_source_is_validated_on_its_own_text(mixed):
    train(mixed)
    rows = [row for row in read_metrics(mixed.out) if "valid_loss" in row]
    for row in rows:
        # The first source has the same validation text as the run.
        assert row["valid_loss/train"] == row["valid_loss"]
        assert row["valid_bits_per_byte/train"] == row["valid_bits_per_byte"]
        assert row["valid_loss/valid"] != row["valid_loss"]
    # Without names, training losses are not logged by source.
    assert "loss/train" not in rows[0]


def test_source_without_sequences_in_a_step_has_nan_loss():
    sources = Sources(("a", "b", "c"))
    targets = torch.tensor([[1, 2], [3, -100], [-100, -100]])
    losses = sources.training_losses(
        torch.tensor([4.0, 3.0, 0.0]), targets, torch.tensor([0, 0, 1]), World(torch.device("cpu"))
    )
    assert losses["loss/a"] == pytest.approx(7 / 3)
    assert math.isnan(losses["loss/b"])
    assert math.isnan(losses["loss/c"])


def test_loss_by_sequence_equals_the_loss_of_each_sequence_alone(mixed):
    tokenizer = Tokenizer.load(mixed.data.tokenizer)
    train_data, valid = open_data(mixed.data, tokenizer)
    data = TrainingData(train_data, mixed.model.context_length, mixed.seed)
    config = dataclasses.replace(mixed, model=dataclasses.replace(mixed.model, logit_softcap=3.0))
    trainer = Trainer(config, data, valid, world=World(resolve_device("cpu")), sources=Sources(("a", "b")))
    try:
        inputs, targets = data.batch(range(3))
        targets[1, 4:] = -100
        loss, by_sequence = trainer.loss(inputs, targets)
        assert by_sequence.sum().item() == pytest.approx(loss.item(), rel=1e-5)
        for row in range(3):
            alone = trainer.loss(inputs[row : row + 1], targets[row : row + 1])[0]
            assert by_sequence[row].item() == pytest.approx(alone.item(), rel=1e-5)
        assert not by_sequence.requires_grad
    finally:
        trainer.close()


class Shared(World):
    """The first of two processes that each have half of the positions of the same sequences."""

    def __init__(self, others):
        super().__init__(torch.device("cpu"), size=2, layout=Layout(cp=2))
        self._others = others

    def sum(self, value):
        return value + self._others


def test_losses_of_shared_sequences_count_all_targets():
    targets = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    world = Shared(torch.tensor([[3.0, 5.0], [4.0, 4.0]]))
    losses = Sources(("a", "b")).training_losses(torch.tensor([1.0, 3.0]), targets, torch.tensor([0, 1]), world)
    assert losses == {"loss/a": 1.0, "loss/b": 2.0}


def test_validation_text_of_a_source_is_verified_and_recorded(mixed, tmp_path):
    own = (tmp_path / "own.txt", mixed.data.valid)
    own[0].write_text(mixed.data.valid.read_text())
    mixed = dataclasses.replace(mixed, data=dataclasses.replace(mixed.data, source_valid=own), steps=4)
    train(mixed)
    own[0].with_suffix(".tokens").unlink()
    own[0].write_text(own[0].read_text() * 2)
    with pytest.raises(UserError, match=r"own.tokens is not the validation data of source train: .* step 0.* --accept-valid"):
        train(mixed, resume="auto")
    train(mixed, resume="auto", accept_valid=True)
    record = json.loads((mixed.out / "data.json").read_text())
    assert validation_notes(record) == [(4, f"validation losses of train after this step are of {tmp_path / 'own.tokens'}")]
    with own[0].with_suffix(".tokens").open("r+b") as file:
        file.seek(HEADER_BYTES)
        file.write(b"\xff\x00")
    with pytest.raises(UserError, match=r"own.tokens has changed: the hash of its ids"):
        train(mixed, resume="auto")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ("a",)}, r"data.names is \('a',\): expected distinct names without / for each of the 2 training files"),
        ({"names": ("a", "a")}, "distinct names"),
        ({"names": ("a", "b/c")}, "names without /"),
        ({"source_valid": ()}, "data.source_valid is .*: expected one file for each of the 2 sources"),
        ({"packing": "greedy"}, "data.packing is 'greedy': .*one of none, best_fit"),
    ],
)
def test_invalid_names_and_validation_texts_raise(mixed, changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(mixed.data, **changes)
