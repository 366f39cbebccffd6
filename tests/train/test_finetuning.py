"""Fine-tuning from folders: a run on chats equals a plain PyTorch loop with a transformers model."""

import dataclasses
import json
import shutil
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from chat_cases import make_chats, write_chats, write_tokenizer

from tilewright.errors import UserError
from tilewright.tokenizer import Tokenizer
from tilewright.tokenizer.chat_template import ChatTemplate
from tilewright.tokenizer.chats import SCORED, encode_conversation
from tilewright.train import load_run, train
from tilewright.train.checkpoint.layout import list_checkpoints
from tilewright.train.command import run_train_command
from tilewright.train.config import load_config
from tilewright.train.data.datasets import open_data
from tilewright.train.data.packing import conversation_borders
from tilewright.train.data.sampling import TrainingData
from tilewright.train.distributed import World
from tilewright.train.metrics import read_metrics
from tilewright.train.presets import finetuning
from tilewright.train.trainer import Trainer

CONTEXT, STEPS, BATCH = 48, 10, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny Llama written by transformers, a tokenizer, a chat template and chats."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("folder") / "llama"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=290, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, eos_token_id=289,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    assert write_tokenizer(folder).vocab_size == 290
    write_chats(folder.parent / "train.jsonl", make_chats(60))
    write_chats(folder.parent / "valid.jsonl", make_chats(10, seed=1))
    return folder


def run_of(folder, out, **changes):
    base = finetuning(folder)
    data = dataclasses.replace(base.data, train=(folder.parent / "train.jsonl",), valid=folder.parent / "valid.jsonl")
    optimizer = dataclasses.replace(base.optimizer, lr=1e-3, final_lr=1e-4, warmup_steps=2)
    options = {"steps": STEPS, "batch_size": BATCH, "micro_batch_size": 2, "log_every": 1, "eval_every": 5, "device": "cpu"}
    return dataclasses.replace(base, out=out, data=data, optimizer=optimizer, **(options | {"checkpoint_every": 5} | changes))


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    config = run_of(folder, tmp_path_factory.mktemp("runs") / "run")
    train(config)
    return config


def data_of(config):
    tokenizer = Tokenizer.load(config.data.tokenizer)
    train_data, valid = open_data(config.data, tokenizer)
    return TrainingData(train_data, config.model.context_length, config.seed), valid


def conversations_of(config, samples):
    """Return the conversations in the windows of some samples, encoded from their text and truncated to the context."""
    tokenizer, template = Tokenizer.load(config.data.tokenizer), ChatTemplate.load(config.data.tokenizer.parent)
    lines = config.data.train[0].read_text().splitlines()
    encoded = [encode_conversation(json.loads(line)["messages"], tokenizer, template) for line in lines]
    data, _ = data_of(config)
    (windows,) = data.packed
    starts = conversation_borders(windows.dataset).tolist()
    for sample in samples:
        _, (window,) = data._places(range(sample, sample + 1))
        for number in (starts.index(first) for first, _ in windows.pieces(window)):
            ids, marks = encoded[number]
            yield torch.tensor(ids.astype(int))[: CONTEXT + 1], torch.tensor(marks & SCORED != 0)[: CONTEXT + 1]


def reference_loss(model, config, samples):
    """Return the mean loss over assistant tokens by the transformers model, with one forward pass per conversation."""
    loss, count = torch.zeros(()), 0
    for ids, scored in conversations_of(config, samples):
        logits = model(ids[None, :-1]).logits[0]
        loss = loss + F.cross_entropy(logits[scored[1:]], ids[1:][scored[1:]], reduction="sum")
        count += int(scored[1:].sum())
    return loss / count


def test_ten_steps_equal_a_plain_loop_with_transformers(folder, run):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = run.optimizer
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=settings.betas, eps=settings.eps)
    losses = []
    for step, row in zip(range(STEPS), read_metrics(run.out), strict=True):
        loss = reference_loss(model, run, range(step * BATCH, (step + 1) * BATCH))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = row["lr"]
        optimizer.step()
        losses.append(loss.item())
    assert [row["loss"] for row in read_metrics(run.out)] == pytest.approx(losses, rel=2e-5)
    assert losses[-1] < losses[0] - 0.02


def test_validation_scores_only_assistant_tokens(run):
    """`eval_sequences` exceeds the number of windows, so all conversations are scored."""
    model, _ = load_run(run.out, "cpu")
    _, valid = data_of(run)
    loss, count = 0.0, 0
    starts = conversation_borders(valid).tolist()
    for start, end in pairwise(starts):
        size = min(end - start, CONTEXT + 1)
        records = valid.records(torch.tensor([start]).numpy(), size)[0]
        ids, scored = torch.tensor(records["id"].astype(int)), torch.tensor(records["marks"] & SCORED != 0)
        with torch.no_grad():
            logits = model(ids[None, :-1])[0, :, :290]
        loss += float(F.cross_entropy(logits[scored[1:]], ids[1:][scored[1:]], reduction="sum"))
        count += int(scored[1:].sum())
    assert read_metrics(run.out)[-1]["valid_loss"] == pytest.approx(loss / count, rel=1e-5)


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_micro_batch_size_does_not_change_losses(folder, run, tmp_path, micro_batch_size):
    train(run_of(folder, tmp_path / "run", micro_batch_size=micro_batch_size, steps=3))
    found, expected = ([row["loss"] for row in read_metrics(out)][:3] for out in (tmp_path / "run", run.out))
    # The learning rates differ from the second step on.
    assert found[0] == pytest.approx(expected[0], rel=1e-6)


