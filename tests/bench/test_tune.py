import dataclasses
import io
import json
import shutil
from typing import Any, NamedTuple, get_args

import pytest
import torch
from rich.console import Console

from gluon_emulator import emulating
from tilewright.bench import TuneConfig, options, run_tune, tune
from tilewright.bench.timing import Times
from tilewright.errors import UserError
from tilewright.kernels import use_backend
from tilewright.kernels.attention import configurations
from tilewright.kernels.attention.configurations import (
    LaunchConfig,
    read_configurations,
    use_configuration,
    write_configurations,
)
from tilewright.kernels.dispatch import HAS_TRITON

KEY = "sm_90 forward half 16"
FUSED_KEY = "sm_90 backward_fused gluon 128"
candidates = tune.candidates
GRID = [LaunchConfig(16, 16, 16, 4, 2, False), LaunchConfig(32, 16, 16, 4, 2, False), LaunchConfig(16, 32, 16, 8, 3, True)]
interpreted = pytest.mark.skipif(
    not HAS_TRITON or torch.cuda.is_available(),
    reason="runs candidates in Triton's interpreter, by the configurations of sm_90",
)


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A copy of the shipped file, to which the functions write instead."""
    path = tmp_path / "configurations.json"
    shutil.copyfile(configurations.CONFIGURATIONS, path)
    monkeypatch.setattr(configurations, "CONFIGURATIONS", path)
    read_configurations.cache_clear()
    yield path
    read_configurations.cache_clear()


class Compiled(NamedTuple):
    """Replaces a compiled kernel and records its arguments."""

    name: str
    config: LaunchConfig
    sizes: dict[str, Any]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(tune, "candidates", lambda *_: GRID)
    # The interpreter computes float16 products correctly, but not bfloat16.
    monkeypatch.setattr(tune, "DTYPE", torch.float16)
    monkeypatch.setattr(
        tune, "compiled", lambda kernel, generation, key, config, shapes: [Compiled("served", config, each) for each in shapes]
    )
    sizes = {"batch": 1, "num_heads": 2, "num_kv_heads": 1, "num_keys": 40}
    monkeypatch.setattr(
        tune,
        "sizes_of",
        lambda kernel, head_dim: sizes | {"num_queries": 1 if kernel == "decode" else 40, "head_dim": head_dim},
    )
    with use_backend("triton"):
        yield


def timer(*fastest):
    """Return a timer whose times follow the order of `fastest`; other configurations are slow."""

    def measure(calls, device, rounds):
        for call in calls.values():
            call()
        ranks = {name: fastest.index(name) + 1 if name in fastest else 9 for name in calls}
        return {name: Times(rank, rank, rank, 3) for name, rank in ranks.items()}

    return measure


def names(configurations):
    return [tune._name("forward", config) for config in configurations]


def no_flaw(case, generation):
    return None


def test_the_shipped_file_round_trips(shipped):
    before = shipped.read_bytes()
    write_configurations(read_configurations())
    assert shipped.read_bytes() == before


def test_use_configuration_is_limited_to_its_block(shipped):
    before = read_configurations()[KEY]
    with pytest.raises(RuntimeError, match="inside"), use_configuration(KEY, GRID[0]):
        assert read_configurations()[KEY] == GRID[0]
        raise RuntimeError("inside")
    assert read_configurations()[KEY] == before


@interpreted
@pytest.mark.parametrize("kernel", ["forward", "backward_q", "backward_kv", "decode"])
def test_only_the_line_of_the_fastest_configuration_changes(kernel, shipped, small):
    before = shipped.read_text().splitlines()
    if kernel == "backward_kv":
        measure = timer(*names(GRID)[1:])
    else:
        measure = timer(names(GRID)[1])
    rows = list(tune.tune_kernel(kernel, 16, torch.device("cpu"), no_flaw, measure))
    assert [row["variant"] for row in rows if row.get("verdict") == "chosen"] == names(GRID)[1:2]
    assert rows[0]["verdict"] == "chosen"
    assert [row["shipped"] for row in rows].count(True) == 1
    after = shipped.read_text().splitlines()
    changed = [new for old, new in zip(before, after, strict=True) if old != new]
    entry = {name: value for name, value in dataclasses.asdict(GRID[1]).items() if name not in ("block_k", "gluon")}
    assert changed == [f' "sm_90 {kernel} half 16": {json.dumps(entry)},']
    assert read_configurations()[f"sm_90 {kernel} half 16"] == GRID[1]


@interpreted
@pytest.mark.parametrize("kernel", ["forward", "backward_q", "backward_kv"])
def test_the_gluon_kernel_ships_if_it_is_the_fastest(kernel, shipped, small, monkeypatch):
    grid = [LaunchConfig(32, 32, 64, 4, 2, True), LaunchConfig(128, 128, 64, 4, 2, True, gluon=True)]
    monkeypatch.setattr(tune, "candidates", lambda *_: grid)
    key = f"sm_90 {kernel} half 64"
    before = read_configurations()[key]
    with emulating("early"):
        rows = list(tune.tune_kernel(kernel, 64, torch.device("cpu"), no_flaw, timer(*names(grid)[::-1])))
    assert [row["variant"] for row in rows[:2]] == ["128x128, 4 warps, 2 stages, in Gluon", "32x32, 4 warps, 2 stages TMA"]
    assert rows[0]["verdict"] == "chosen"
    # The portable kernel keeps its configuration for calls that Gluon does not support.
    assert read_configurations()[key] == dataclasses.replace(before, gluon=True)
    assert read_configurations()[key.replace("half", "gluon")] == grid[1]
    with emulating("early"):
        rows = list(tune.tune_kernel(kernel, 64, torch.device("cpu"), no_flaw, timer(*names(grid))))
    assert [row["shipped"] for row in rows[:2]] == [False, True]
    assert read_configurations()[key] == grid[0]


@interpreted
def test_flawed_configurations_are_neither_timed_nor_shipped(shipped, small, monkeypatch):
    before = shipped.read_bytes()

    def inspector(case, generation):
        assert generation == "sm_90"
        if case.config == GRID[0]:
            return "spills 8 bytes"
        # Fine with the timed shape, but not with every option that it would serve.
        return "spills 4 bytes" if case.config in GRID[1:] and "dtype" in case.sizes else None

    rows = list(tune.tune_kernel("forward", 16, torch.device("cpu"), inspector, timer(*names(GRID))))
    assert {row["variant"]: row["not_measured"] for row in rows if "not_measured" in row} == {
        names(GRID)[0]: "served: spills 8 bytes"
    }
    spoilt = "served: spills 4 bytes"
    assert [(row["verdict"], row["shipped"]) for row in rows[:3]] == [(spoilt, False), (spoilt, False), ("chosen", True)]
    assert shipped.read_bytes() == before


@interpreted
def test_the_fused_backward_kernel_ships_if_it_is_faster(shipped, small, monkeypatch):
    monkeypatch.setattr(tune, "candidates", candidates)
    fused = "64x128, 4 warps, 2 stages, in Gluon"
    before = read_configurations()[FUSED_KEY]
    with emulating("early"):
        rows = list(tune.tune_kernel("backward_fused", 128, torch.device("cpu"), no_flaw, timer(fused, "two kernels")))
    assert [row["variant"] for row in rows] == [fused, "two kernels"]
    ships = read_configurations()[FUSED_KEY]
    assert ships == dataclasses.replace(before, gluon=True)
    assert '"gluon": true' in next(line for line in shipped.read_text().splitlines() if FUSED_KEY in line)
    # The two kernels are tuned by themselves.
    key = "sm_90 backward_q half 128"
    with tune.use_candidate(key, read_configurations()[key]):
        assert not read_configurations()[FUSED_KEY].gluon
    assert read_configurations()[FUSED_KEY] == ships
    with emulating("early"):
        rows = list(tune.tune_kernel("backward_fused", 128, torch.device("cpu"), no_flaw, timer("two kernels", fused)))
    assert [row["shipped"] for row in rows] == [False, True]
    assert read_configurations()[FUSED_KEY] == before


@interpreted
def test_wrong_and_failing_configurations_are_not_timed(shipped, small, monkeypatch):
    true_attention = tune.attention

    def attention(q, k, v):
        config = read_configurations()[KEY]
        if config == GRID[0]:
            raise RuntimeError("out of resources")
        o = true_attention(q, k, v)
        return o * torch.nan if config == GRID[1] else o

    monkeypatch.setattr(tune, "attention", attention)
    rows = list(tune.tune_kernel("forward", 16, torch.device("cpu"), no_flaw, timer(*names(GRID))))
    assert {row["variant"]: row["not_measured"] for row in rows if "not_measured" in row} == {
        names(GRID)[0]: "RuntimeError: out of resources", names(GRID)[1]: "wrong: error of a token of result 0 is nan%",
    }  # fmt: skip
    assert read_configurations()[KEY] == GRID[2]


@interpreted
def test_an_interruption_keeps_the_file(shipped, small):
    before = shipped.read_bytes()

    def interrupted(calls, device, rounds):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(tune.tune_kernel("forward", 16, torch.device("cpu"), no_flaw, interrupted))
    assert shipped.read_bytes() == before
    assert [path.name for path in shipped.parent.iterdir()] == ["configurations.json"]


@pytest.mark.parametrize("kernel", ["forward", "backward_q", "backward_kv", "decode"])
def test_candidates(kernel):
    for block_k in (16, 64, 128, 256):
        tried = tune.candidates(kernel, "sm_90", block_k)
        assert 12 <= len(tried) == len(set(tried)) <= 84
        assert {config.block_k for config in tried} == {block_k}
        # Descriptors need support by the GPU and the kernel.
        assert {config.tma for config in tried} == ({False} if kernel == "decode" else {False, True})
        assert not any(config.tma for config in tune.candidates(kernel, "sm_86", block_k))
        assert any(config.gluon for config in tried) == (kernel != "decode" and block_k >= 64)
        assert not any(config.gluon for config in tune.candidates(kernel, "sm_100", block_k))


def test_tuning_needs_a_gpu_and_valid_head_dims():
    with pytest.raises(UserError, match="cannot tune on device cpu"):
        run_tune(TuneConfig("attention", device="cpu"), Console(file=io.StringIO()))
    for head_dim in (8, 80, 512):
        with pytest.raises(UserError, match=f"head_dims has {head_dim}: expected powers of two from 16 to 256"):
            TuneConfig("attention", head_dims=(64, head_dim))


def test_each_kernel_and_head_dim_is_a_job():
    config = TuneConfig("attention", kernels=("forward", "decode"), head_dims=(64, 128))
    cases = [job.case for job in tune.tune_jobs(config, torch.device("cpu"))]
    assert cases == ["tune forward 64", "tune decode 64", "tune forward 128", "tune decode 128"]
    (row,) = tune.tune_kernel("backward_fused", 64, torch.device("cpu"))
    assert row["not_measured"] == "no fused backward kernel for this GPU and head dim"


@pytest.mark.gpu
def test_a_kernel_is_tuned_on_a_gpu(shipped, monkeypatch):
    everything = tune.candidates("forward", configurations.generation_at(torch.device("cuda")), 64)
    monkeypatch.setattr(tune, "candidates", lambda *_: everything[:4])
    rows = list(tune.tune_kernel("forward", 64, torch.device("cuda")))
    assert [row["verdict"] for row in rows].count("chosen") == 1
    assert all(row["p50_ms"] > 0 for row in rows if "not_measured" not in row)


def test_the_options_name_every_kernel():
    assert get_args(options.AttentionKernel) == get_args(configurations.Kernel)
