"""Runs of two processes on the CPU, compared to one process. The processes run this file as a program."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from faults import program, run_in_children, skip_drawing
from tilewright.errors import UserError
from tilewright.model import ModelConfig, TransformerLM
from tilewright.train import OptimizerConfig, SampleConfig, TrainConfig, load_run, load_text_model, train, write_texts
from tilewright.train.checkpoint.layout import list_checkpoints
from tilewright.train.checkpoint.reader import read_tensors, tensor_names
from tilewright.train.config import load_config, save_config
from tilewright.train.distributed import IGNORED_TARGET, Layout, World, check_parallel, join
from tilewright.train.metrics import read_metrics
from tilewright.train.parallel import compile_blocks, full_tensor, gradient_sync, parallelize
from tilewright.train.presets import corpus_files
from tilewright.train.signals import StopRequest
from tilewright.train.trainer import Trainer, TrainingLoss

# For slow or busy machines.
pytestmark = pytest.mark.timeout(600)

# The columns of the metrics without timings.
COLUMNS = ("step", "loss", "bits_per_byte", "grad_norm", "lr", "valid_loss", "valid_bits_per_byte")
FAULT_STEP = 6
FILES = {"train": "train.txt", "valid": "valid.txt", "tokenizer": "tokenizer.json"}


def go_back(source, run, step):
    """Copy a run without the checkpoints after `step`."""
    shutil.copytree(source, run)
    for folder in list_checkpoints(run):
        if int(folder.name.split("-")[1]) > step:
            shutil.rmtree(folder)
    return run


def at_fault_step(rank, action):
    """Run `action` with the trainer of process `rank` in the middle of `FAULT_STEP`. Return a function that undoes this."""
    backward = Trainer._backward

    def patched(self, *batch):
        if self.step == FAULT_STEP and self.world.rank == rank:
            action(self)
        return backward(self, *batch)

    Trainer._backward = patched
    return lambda: setattr(Trainer, "_backward", backward)


def record_initialized():
    """Return a list that receives the size of every weight that is initialized from now on."""
    initialize, sizes = torch.nn.init.trunc_normal_, []

    def patched(weight, *arguments, **options):
        if not weight.is_meta:
            sizes.append(weight.numel())
        return initialize(weight, *arguments, **options)

    torch.nn.init.trunc_normal_ = patched
    return sizes


def train_all(folder):
    """Train the runs that the fixture `runs` provides."""
    base = load_config(folder / "base.json")
    results, initialized = {}, record_initialized()

    def run(name, source=None, step=0, **changes):
        if source and os.environ["RANK"] == "0":
            go_back(folder / source, folder / name, step)
        initialized.clear()
        result = train(dataclasses.replace(base, out=folder / name, **changes), resume="auto" if source else None)
        results[name] = {"steps": result.steps, "stopped_by": result.stopped_by, "valid_loss": result.valid_loss}
        results[name]["initialized"] = sum(initialized)
        results[name]["sigterm"] = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    with contextlib.suppress(UserError):
        run("invalid-init", init=folder / "nothing")
    run("ddp", parallel="ddp")
    run("fsdp", parallel="fsdp")
    run("bfloat16-fsdp", parallel="fsdp", precision="bfloat16", activation_checkpointing=1)
    run("one-then-fsdp", "one", 4, parallel="fsdp")
    run("fsdp-then-ddp", "fsdp", 8, parallel="ddp")
    muon = dataclasses.replace(base.optimizer, name="muon")
    run("muon-fsdp", parallel="fsdp", optimizer=muon)
    run("muon-one-then-fsdp", "muon-one", 4, parallel="fsdp", optimizer=muon)
    restore = at_fault_step(1, lambda _: signal.raise_signal(signal.SIGUSR1))
    run("stopped", parallel="fsdp")
    restore()
    run("stopped-resumed", "stopped", 100, parallel="fsdp")
    run("from-one-ddp", parallel="ddp", init=folder / "one", steps=4)
    run("from-one-fsdp", parallel="fsdp", init=folder / "one", steps=4)
    # Code generation takes long and is tested in one process.
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    for parallel in ("ddp", "fsdp"):
        # Activation checkpointing of one of two blocks, so that both kinds are compiled.
        run(f"compiled-{parallel}", parallel=parallel, compile=True, activation_checkpointing=1)
    (folder / f"results-{os.environ['RANK']}.json").write_text(json.dumps(results))


def fail(_):
    raise UserError("the third disk is missing")


def die(_):
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)


def delay_error_report():
    """Delay the report of an error, so that torchrun has time to send SIGTERM to the process first."""
    original = StopRequest.__exit__

    def patched(self, kind, *rest):
        original(self, kind, *rest)
        if kind is not None:
            time.sleep(1)

    StopRequest.__exit__ = patched


@torch.no_grad()
def damage(trainer):
    # The local shard of this process only.
    trainer.model.layers[1].ffn.down_proj.weight.to_local().fill_(math.nan)


FAULTS = {"failing": (1, fail), "dying": (0, die), "damaged": (1, damage)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    skip_drawing()
    if sys.argv[1] == "all":
        train_all(Path(sys.argv[2]))
    else:
        at_fault_step(*FAULTS[sys.argv[1]])
        delay_error_report()
        sys.argv[1:] = ["stories-cpu", *sys.argv[2:]]
        runpy.run_module("tilewright.train", run_name="__main__")


def torchrun(*arguments, restarts=0):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}"]
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, *launcher, __file__, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def run_two_processes(*arguments):
    """Run this file in two processes with the environment and the store of torchrun: they start in milliseconds."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    ranks = [environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    return run_in_children(program, [(Path(__file__), rank, *map(str, arguments)) for rank in ranks])


