import json
import re
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from tilewright.bench import ReportConfig, run_report
from tilewright.bench.figures import columns, heading, text
from tilewright.bench.report import BEGIN, END, block, refresh, render
from tilewright.bench.results import Run, newest, read_runs
from tilewright.bench.run import slug
from tilewright.bench.stages import STAGES
from tilewright.cli import main
from tilewright.errors import UserError

BENCH = Path(__file__).parent.parent.parent / "bench"
H200 = {
    "stage": "machine", "date": "2026-01-02T03:04:05+00:00", "commit": "0123456789ab", "device": "NVIDIA H200",
    "driver": "570.86.15", "python": "3.12.1", "torch": "2.13.0+cu130", "triton": "3.7.1",
}  # fmt: skip


def timed(stage, case, variant, ms, **rest):
    times = {"p20_ms": 0.98 * ms, "p50_ms": ms, "p80_ms": 1.03 * ms, "count": 40}
    return {"stage": stage, "case": case, "variant": variant, **times, **rest}


def gpu_rows():
    """Yield invented rows of a GPU run."""
    yield {"stage": "ceilings", "case": "ceiling", "variant": "copy of 1 GiB", "gb_per_s": 4300.0,
           "datasheet_gb_per_s": 4800.0, "share_of_datasheet": 4300 / 4800}  # fmt: skip
    yield {"stage": "ceilings", "case": "ceiling", "variant": "bfloat16 product 8192^3", "tflop_per_s": 790.0,
           "datasheet_tflop_per_s": 989.4, "share_of_datasheet": 790 / 989.4}  # fmt: skip
    for width in (1024, 4096):
        for direction, bytes_ in (("forward", 4), ("backward", 6)):
            for variant, speed in (("tilewright", 3900.0), ("torch.compile", 3000.0)):
                ms = 65536 * width * bytes_ / speed / 1e6
                yield timed("kernels", f"rms_norm 65536x{width} {direction}", variant, ms, gb_per_s=speed, tflop_per_s=4.0,
                            share_of_roofline=speed / 4300, op=f"rms_norm {direction}", size=width)  # fmt: skip
    for vocabulary in (32_000, 128_256):
        for variant, gb in (("tilewright", 1.0), ("torch", 8.0 * vocabulary / 32_000)):
            yield timed("kernels", f"cross_entropy 8192x{vocabulary} both", variant, 2.0, gb_per_s=3000.0, tflop_per_s=1.0,
                        peak_gb=gb, op="cross_entropy both", size=vocabulary)  # fmt: skip
    for tokens in (1024, 16_384):
        for variant, speed in (("tilewright", 480.0), ("SDPA cuDNN", 540.0)):
            yield timed("attention", f"attention B1 H16 T{tokens} K128 forward", variant, 1.0, gb_per_s=200.0,
                        tflop_per_s=speed, op="attention K128 forward", size=tokens)  # fmt: skip
    yield timed("training", "training gpt2-small batch 32x1024", "compile + kernels", 90.0, tokens_per_s=364_000.0, mfu=0.43,
                peak_gb=61.0)  # fmt: skip
    yield {"stage": "training", "case": "training gpt2-small batch 32x1024", "variant": "compile + kernels",
           "table": "lost MFU by group", "mfu": 0.43, "matmul": 0.2, "idle": 0.37}  # fmt: skip
    yield timed("generation", "generation gpt2-xl batch 1", "tilewright", 2.0, tokens_per_s=500.0, share_of_datasheet=0.46)
    yield {"stage": "memory", "case": "memory gpt2-xl | checkpointing block", "predicted_gb": 40.0, "measured_gb": 40.8,
           "error": 0.02}  # fmt: skip
    row = {"stage": "run", "case": "run tinystories-17m", "variant": "--cuda-graphs", "tokens": 327_680_000}
    yield row | {"step": 10_000, "whole_run_s": 120.0, "tokens_per_s": 3e6, "mfu": 0.3, "loss": 1.0, "valid_loss": 0.95}
    for step, loss in ((250, 3.0), (10_000, 1.0)):
        yield row | {"table": "loss curve", "step": step, "tokens": 32_768 * step, "loss": loss, "valid_loss": loss - 0.05}
    yield {"stage": "attention", "case": "attention", "variant": "flash-attn 3", "not_measured": "not installed"}


