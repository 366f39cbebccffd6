import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest

from tilewright.bench import tokenizer as bench
from tilewright.bench import tokenizer_peers as peers
from tilewright.bench import tokenizer_texts as texts
from tilewright.tokenizer import END_OF_TEXT, Tokenizer, train_bpe
from tilewright.tokenizer.formats import save_huggingface, save_tiktoken

TEXT = f"One day, a cat sat on a mat.{END_OF_TEXT}It's a 中文 cat!\n\nIt sat, it ran, it sat.{END_OF_TEXT}" * 50
SMALL = bench.Work("stories", 0.02, (300,), 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers")
    (folder / "text.txt").write_text(TEXT)
    tokenizer = Tokenizer(*train_bpe(folder / "text.txt", 280, [END_OF_TEXT]), [END_OF_TEXT])
    tokenizer.save(folder / "tokenizer.json")
    save_huggingface(folder / "huggingface.json", tokenizer.data)
    save_tiktoken(folder / "ranks.tiktoken", tokenizer.data)
    np.save(folder / "ids.npy", tokenizer.encode_array(TEXT))
    return folder


@pytest.mark.parametrize("name", peers.LIBRARIES)
def test_every_library_does_every_job_with_the_same_result(folder, name):
    library, distribution, module = peers.LIBRARIES[name]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{distribution} is not installed")
    text, ids = str(folder / "text.txt"), str(folder / "ids.npy")
    if peers.can(name, "train"):
        trained = peers.JOBS["train"](library(), text, "280")
        assert trained["merges"] == 23
        assert trained["seconds"] > 0
        assert trained["peak_mb"] > 10
    if peers.can(name, "decode"):
        expected = peers.JOBS["decode"](peers.Tilewright(), str(folder), ids)
        assert peers.JOBS["decode"](library(), str(folder), ids)["digest"] == expected["digest"]
    for form, method in bench.FORMS.items():
        if peers.can(name, method):
            expected = peers.JOBS["encode"](peers.Tilewright(), str(folder), text, form)
            found = peers.JOBS["encode"](library(), str(folder), text, form)
            assert (found["tokens"], found["digest"]) == (expected["tokens"], expected["digest"])


def test_the_tokenizer_is_measured_with_its_peers(monkeypatch):
    names = ("tilewright", "tilewright, ties as tokenizers", "tokenizers")
    monkeypatch.setattr(peers, "LIBRARIES", {name: peers.LIBRARIES[name] for name in names})
    scripts = bench._FIRST_CALLS | {"all compiled code": "jit.load(jit.ALL[:1])"}  # loading everything takes long
    monkeypatch.setattr(bench, "_FIRST_CALLS", scripts)
    rows = list(bench.bench_tokenizer([SMALL]))
    first, measured = rows[: 2 * len(scripts)], rows[2 * len(scripts) :]
    assert [row["case"] for row in first] == [f"first calls, {case}" for case in scripts for _ in range(2)]
    assert all(row["cpu_s"] > 0 and row["p50_ms"] > 0 for row in first)
    assert {row["variant"] for row in measured} == set(names)
    assert len({row["case"] for row in measured}) == 7
    assert all(row["same_result"] for row in measured)
    assert all(row["mb_per_s"] > 0 and row["peak_mb"] > 10 and row["process_s"] > 0 for row in measured)
    assert all(row["speedup"] == 1 for row in measured if row["variant"] == "tilewright")


def test_missing_libraries_are_reported(monkeypatch):
    libraries = {"nothing": (peers.Tiktoken, "nothing-at-all", "nothing_at_all")}
    monkeypatch.setattr(peers, "LIBRARIES", libraries)
    assert next(bench.bench_tokenizer([])) == {
        "case": "peers",
        "variant": "nothing",
        "not_measured": "not installed: pip install nothing-at-all",
    }


def run_script(monkeypatch, tmp_path, script, limit_seconds=20):
    (tmp_path / "tokenizer_peers.py").write_text(script)
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "tokenizer.py"))
    return bench._run({"a": ("x",), "b": ("y",)}, 2, limit_seconds, {"a": "a", "b": "a"})


def test_differing_results_are_detected(monkeypatch, tmp_path):
    script = "import json, sys; print('noise'); print(json.dumps({'digest': sys.argv[1], 'seconds': 1, 'peak_mb': 2}))"
    results = run_script(monkeypatch, tmp_path, script)
    assert (results["a"]["same_result"], results["b"]["same_result"]) == (True, False)
    assert len(results["a"]["runs"]) == 2
    rows = list(
        bench._rows("case", results | {"tilewright": results["a"]}, 10**6, dict.fromkeys(("a", "b", "tilewright"), "1"))
    )
    assert rows[0]["p50_ms"] == 1000
    assert rows[0]["mb_per_s"] == rows[0]["speedup"] == 1


@pytest.mark.parametrize(
    ("script", "limit_seconds", "message"),
    [("import time; time.sleep(60)", 0.3, "more than 0.3 s"), ("raise ValueError('no')", 250, "failed: ValueError: no")],
)
def test_a_hanging_or_failing_library_does_not_stop_the_bench(monkeypatch, tmp_path, script, limit_seconds, message):
    results = run_script(monkeypatch, tmp_path, script, limit_seconds)
    assert results == {"a": {"not_measured": message}, "b": {"not_measured": message}}
    assert [row["not_measured"] for row in bench._rows("case", results, 1, dict.fromkeys("ab", "1"))] == [message] * 2


def test_texts_have_the_requested_size(tmp_path, monkeypatch):
    for kind in ("stories", "dna", "aaaa", "cjk"):
        size = texts.write_text(tmp_path / kind, kind, 0.03)
        assert size == (tmp_path / kind).stat().st_size
        assert 25_000 < size < 40_000
    assert set((tmp_path / "dna").read_text()) == set("acgt")
    assert (tmp_path / "cjk").read_text().isalpha()
    monkeypatch.setattr(texts, "package_files", lambda: iter([b"# one\n" * 10, b"caf\xe9 " * 10_000, b"never reached"]))
    assert texts.write_text(tmp_path / "packages", "packages", 0.02) < 20_100
    documents = (tmp_path / "packages").read_text().split(END_OF_TEXT)
    assert documents[0] == "# one\n" * 10
    assert documents[1].startswith("caf\ufffd ")


def test_package_files_are_sorted_and_unique(tmp_path, monkeypatch):
    for name, text in {"b.py": "b", "a/x.md": "x", "a/same.py": "b", "skip.json": "{}", "empty.py": ""}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(texts.sysconfig, "get_path", lambda name: str(tmp_path))
    assert list(texts.package_files()) == [b"b", b"x"]


def test_the_script_runs_without_the_rest_of_the_bench(folder):
    arguments = [sys.executable, "-P", peers.__file__, "encode", "tilewright", str(folder), str(folder / "text.txt"), "list"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["tokens"] > 100
