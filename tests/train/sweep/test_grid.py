"""Sweeps: parsing of the grid, results, interruptions, and CS336's toy example as a grid of learning rates."""

import dataclasses
import io
import itertools
import json
import math

import pytest
import torch
from rich.console import Console

import tilewright.train.sweep.grid as sweep_module
from tilewright.bench.writeups import toy_losses
from tilewright.errors import DivergedError, UserError
from tilewright.train import OptimizerConfig, TrainResult
from tilewright.train.config import load_config
from tilewright.train.metrics import MetricLog
from tilewright.train.sweep.grid import SweepConfig, parse_grid, sweep
from tilewright.train.sweep.plot import plot_sweep
from tilewright.train.sweep.result import SweepPoint, SweepResult, sweep_table

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def base(config):
    """A base configuration of two steps."""
    return dataclasses.replace(config, steps=2, eval_every=2, optimizer=OptimizerConfig(lr=1e-2, final_lr=1e-3, warmup_steps=0))


def table_text(result):
    console = Console(width=200, file=io.StringIO())
    with console.capture() as capture:
        console.print(sweep_table(result))
    return capture.get()


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1e-4,3e-4", [1e-4, 3e-4]),
        ("8,16", [8, 16]),
        ("8,auto", [8, "auto"]),
        ("cosine,wsd", ["cosine", "wsd"]),
        ("[0.9,0.95],[0.9,0.99]", [[0.9, 0.95], [0.9, 0.99]]),
        ("true,false", [True, False]),
        ("None,4", [None, 4]),
        ("True,auto", [True, "auto"]),
        ("a=b", ["a=b"]),
    ],
)
def test_parse_grid_values(text, values):
    assert parse_grid([f"some.option-name={text}"]) == {"some.option_name": values}


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([], "grid is empty"),
        (["optimizer.lr"], "'optimizer.lr'"),
        (["=1"], "'=1'"),
        (["optimizer.lr="], "'optimizer.lr='"),
        (["seed=0", "seed=1"], "seed twice"),
        (["out=a,b"], "grid contains out"),
        (["optimizer.lr=1e-3,0.001"], "point optimizer.lr=0.001 twice"),
        (["optimiser.lr=1e-3"], "'optimiser.lr' is unknown: did you mean optimizer.lr"),
        (["optimizer.lr=fast"], 'should be "float"'),
        (["optimizer.lr=1e-3,-1"], r"optimizer.lr is -1"),
        (["optimizer.lr=NaN"], "optimizer.lr is nan"),
        (["optimizer=1"], "option 'optimizer' is unknown"),
        (["batch_size=8,2.5"], "batch_size"),
        (["batch_size=4", "micro_batch_size=3"], "micro_batch_size is 3"),
        (["optimizer.schedule=cosine,sine"], "sine"),
    ],
)
def test_invalid_grid_runs_nothing(config, grid, message):
    with pytest.raises(UserError, match=message):
        sweep(config, SweepConfig(tuple(grid)))
    assert not config.out.exists()


def test_sweep_trains_every_point(base, capsys):
    grid = SweepConfig(("optimizer.lr=1e-3,1e-2", "seed=0,1"))
    result = sweep(base, grid)
    assert result.complete
    assert [point.status for point in result.points] == ["finished"] * 4
    assert [point.settings for point in result.points] == [
        {"optimizer.lr": lr, "seed": seed} for lr in (1e-3, 1e-2) for seed in (0, 1)
    ]
    for point in result.points:
        config = load_config(base.out / point.run / "config.json")
        assert (config.optimizer.lr, config.seed, config.steps) == (*point.settings.values(), 2)
        assert config.optimizer.final_lr == pytest.approx(config.optimizer.lr / 10)
    assert len({point.valid_loss for point in result.points}) == 4
    assert (base.out / "sweep.png").is_file()
    stored = json.loads((base.out / "sweep.json").read_text())["points"]
    assert [SweepPoint(**point) for point in stored] == list(result.points)

    best = result.ranking()[0]
    assert len(best.points) == 2
    assert best.valid_loss == min(sum(p.valid_loss for p in result.points[i : i + 2]) / 2 for i in (0, 2))
    text = table_text(result)
    assert "2 finished" in text
    assert text.index(f"{best.valid_loss:.4f}") < text.index(f"{result.ranking()[1].valid_loss:.4f}")

    # When repeated, nothing is trained, even with a smaller grid; a new value adds one run.
    capsys.readouterr()
    smaller = sweep(base, SweepConfig(("optimizer.lr=1e-2", "seed=0,1")))
    assert smaller.points == result.points[2:]
    assert "point" not in capsys.readouterr().err
    larger = sweep(base, SweepConfig(("optimizer.lr=1e-3,1e-2", "seed=0,1,2")))
    assert [p for p in larger.points if p.settings["seed"] < 2] == list(result.points)
    assert len(larger.points) == len(json.loads((base.out / "sweep.json").read_text())["points"]) == 6