@pytest.fixture
def results(tmp_path):
    """A folder with results of a GPU and of a CPU."""
    cpu = {"stage": "machine", "date": "2026-01-01T00:00:00+00:00", "device": "A CPU"}
    tokenizer = [
        timed("tokenizer", "train 10,000 tokens, 10 MB of stories", "tilewright", 80.0, mb_per_s=125.0),
        timed("tokenizer", "train 10,000 tokens, 10 MB of stories", "tilewright, ties as tokenizers", 79.0, mb_per_s=126.0),
        timed("tokenizer", "train 10,000 tokens, 10 MB of stories", "other", 200.0, mb_per_s=50.0),
    ]
    for name, rows in (("nvidia-h200/a.jsonl", [H200, *gpu_rows()]), ("a-cpu/b.jsonl", [cpu, *tokenizer])):
        path = tmp_path / "bench" / "results" / name
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "bench" / "results"


def report_config(results):
    """The options of a report into the parent of `results`, which gets a README and an overview with markers."""
    pages = [results.parent / name for name in ("README.md", "overview.md")]
    for page in pages:
        page.write_text(f"{BEGIN}\n{END}\n")
    return ReportConfig(results, results.parent / "RESULTS.md", *pages)


def files(folder):
    return {path.name: path.read_bytes() for path in (folder / "RESULTS.md", *sorted((folder / "plots").glob("*")))}


def test_the_report_of_a_gpu(results):
    page = run_report(report_config(results)).read_text()
    assert (
        "NVIDIA H200, driver 570.86.15, torch 2.13.0+cu130, triton 3.7.1, Python 3.12.1, commit 0123456789ab, 2026-01-02"
        in page
    )
    assert "[a.jsonl](results/nvidia-h200/a.jsonl)" in page
    (line,) = [line for line in page.splitlines() if line.startswith("| rms_norm 65536x4096 forward | tilewright |")]
    assert "| 40 | 3,900 | 4 | 90.7% |" in line
    assert "### training" in page
    assert "Lost MFU by group:" in page
    assert "memory gpt2-xl \\| checkpointing block" in page
    assert "| attention | flash-attn 3 | not installed |" in page
    # Everything without a measurement is listed, such as swiglu and the tests.
    (missing,) = [line for line in page.splitlines() if line.startswith("Here not measured: machine, tests, accounting")]
    assert "plot" not in missing
    pictures = sorted(path.name for path in (results.parent / "plots").iterdir())
    of_gpu = [f"nvidia-h200-{name}.svg" for name in ("attention", "bandwidth", "memory", "roofline", "run")]
    assert pictures == ["a-cpu-tokenizer.svg", *of_gpu]
    for picture in pictures:
        assert f"](plots/{picture})" in page
        assert "tilewright" in (results.parent / "plots" / picture).read_text() or picture.endswith(("roofline.svg", "run.svg"))


def test_the_report_is_reproducible_byte_for_byte(results, monkeypatch):
    config = report_config(results)
    run_report(config)
    first = files(results.parent)
    assert len(first) == 7
    # Settings of this process and earlier files have no effect.
    monkeypatch.setitem(matplotlib.rcParams, "lines.linewidth", 9.0)
    (results.parent / "plots" / "old.svg").write_text("old")
    run_report(config)
    assert files(results.parent) == first
    assert matplotlib.rcParams["lines.linewidth"] == 9.0


def test_the_committed_report_is_current(tmp_path):
    # Links are relative to the folder of the page, so the copy has a link to the results next to it.
    (tmp_path / "results").symlink_to(BENCH / "results")
    runs = read_runs(tmp_path / "results")
    assert (BENCH / "RESULTS.md").read_text() == render(runs, tmp_path), "run: tilewright bench report"
    committed, drawn = (
        {path.name: path.read_bytes() for path in (folder / "plots").glob("*.svg")} for folder in (BENCH, tmp_path)
    )
    assert committed.keys() == drawn.keys(), "as above"
    # Plots differ between versions of matplotlib; the committed ones are from the pinned version.
    if f"matplotlib=={matplotlib.__version__}\n" in (BENCH.parent / "constraints.txt").read_text():
        assert committed == drawn, "as above"
    for page, full in (("README.md", False), ("docs/bench.md", True)):
        written = (BENCH.parent / page).read_text()
        assert (block(runs, full) in written) == (BEGIN in written), "as above"