class Half(World):
    """One of two processes; a sum adds the other process's count."""

    def __init__(self, other):
        super().__init__(torch.device("cpu"))
        self.size = self.num_readers = self.num_replicas = 2
        self.other = other

    def sum(self, value):
        return value + self.other if value.dtype == torch.int64 else value


def test_loss_is_normalized_by_scored_tokens_of_all_processes(run, monkeypatch):
    """Each process divides by half of the total count, so that the mean of the gradients is that of the whole batch."""
    data, valid = data_of(run)
    whole_batch = data.batch(range(BATCH))

    def gradients(batch, world):
        trainer = Trainer(dataclasses.replace(run, micro_batch_size=1), data, valid, world=World(torch.device("cpu")))
        monkeypatch.setattr(trainer, "world", world)
        loss = trainer.backward(*batch)
        trainer.close()
        return loss, [p.grad for p in trainer.model.parameters()]

    counts = [(whole_batch[1][rows] != -100).sum() for rows in (slice(0, 2), slice(2, 4))]
    assert counts[0] != counts[1]
    loss, expected = gradients(whole_batch, World(torch.device("cpu")))
    halves = [
        gradients([tensor[rows] for tensor in whole_batch], Half(other))
        for rows, other in ((slice(0, 2), counts[1]), (slice(2, 4), counts[0]))
    ]
    # Each loss is half of the process's contribution to the sum.
    assert float(halves[0][0] + halves[1][0]) == pytest.approx(float(loss), rel=1e-6)
    for one, other, both in zip(halves[0][1], halves[1][1], expected, strict=True):
        torch.testing.assert_close((one + other) / 2, both, atol=1e-7, rtol=1e-4)


def test_resume_is_bit_identical(run, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(run.out, out)
    first, *later = [step for step in list_checkpoints(out) if step.name != "step-00000000"]
    for checkpoint in later:
        shutil.rmtree(checkpoint)
    assert first.name == "step-00000005"
    train(dataclasses.replace(run, out=out), resume="auto")
    names = ("step", "loss", "grad_norm", "lr", "valid_loss")
    found, expected = ([[row.get(name) for name in names] for row in read_metrics(path)] for path in (out, run.out))
    assert found == expected


def test_run_keeps_chat_files(folder, run):
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (run.out / name).read_bytes() == (folder / name).read_bytes()
    assert ChatTemplate.load(run.out).fingerprint == ChatTemplate.load(folder).fingerprint


def test_named_chat_template_is_copied_to_the_run(folder, tmp_path):
    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endfor %}")
    config = run_of(folder, tmp_path / "run", steps=3, micro_batch_size=4)
    chats = [shutil.copy(path, tmp_path / path.name) for path in (*config.data.train, config.data.valid)]
    data = dataclasses.replace(config.data, train=(chats[0],), valid=chats[1], chat_template=template)
    train(dataclasses.replace(config, data=data))
    assert (tmp_path / "run" / "chat_template.jinja").read_text() == template.read_text()
    # A run that starts from that run copies the template again.
    again = finetuning(tmp_path / "run")
    assert ChatTemplate.load(again.data.tokenizer.parent).source == template.read_text()


def test_init_command_needs_no_preset(folder, tmp_path, capsys):
    out = tmp_path / "run"
    options = ["--out", out, "--data.train", folder.parent / "train.jsonl", "--data.valid", folder.parent / "valid.jsonl"]
    options += ["--steps", 1, "--batch-size", 2, "--optimizer.warmup-steps", 0, "--device", "cpu"]
    arguments = [str(option) for option in ["--init", folder, "--model.context-length", 32, *options]]
    run_train_command(arguments, "tilewright train")
    stored = load_config(out / "config.json")
    assert (stored.model.d_model, stored.model.kv_heads, stored.model.context_length, stored.model.vocab_size) == (
        32,
        2,
        32,
        290,
    )
    assert stored.init == folder
    assert "60 conversations in" in capsys.readouterr().err
    # From a run, with the other spelling of the option.
    options[1] = tmp_path / "next"
    run_train_command([f"--init={out}", *map(str, options)], "tilewright train")
    assert load_config(tmp_path / "next" / "config.json").model == stored.model


def test_default_context_is_limited(folder):
    assert finetuning(folder).model.context_length == CONTEXT
    assert finetuning(folder).out.name == "llama-tuned"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "3"], "^the first argument is --steps: expected --init FOLDER or a preset: stories-cpu, .*$"),
        (["--init"], "^the first argument is --init: expected --init FOLDER or a preset"),
        (["--init", "nowhere"], r"^init is nowhere, which has no config.json: expected the folder of a run"),
    ],
)
def test_arguments_without_preset_or_init_raise(arguments, message):
    with pytest.raises(UserError, match=message):
        run_train_command(arguments, "tilewright train")