def rows(run):
    return [{name: row[name] for name in COLUMNS if name in row} for row in read_metrics(run)]


def tensors(checkpoint):
    return {name: read_tensors(checkpoint, name) for name in tensor_names(checkpoint)}


def is_sharded(checkpoint):
    return (checkpoint / "model").is_dir()


def assert_same(run, expected, exactly=False):
    ours, theirs = rows(run), rows(expected)
    assert [row["step"] for row in ours] == list(range(1, 13))
    for a, b in zip(ours, theirs, strict=True):
        assert a == (b if exactly else pytest.approx(b, rel=1e-6))
    ours, theirs = (tensors(list_checkpoints(folder)[-1]) for folder in (run, expected))
    assert ours.keys() == theirs.keys() == {"model", "optimizer", "guard", "rng", "ema"}
    for name in ours:
        tolerance = {"rtol": 0, "atol": 0} if exactly else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(ours[name], theirs[name], **tolerance)


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """A folder with the run `one` of a single process, and all runs of `train_all`."""
    folder = tmp_path_factory.mktemp("runs")
    config = TrainConfig(
        out=folder / "one",
        model=ModelConfig(vocab_size=300, context_length=16, d_model=16, num_layers=2, num_heads=2, d_ff=24),
        data=dataclasses.replace(corpus_files(corpus), documents=True),
        steps=12,
        batch_size=4,
        micro_batch_size=1,
        optimizer=OptimizerConfig(lr=1e-2, final_lr=1e-3, warmup_steps=3),
        ema_decay=0.9,
        log_every=1,
        eval_every=4,
        eval_sequences=11,
        sample_every=4,
        sample_prompts=("the",),
        checkpoint_every=4,
        keep_checkpoints=10,
        device="cpu",
    )
    save_config(config, folder / "base.json")
    train(config)
    train(dataclasses.replace(config, out=folder / "muon-one", optimizer=dataclasses.replace(config.optimizer, name="muon")))
    for status, printed in run_two_processes("all", folder):
        assert status == 0, printed
    return folder