def test_without_a_gpu_run_gpu_stages_are_not_measured(results):
    runs = [run for run in read_runs(results) if not run.is_gpu]
    page = render(runs, results.parent)
    for name, stage in STAGES.items():
        assert (f"- {name}: {stage.what}" in page) == (not stage.on_any_machine)
    assert "so these are not measured" in page
    assert "- training: " in page
    assert "- tokenizer: " not in page
    tokenizer = "| training a tokenizer | 10,000 tokens, 10 MB of stories: 125.0 MB/s; other takes 2.50 times as long | 1 |"
    for full in (False, True):
        written = block(runs, full)
        assert ("| `attention`, head dim 128, causal | not measured |  |" in written) == full
        assert tokenizer in written
        assert "\n1. A CPU, 2026-01-01\n" in written


def test_stages_without_measurements_are_not_listed(tmp_path):
    rows = ({"stage": "kernels", "case": "a", "not_measured": "no NVIDIA GPU"}, timed("tokenizer", "b", "tilewright", 1.0))
    page = render([Run(tmp_path / "results" / "a.jsonl", {"stage": "machine", "device": "A CPU"}, rows)], tmp_path)
    assert page.splitlines()[-1] == "| [a.jsonl](results/a.jsonl) | A CPU |  |  | tokenizer |"


def test_the_readmes_table_on_a_gpu(results):
    written = block(read_runs(results), full=True)
    assert "| ceilings | copy of 1 GiB 4.30 TB/s (90% of the datasheet), bfloat16 product 8192^3 790 TFLOP/s (80% of" in written
    assert "rms_norm 65536x4096, forward: 3,900 GB/s, 91% of the roofline; torch.compile takes 1.30 times as long" in written
    assert "forward: 480 TFLOP/s; SDPA cuDNN takes 1.00 times as long" in written
    assert "training gpt2-small batch 32x1024: 364,000 tokens/s, MFU 43.0%, 61.0 GB" in written
    assert "generation gpt2-xl batch 1: 500 tokens/s, 46% of the bandwidth limit" in written
    assert (
        "| a training run | run tinystories-17m: 327,680,000 tokens in 120 s, 3,000,000 tokens/s, MFU 30.0%, valid" in written
    )
    assert "| `swiglu` | not measured |  |" in written


def test_rows_with_missing_fields_are_reported(tmp_path):
    partial: tuple[dict[str, Any], ...] = (
        {}, {"case": "a"}, {"variant": "tilewright"}, {"case": "a", "variant": "tilewright", "p50_ms": 1.0, "op": "x"},
        {"op": "rms_norm forward", "variant": "tilewright", "gb_per_s": 1.0}, {"error": None, "mfu": None},
    )  # fmt: skip
    rows = tuple({"stage": name, **rest} for name in (*STAGES, "tune", "of the future") for rest in partial)
    for machine in ({"stage": "machine"}, H200):
        runs = [Run(tmp_path / "results" / "r.jsonl", machine, rows)]
        assert "### of the future" in render(runs, tmp_path)
        assert block(runs, full=True).startswith(BEGIN)


def test_the_newest_measurement_of_each_case_counts(tmp_path):
    def rows(stage, *cases):
        return [{"stage": stage, "case": case} for case in cases]

    for stage, merged in (("kernels", True), ("inspect", False)):
        left_out = {"stage": stage, "case": "c", "not_measured": "no time left"}
        each = (rows(stage, "a", "b", "c"), [*rows(stage, "b"), left_out], [left_out], [])
        runs = [Run(tmp_path, {"date": str(i)}, tuple(part)) for i, part in enumerate(each)]
        older = [(runs[0], rows(stage, "a", "c"))]
        assert newest(runs, stage) == [(runs[1], rows(stage, "b")), *(older if merged else [])]
        assert newest(runs[2:], stage) == []


