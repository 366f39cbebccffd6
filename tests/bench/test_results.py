import json

import pytest

from tilewright.bench.results import read_run, read_runs
from tilewright.errors import UserError

MACHINE = {"stage": "machine", "device": "NVIDIA H200", "date": "2026-01-02T03:04:05+00:00", "torch": "2.13.0", "driver": "570"}


def write(path, *rows, end="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows) + end)
    return path


def test_a_file_is_read(tmp_path):
    run = read_run(write(tmp_path / "r.jsonl", MACHINE, {"stage": "kernels", "case": "a"}, {"stage": "tests", "case": "b"}))
    assert (run.device, run.is_gpu, run.date) == ("NVIDIA H200", True, "2026-01-02T03:04:05+00:00")
    assert run.provenance == "NVIDIA H200, driver 570, torch 2.13.0, 2026-01-02"
    assert run.stage("kernels") == [{"stage": "kernels", "case": "a"}]


def test_a_busy_cpu_is_marked(tmp_path):
    for device, load, marked in (("A CPU", 3.21, True), ("A CPU", 0.1, False), ("NVIDIA H200", 3.21, False)):
        run = read_run(write(tmp_path / "r.jsonl", {"stage": "machine", "device": device, "cpu_load": load}))
        assert ("measured under other load (3.2)" in run.provenance) == marked


def test_an_incomplete_machine_row_is_read(tmp_path):
    run = read_run(write(tmp_path / "r.jsonl", {"stage": "machine"}))
    assert (run.device, run.is_gpu, run.date, run.rows) == ("an unnamed device", False, "", ())
    assert run.provenance == "an unnamed device"


def test_an_incomplete_last_line_is_skipped(tmp_path):
    path = write(tmp_path / "r.jsonl", MACHINE, {"stage": "kernels", "case": "a"}, end='\n{"stage": "kern')
    assert len(read_run(path).rows) == 1


def test_final_rows_replace_preliminary_ones(tmp_path):
    def row(variant, **rest):
        return {"stage": "training", "case": "a", "variant": variant, **rest}

    early = [row(variant, preliminary=True) for variant in "abc"]
    late = [row("a", p50_ms=1.0), row("b", not_measured="cut off"), {**row("c", p50_ms=1.0), "case": "b"}]
    # b has no better row, and c only in another case.
    assert list(read_run(write(tmp_path / "r.jsonl", MACHINE, *early, *late)).rows) == [*early[1:], *late]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"stage": "machine"}\n{"stage": \n{"stage": "kernels"}\n', "line 2 is not a JSON object"),
        ('{"stage": "machine"}\n[1]\n{"stage": "kernels"}\n', "line 2 is not a JSON object"),
        ('{"stage": "machine"}\n{"job": "a"}\n{"stage": "kernels"}\n', "line 2 is not a JSON object with a stage"),
        ("\x1f\udc8b\n\udcff\n", "line 1 is not a JSON object"),
        ('{"stage": "kernels"}\n', "first line does not name the machine"),
        ("{", "first line does not name the machine"),
        ("", "is empty"),
    ],
)
def test_invalid_results_files_are_rejected(tmp_path, text, message):
    (tmp_path / "r.jsonl").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=message):
        read_run(tmp_path / "r.jsonl")
    with pytest.raises(UserError, match="does not exist"):
        read_run(tmp_path / "none.jsonl")


def test_runs_are_sorted_by_date(tmp_path):
    for name, date in (("a/z.jsonl", "2026-01-01"), ("b/a.jsonl", "2026-01-03"), ("a/b.jsonl", "2026-01-02")):
        write(tmp_path / name, MACHINE | {"date": date})
    (tmp_path / "a" / "notes.txt").write_text("no results")
    assert [run.date for run in read_runs(tmp_path)] == ["2026-01-01", "2026-01-02", "2026-01-03"]