def results(runs, rank=0):
    return json.loads((runs / f"results-{rank}.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_equal_one(runs, parallel):
    assert_same(runs / parallel, runs / "one")
    assert [is_sharded(folder) for folder in list_checkpoints(runs / parallel)] == [parallel == "fsdp"] * 4
    ends = [results(runs, rank)[parallel] for rank in (0, 1)]
    assert ends[0] == {**ends[1], "initialized": ends[0]["initialized"]}


@pytest.mark.slow
@pytest.mark.parametrize("run", ["muon-fsdp", "muon-one-then-fsdp"])
def test_muon_on_shards_equals_whole_matrices(runs, run):
    # Gradients are summed in another order and rounded to bfloat16, which changes an update by 1 part in 256.
    assert [row["loss"] for row in rows(runs / run)] == pytest.approx(
        [row["loss"] for row in rows(runs / "muon-one")], rel=1e-4
    )
    ours, theirs = (tensors(list_checkpoints(runs / name)[-1]) for name in (run, "muon-one"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-4)


@pytest.mark.slow
def test_only_the_first_process_of_a_new_run_initializes_weights(runs):
    weights = read_tensors(list_checkpoints(runs / "one")[0], "model")
    expected = sum(weight[:300].numel() for weight in weights.values() if weight.dim() > 1)
    for rank in (0, 1):
        initialized = {name: result["initialized"] for name, result in results(runs, rank).items()}
        for name in ("ddp", "fsdp", "bfloat16-fsdp", "stopped"):
            assert initialized[name] == (expected if rank == 0 else 0), name
        for name in ("one-then-fsdp", "fsdp-then-ddp", "stopped-resumed"):
            assert initialized[name] == 0, name


@pytest.mark.slow
def test_sigterm_handler_is_restored_after_an_error(runs):
    for rank in (0, 1):
        assert "invalid-init" not in results(runs, rank)
        assert all(result["sigterm"] for result in results(runs, rank).values())


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_initial_checkpoint_of_two_processes_equals_one(runs, parallel):
    ours, theirs = (tensors(list_checkpoints(runs / name)[0]) for name in (parallel, "one"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_initialize_from_a_run(runs, parallel):
    run = runs / f"from-one-{parallel}"
    ours = read_tensors(list_checkpoints(run)[0], "model")
    theirs = read_tensors(list_checkpoints(runs / "one")[-1], "ema")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert [results(runs, rank)[run.name]["initialized"] > 0 for rank in (0, 1)] == [True, False]


@pytest.mark.slow
def test_resume_with_another_number_of_processes(runs, tmp_path):
    assert_same(runs / "one-then-fsdp", runs / "one")
    assert_same(runs / "fsdp-then-ddp", runs / "one")
    again = go_back(runs / "one-then-fsdp", tmp_path / "again", 8)
    assert [is_sharded(folder) for folder in list_checkpoints(again)] == [False, False, True]
    train(dataclasses.replace(load_config(runs / "base.json"), out=again), resume="auto")
    assert_same(again, runs / "one")


@pytest.mark.slow
def test_signal_to_one_process_stops_all_after_the_same_step(runs):
    for rank in (0, 1):
        stopped = results(runs, rank)["stopped"]
        assert stopped["stopped_by"] == "SIGUSR1"
        assert FAULT_STEP < stopped["steps"] <= FAULT_STEP + 2
        assert list_checkpoints(runs / "stopped")[-1].name == f"step-{stopped['steps']:08d}"
    assert_same(runs / "stopped-resumed", runs / "fsdp", exactly=True)


@pytest.mark.slow
def test_shards_are_gathered_in_half_precision(runs, tmp_path):
    config = dataclasses.replace(load_config(runs / "base.json"), out=tmp_path / "one", precision="bfloat16")
    train(config)
    ours, theirs = rows(runs / "bfloat16-fsdp"), rows(config.out)
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=5e-3)
    weights = read_tensors(list_checkpoints(runs / "bfloat16-fsdp")[-1], "model")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


@pytest.mark.slow
def test_load_run_reads_a_sharded_run(runs):
    model, _ = load_run(runs / "fsdp", "cpu")
    expected = read_tensors(list_checkpoints(runs / "one")[-1], "ema")
    torch.testing.assert_close(dict(model.state_dict()), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_samples_of_two_processes_equal_the_model(runs, parallel):
    written = [json.loads(line) for line in (runs / parallel / "samples.jsonl").read_text().splitlines()]
    assert [(row["step"], row["prompt"]) for row in written] == [(4, "the"), (8, "the"), (12, "the")]
    (text,) = write_texts(load_text_model(runs / parallel, "cpu"), SampleConfig(("the",), seed=0))
    assert written[-1]["text"] == text.text


@pytest.mark.slow
def test_torchrun_restarts_after_a_killed_process(runs, tmp_path):
    run = go_back(runs / "ddp", tmp_path / "run", 0)
    done = torchrun("dying", "--out", run, "--resume", "auto", restarts=1)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("tilewright: error: lost connection to another process of the job") == 1
    assert_same(run, runs / "ddp", exactly=True)


@pytest.mark.slow
def test_error_in_one_process_ends_all_and_is_reported_once(runs, tmp_path):
    run = go_back(runs / "fsdp", tmp_path / "run", 4)
    before = list_checkpoints(run)
    done = torchrun("failing", "--out", run, "--resume", "auto", "--parallel", "fsdp")
    assert done.returncode != 0
    assert done.stderr.count("tilewright: error: the third disk is missing") == 1
    assert done.stderr.count("Traceback") == 1  # from torchrun
    assert list_checkpoints(run) == before


@pytest.mark.slow
def test_processes_diverge_together(runs, corpus, tmp_path):
    # A new run whose texts are not encoded yet.
    shutil.copytree(corpus, tmp_path / "corpus", ignore=shutil.ignore_patterns("*.tokens"))
    shape = ["--model.vocab-size=300", "--model.context-length=16", "--model.d-model=16", "--model.num-heads=2"]
    shape += ["--model.num-kv-heads=None", "--model.d-ff=24"]
    data = [f"--data.{name}={tmp_path / 'corpus' / file}" for name, file in FILES.items()]
    options = ["--batch-size=4", "--log-every=1", "--max-skipped-steps=2", "--parallel=fsdp", "--device=cpu"]
    run = tmp_path / "run"
    ended = run_two_processes("damaged", "--out", run, *shape, *data, *options)
    assert all(status != 0 for status, _ in ended)
    printed = "".join(printed for _, printed in ended)
    assert printed.count("2 consecutive steps had a non-finite loss") == 1
    found = json.loads((run / "diagnosis.json").read_text())["first_not_finite"]
    assert found["weights"] == "layers.1.ffn.down_proj.weight"
    assert found["outputs"] == "layers.1.ffn.down_proj"
    assert [folder.name for folder in list_checkpoints(run)] == ["step-00000000"]
    assert [row["skipped_steps"] for row in read_metrics(run)][-1] == 1


@pytest.mark.slow
def test_compiled_blocks_equal_eager(runs):
    for parallel in ("ddp", "fsdp"):
        losses = [[row["loss"] for row in rows(runs / name)] for name in (f"compiled-{parallel}", "one")]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_incomplete_torchrun_environment_is_rejected(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE is 2, but RANK is not set"), join("cpu"):
        pass


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("experts", [{}, {"num_experts": 5}], ids=["dense", "experts"])
def test_gradients_of_shards_equal_the_whole_model(changed, experts, device):
    model = ModelConfig(300, 64, d_model=64, num_layers=3, num_heads=2, d_ff=96, qk_norm=True, qkv_bias=True, norm="sandwich")
    windows = {"window": 20, "window_pattern": "LLG", "local_rope_theta": 100.0, "scale_embeddings": True, "head_dim": 48}
    config = changed(model=dataclasses.replace(model, **windows, **experts))
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randint(300, (2, 4, 64), generator=generator).to(device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    losses, gradients = [], []
    dist.init_process_group("nccl" if device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for sharded in (False, True):
            torch.manual_seed(0)
            model = TransformerLM(config.model)
            model.compute_dtype = dtype
            loss = TrainingLoss(model, router_loss=0.01)
            if sharded:
                # Compiled on a GPU only, because compilation for the CPU is slow.
                compile_blocks(model.layers) if device == "cuda" else None
                loss = parallelize(loss, model, World(torch.device(device), layout=Layout(sharded=True)), dtype)
            else:
                loss.to(device)
            for last in (False, True):
                with gradient_sync(loss, last):
                    losses.append(loss(inputs, targets))
                    losses[-1].backward()
            gradients.append({name: full_tensor(p.grad) for name, p in model.named_parameters()})
    finally:
        dist.destroy_process_group()
    assert all(gradient.dtype == torch.float32 for gradient in gradients[1].values())
    tolerance = 2e-2 if device == "cuda" else 1e-6
    for name, expected in gradients[0].items():
        assert (gradients[1][name] - expected).norm() <= tolerance * expected.norm(), name
    torch.testing.assert_close(losses[2:], losses[:2], rtol=tolerance, atol=0)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_rows", [1, 4, 7])
def test_own_rows_partition_a_batch(size, num_rows):
    inputs = torch.arange(num_rows * 3).view(num_rows, 3)
    parts = [World(torch.device("cpu"), rank, size).own_rows(inputs, inputs + 1, inputs + 2) for rank in range(size)]
    assert len({part.shape for batch in parts for part in batch}) == 1
    rows, targets, documents = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    assert torch.equal(rows[:num_rows], inputs)
    assert torch.equal(documents, rows + 2)
    assert torch.equal(targets[:num_rows], inputs + 1)
    assert (targets[num_rows:] == IGNORED_TARGET).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 5}, "multiple of the number of processes, 2"),
        ({"cuda_graphs": True}, "needs one process on a GPU, not 2 on cpu; choose --no-cuda-graphs"),
    ],
)
def test_options_unsupported_by_several_processes_are_rejected(changed, changes, message):
    config = changed(**changes)
    with pytest.raises(UserError, match=message):
        check_parallel(config, World(torch.device("cpu"), 0, 2))
    check_parallel(config, World(torch.device("cuda")))


def test_cuda_graphs_are_rejected_on_a_cpu(changed):
    with pytest.raises(UserError, match="needs one process on a GPU, not 1 on cpu"):
        train(changed(cuda_graphs=True))
    assert not changed().out.exists()