def test_preliminary_rows_do_not_hide_earlier_ones(tmp_path):
    final, preliminary = ({"stage": "training", "case": "a", **rest} for rest in ({"count": 5}, {"preliminary": True}))
    runs = [Run(tmp_path, {"date": date}, (row,)) for date, row in (("1", final), ("2", preliminary))]
    assert newest(runs, "training") == [(runs[1], [preliminary]), (runs[0], [final])]


def test_the_pages_are_refreshed_between_their_markers(results, capsys, monkeypatch):
    runs = read_runs(results)
    readme, overview = results.parent / "README.md", results.parent / "overview.md"
    assert not refresh(readme, runs, full=False)
    readme.write_text("# No markers\n")
    assert not refresh(readme, runs, full=False)
    assert readme.read_text() == "# No markers\n"
    for page in (readme, overview):
        page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    monkeypatch.chdir(results.parent.parent)
    assert main(["bench", "report", "--readme", "bench/README.md", "--overview", "bench/overview.md"]) == 0
    assert "from 2 runs; refreshed the tables in bench/README.md, bench/overview.md" in capsys.readouterr().out
    assert readme.read_text() == f"before\n{block(runs, full=False)}\nafter\n"
    assert overview.read_text() == f"before\n{block(runs, full=True)}\nafter\n"
    readme.write_text(f"before\n{BEGIN}\nold\n")
    with pytest.raises(UserError, match="has no block from"):
        refresh(readme, runs, full=False)


def test_a_folder_without_results_is_rejected(tmp_path):
    with pytest.raises(UserError, match="holds no results: run `tilewright bench` first"):
        run_report(ReportConfig(tmp_path, tmp_path / "RESULTS.md", overview=tmp_path / "overview.md"))


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("mfu", 0.4321, "43.2%"), ("share_of_roofline", 1.02, "102.0%"), ("idle", 0.5, "50.0%"), ("p50_ms", 0.12345, "0.123"),
        ("p50_ms", 1234.5, "1,234"), ("parameters", 2_127_057_600, "2,127,057,600"), ("mfu", None, ""), ("x", True, "yes"),
        ("error", float("nan"), "nan"), ("version", "1.0", "1.0"), ("error", -0.02, "-2.0%"),
        ("errors", 2, "2"), ("overhead_p50", -4e-5, "0.0%"),
    ],
)  # fmt: skip
def test_figures(name, value, shown):
    assert text(name, value) == shown


def test_headings_and_columns():
    assert [heading(name) for name in ("p50_ms", "gb_per_s", "tflop_per_s", "best_mfu")] == [
        "ms",
        "GB/s",
        "TFLOP/s",
        "best MFU",
    ]
    rows = [{"suspicious": "x", "gb_per_s": 1.0, "p50_ms": 1.0, "case": "a", "stage": "kernels"}, {"variant": "b", "mfu": None}]
    assert columns(rows) == ["case", "variant", "p50_ms", "gb_per_s", "suspicious"]


def test_folders_are_named_after_devices():
    assert slug("NVIDIA H200") == "nvidia-h200"
    assert re.fullmatch(r"[a-z0-9-]+", slug("Intel(R) Xeon(R) Processor"))


def test_a_case_that_a_later_run_skipped_is_measured(tmp_path):
    def run(date, *rows):
        machine = {"stage": "machine", "device": "NVIDIA H200", "date": date}
        return Run(Path("results") / f"{date}.jsonl", machine, tuple({"stage": "attention", **row} for row in rows))

    timed = {"case": "attention K64 forward", "variant": "tilewright", "p50_ms": 1.0}
    skipped = [{"case": f"attention K{width}", "not_measured": "no time left"} for width in (64, 128)]
    page = render([run("1", timed), run("2", timed | {"case": "attention K32 forward"}, *skipped)], tmp_path)
    assert "<summary>not measured: 1</summary>" in page
    assert "| attention K64 forward | tilewright | 1 |" in page
    assert "| attention K128 |  | no time left |" in page