def test_interrupted_sweep_resumes(base, monkeypatch):
    base = dataclasses.replace(base, steps=6, checkpoint_every=2)
    grid = SweepConfig(("optimizer.lr=1e-3,1e-2",))
    whole = sweep(dataclasses.replace(base, out=base.out.with_name("whole")), grid)

    class Killed(BaseException):
        pass

    def killed(config, resume=None):
        # Like SIGKILL after the second checkpoint of the second point.
        if config.optimizer.lr == 1e-2:
            stop_after(monkeypatch, 5, Killed)
        return train(config, resume=resume)

    train = sweep_module.train
    with monkeypatch.context() as patches:
        patches.setattr(sweep_module, "train", killed)
        with pytest.raises(Killed):
            sweep(base, grid)
    monkeypatch.undo()
    assert len(json.loads((base.out / "sweep.json").read_text())["points"]) == 1
    finished = sweep(base, grid)
    assert [point.valid_loss for point in finished.points] == [point.valid_loss for point in whole.points]


def stop_after(monkeypatch, steps, error):
    from tilewright.train.trainer import Trainer

    train_step = Trainer.train_step

    def step(self):
        if self.step == steps:
            raise error
        return train_step(self)

    monkeypatch.setattr(Trainer, "train_step", step)


def test_incomplete_run_folder_is_recreated(base):
    left = base.out / "seed=7"
    sweep_of_one = SweepConfig(("seed=7",))
    sweep(base, sweep_of_one)
    (base.out / "sweep.json").unlink()
    (left / "config.json").unlink()
    assert sweep(base, sweep_of_one).points[0].status == "finished"


def test_sweep_continues_after_divergence_and_out_of_memory(base, monkeypatch):
    train, calls = sweep_module.train, []

    def failing(config, resume=None):
        calls.append(config.batch_size)
        if config.batch_size == 8:
            raise DivergedError("loss is nan: start a new run")
        if config.batch_size == 16:
            raise torch.OutOfMemoryError("out of memory\nTried to allocate all of it")
        return train(config, resume=resume)

    monkeypatch.setattr(sweep_module, "train", failing)
    grid = SweepConfig(("batch_size=8,4,16",))
    result = sweep(base, grid)
    assert [(p.status, p.reason) for p in result.points] == [
        ("diverged", "loss is nan: start a new run"),
        ("finished", None),
        ("out of memory", "out of memory"),
    ]
    assert result.ranking()[0].settings == {"batch_size": 4}
    text = table_text(result)
    assert "diverged" in text
    assert "out of memory" in text
    # A diverged run is not repeated; a run that was out of memory is.
    assert sweep(base, grid) == result
    assert calls == [8, 4, 16, 16]


def test_compile_cache_is_reset_for_every_point(base, monkeypatch):
    def double(x):
        return 2 * x

    def compiled(config, resume=None):
        function = torch.compile(double, fullgraph=True, dynamic=False, backend="eager")
        loss = float(function(torch.ones(config.batch_size)).mean())
        return TrainResult(config.out, 2, 1, loss, loss, 1.0, None, "cpu")

    monkeypatch.setattr(sweep_module, "train", compiled)
    sizes = range(2, 4 + torch._dynamo.config.recompile_limit)
    result = sweep(base, SweepConfig((f"batch_size={','.join(map(str, sizes))}",)))
    assert [point.valid_loss for point in result.points] == [2.0] * len(sizes)


def test_diverged_run_raises(changed):
    base = changed(
        steps=40, log_every=5, max_skipped_steps=2, optimizer=dataclasses.replace(changed().optimizer, warmup_steps=0)
    )
    result = sweep(base, SweepConfig(("optimizer.lr=1e-3,1e30",)))
    good, bad = result.points
    assert (good.status, bad.status) == ("finished", "diverged")
    assert bad.valid_loss is None
    assert bad.reason
    assert result.ranking()[0].points == (good,)


def test_signal_stops_a_sweep(base, monkeypatch):
    train = sweep_module.train

    def stopped(config, resume=None):
        result = train(config, resume=resume)
        return dataclasses.replace(result, valid_loss=math.nan, stopped_by="SIGTERM") if config.seed == 1 else result

    monkeypatch.setattr(sweep_module, "train", stopped)
    result = sweep(base, SweepConfig(("seed=0,1,2",)))
    assert not result.complete
    assert [point.settings["seed"] for point in result.points] == [0]
    monkeypatch.undo()
    assert sweep(base, SweepConfig(("seed=0,1,2",))).complete


def test_foreign_folder_raises(base):
    base.out.mkdir()
    (base.out / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="is not a sweep"):
        sweep(base, SweepConfig(("seed=0",)))
    assert [path.name for path in base.out.iterdir()] == ["thesis.tex"]


def test_sweep_without_runs_can_be_changed(base):
    nowhere = dataclasses.replace(base.data, train=(base.out / "nowhere.txt",))
    with pytest.raises(UserError, match="nowhere"):
        sweep(dataclasses.replace(base, data=nowhere, steps=9), SweepConfig(("seed=0",)))
    assert sweep(base, SweepConfig(("seed=0",))).complete


def test_sweep_with_another_base_raises(base):
    sweep(base, SweepConfig(("seed=0",)))
    with pytest.raises(UserError, match="has steps 2, not 3"):
        sweep(dataclasses.replace(base, steps=3), SweepConfig(("seed=0",)))
    (base.out / "sweep.json").write_text('{"format": "another"}')
    with pytest.raises(UserError, match="is not the result of a sweep"):
        sweep(base, SweepConfig(("seed=0",)))


def test_final_rate_scales_unless_it_is_in_the_grid(config):
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, lr=3e-3, final_lr=3e-3))
    axes = parse_grid(["optimizer.lr=1e-5,0.7"])
    assert [c.optimizer.final_lr for _, c in sweep_module._configs(config, axes)] == [1e-5, 0.7]
    axes = parse_grid(["optimizer.lr=1e-2", "optimizer.final_lr=0,1e-4"])
    assert [c.optimizer.final_lr for _, c in sweep_module._configs(config, axes)] == [0, 1e-4]


def test_plot_handles_all_kinds_of_axes(tmp_path):
    axes = {"optimizer.lr": [1e-3, 1e-2], "optimizer.schedule": ["cosine", "wsd"], "model.qk_norm": [False], "seed": [0, 1]}
    points = []
    for i, values in enumerate(itertools.product(*axes.values())):
        diverged, valid_loss, run = i == 3, 4 + i / 10, tmp_path / f"run{i}"
        run.mkdir()
        with MetricLog(run) as log:
            log.log(1, loss=5.0)
            log.log(2, loss=None if diverged else 4.0, valid_loss=None if diverged else valid_loss)
        settings = dict(zip(axes, values, strict=True))
        if diverged:
            points.append(SweepPoint(settings, run.name, "diverged", reason="loss is nan"))
        else:
            points.append(SweepPoint(settings, run.name, "finished", valid_loss))
    result = SweepResult(tmp_path, axes, tuple(points))
    assert plot_sweep(result).read_bytes().startswith(PNG)
    # A diverged seed ranks its point after those with all runs finished.
    assert [len(group.losses) for group in result.ranking()] == [2, 2, 2, 1]
    assert "1 finished, 1 diverged" in table_text(result)
    failed = SweepResult(tmp_path, {"seed": [0]}, (SweepPoint({"seed": 0}, "run3", "diverged", reason="nan"),))
    assert plot_sweep(failed).exists()
    assert "diverged" in table_text(failed)


def test_cs336_toy_learning_rates(base, monkeypatch):
    """Assignment 1, section 4.2: SGD with lr / sqrt(t + 1) on mean(w^2), w = 5 randn(10, 10), ten steps."""

    def toy(config, resume=None):
        weights = torch.nn.Parameter(5 * torch.randn(10, 10, generator=torch.Generator().manual_seed(config.seed)))
        optimizer = torch.optim.SGD([weights], config.optimizer.lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / math.sqrt(t + 1))
        config.out.mkdir()
        with MetricLog(config.out) as log:
            for step in range(1, 11):
                optimizer.zero_grad()
                loss = weights.square().mean()
                log.log(step, loss=loss.item())
                loss.backward()
                optimizer.step()
                schedule.step()
        return TrainResult(config.out, 10, 100, loss.item(), loss.item(), 1.0, None, "cpu")

    monkeypatch.setattr(sweep_module, "train", toy)
    result = sweep(base, SweepConfig(("optimizer.lr=1e1,1e2,1e3", "seed=0,1,2")))
    for lr in (1e1, 1e2, 1e3):
        losses = [point.valid_loss for point in result.points if point.settings["optimizer.lr"] == lr]
        # Near zero, the fast run consists of rounding errors.
        torch.testing.assert_close(torch.tensor(losses), toy_losses(lr, seeds=3), rtol=1e-3, atol=1e-20)
    slow, fast, broken = 1e1, 1e2, 1e3
    assert [group.settings["optimizer.lr"] for group in result.ranking()] == [fast, slow, broken]
    best, middle, worst = (group.valid_loss for group in result.ranking())
    assert best < 1e-21
    assert 2.3 < middle < 4.8
    assert worst > 1e18
