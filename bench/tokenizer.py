"""Benchmark the tokenizer against its peers on the same texts and vocabularies; each job runs in its own process."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..tokenizer import END_OF_TEXT, Tokenizer, iter_encoded, train_bpe
from ..tokenizer.formats import load_tokenizer, save_huggingface, save_tiktoken
from . import tokenizer_peers as peers
from .timing import quantiles
from .tokenizer_texts import LINES, write_text

# Each output form, and the method of a library that produces it.
FORMS = {"list": "to_list", "short": "to_list", "array": "to_array", "batch": "of_batch", "file": "of_file"}
OURS = "tilewright"
OURS_TIES = "tilewright, ties as tokenizers"


@dataclass(frozen=True)
class Work:
    """A text, the vocabulary sizes to train on it, the number of rounds, and the libraries; () for all."""

    text: str
    megabytes: float
    vocab_sizes: tuple[int, ...]
    rounds: int = 3
    libraries: tuple[str, ...] = ()


SHORT = (Work("stories", 10, (10_000,)), Work("packages", 10, (10_000,), 1), Work("cjk", 0.1, (1000,), 1))
# Without libraries that take minutes for each of about twenty jobs.
_FAST = (OURS, OURS_TIES, "gigatoken", "rustbpe", "tiktoken", "fastokens")
LONG = (
    Work("stories", 100, (10_000,), libraries=_FAST),
    Work("packages", 100, (32_000,), libraries=_FAST),
    Work("dna", 10, (4096,), 1, _FAST),
    Work("aaaa", 10, (4096,), 1, _FAST),
    Work("cjk", 20, (4096,), 1, _FAST),
)


def bench_tokenizer(works: Sequence[Work] = SHORT, limit_seconds: float = 120) -> Iterator[dict[str, Any]]:
    """Yield time, peak memory and exactness of training, encoding and decoding with every library.

    A library that exceeds `limit_seconds` in a job skips its remaining rounds. Times are medians of rounds in which the
    libraries take turns; `speedup` is a library's time over ours in the same case.
    """
    present = {}
    for name, (_, distribution, module) in peers.LIBRARIES.items():
        if importlib.util.find_spec(module) is None:
            yield {"case": "peers", "variant": name, "not_measured": f"not installed: pip install {distribution}"}
        else:
            present[name] = importlib.metadata.version(distribution)
    yield from _compilation()
    with tempfile.TemporaryDirectory() as folder:
        for work in works:
            text = Path(folder) / f"{work.text}-{work.megabytes:g}.txt"
            size = write_text(text, work.text, work.megabytes)
            what = f"{work.megabytes:g} MB of {work.text}"
            asked = {name: version for name, version in present.items() if name in work.libraries or not work.libraries}
            for vocab_size in work.vocab_sizes:
                jobs = {name: ("train", name, str(text), str(vocab_size)) for name in asked if peers.can(name, "train")}
                # rustbpe has its own rule for ties, so its merges always differ slightly.
                expected = {name: OURS if name == OURS else OURS_TIES for name in jobs}
                rows = _run(jobs, work.rounds, limit_seconds, expected)
                yield from _rows(f"train {vocab_size:,} tokens, {what}", rows, size, asked)
            yield from _encode_and_decode(Path(folder), text, size, what, work, asked, limit_seconds)
            text.unlink()


def _encode_and_decode(
    folder: Path, text: Path, size: int, what: str, work: Work, present: Mapping[str, str], limit_seconds: float
) -> Iterator[dict[str, Any]]:
    learned_from = text
    if work.text in LINES:
        # A vocabulary trained on such a line would hold most of the line in one token.
        learned_from = folder / "learned_from.txt"
        write_text(learned_from, "packages", min(10, work.megabytes))
    own = Tokenizer(*train_bpe(learned_from, work.vocab_sizes[-1], [END_OF_TEXT]), [END_OF_TEXT])
    own.save(folder / "tokenizer.json")
    data = load_tokenizer(folder / "tokenizer.json")
    save_huggingface(folder / "huggingface.json", data)
    save_tiktoken(folder / "ranks.tiktoken", data)
    np.save(folder / "ids.npy", np.concatenate(list(iter_encoded(text, own))))
    names = [name for name in present if name != OURS_TIES]
    titles = {
        "list": "encode to lists, one thread",
        "short": "encode 60 characters a call to lists, one thread",
        "array": "encode to arrays, one thread",
        "batch": "encode all documents in one call, all cores",
        "file": "encode the file, all cores",
    }
    for form, method in FORMS.items():
        jobs = {name: ("encode", name, str(folder), str(text), form) for name in names if peers.can(name, method)}
        rows = _run(jobs, work.rounds, limit_seconds, dict.fromkeys(jobs, OURS))
        yield from _rows(f"{titles[form]}, {what}", rows, size, present)
    jobs = {name: ("decode", name, str(folder), str(folder / "ids.npy")) for name in names if peers.can(name, "decode")}
    rows = _run(jobs, work.rounds, limit_seconds, dict.fromkeys(jobs, OURS))
    yield from _rows(f"decode, {what}", rows, size, present)


def _compilation() -> Iterator[dict[str, Any]]:
    """Yield the times of whole processes, first without and then with cached machine code; `cpu_s` is CPU time."""
    with tempfile.TemporaryDirectory() as folder:
        text, tokenizer = Path(folder) / "text.txt", Path(folder) / "tokenizer.json"
        # The size of CS336's speed test: 130 kB, 500 tokens.
        write_text(text, "stories", 0.13)
        for case, script in _FIRST_CALLS.items():
            for variant in ("cold code cache", "warm code cache"):
                environment = os.environ | {"NUMBA_CACHE_DIR": str(Path(folder) / case)}
                command = [sys.executable, "-P", "-c", _FIRST + script, str(text), str(tokenizer)]
                start, used = time.perf_counter(), _cpu_seconds()
                subprocess.run(command, check=True, env=environment)
                yield {
                    "case": f"first calls, {case}",
                    "variant": variant,
                    "p50_ms": (time.perf_counter() - start) * 1e3,
                    "cpu_s": _cpu_seconds() - used,
                    "count": 1,
                }


def _cpu_seconds() -> float:
    """Return the CPU time of all finished child processes."""
    used = os.times()
    return used.children_user + used.children_system


# gigatoken installs awkward, which Numba imports when it compiles; this takes a third of a second unrelated to our code.
# The scripts ignore the machine code cached next to the package or for the user.
_FIRST = f"""
import os, sys, warnings
from pathlib import Path
sys.modules["awkward"] = None
warnings.simplefilter("ignore")
from tilewright.tokenizer import Tokenizer, train_bpe
from tilewright.tokenizer.compiled import jit, store
store.machine_code_folders = lambda: [Path(os.environ["NUMBA_CACHE_DIR"])]
SPECIALS = [{END_OF_TEXT!r}]
"""
_FIRST_CALLS = {
    "training 500 tokens on 130 kB": "Tokenizer(*train_bpe(sys.argv[1], 500, SPECIALS), SPECIALS).save(sys.argv[2])",
    "encoding a prompt": "Tokenizer.load(sys.argv[2]).encode('Once upon a time there was a little boy.')",
    "decoding 40 ids": "Tokenizer.load(sys.argv[2]).decode(range(256, 296))",
    "all compiled code": "jit.load(jit.ALL)",
}


def _run(
    jobs: Mapping[str, Sequence[str]], rounds: int, limit_seconds: float, expected: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Return, for each job, its runs and whether its result equals the expected job's, or the reason for no result."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
    failures: dict[str, str] = {}
    for _ in range(rounds):
        for name, arguments in jobs.items():
            if name not in failures:
                outcome = _run_once(arguments, limit_seconds)
                if "not_measured" in outcome:
                    failures[name] = outcome["not_measured"]
                else:
                    runs[name].append(outcome)
    results = {}
    for name in jobs:
        if name in failures:
            results[name] = {"not_measured": failures[name]}
            continue
        reference = runs.get(expected[name])
        same = reference and all(run["digest"] == reference[0]["digest"] for run in runs[name])
        results[name] = {"runs": runs[name], "same_result": bool(same) if reference else None}
    return results


def _run_once(arguments: Sequence[str], limit_seconds: float) -> dict[str, Any]:
    # -P keeps the script's folder off the import path, because its modules have names like `tokenizer`.
    command = [sys.executable, "-P", str(Path(__file__).with_name("tokenizer_peers.py")), *arguments]
    start = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=limit_seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"not_measured": f"more than {limit_seconds:g} s"}
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        errors = done.stderr.strip().splitlines()
        return {"not_measured": f"failed: {errors[-1][:120] if errors else done.returncode}"}
    # A library may print to stdout before the last line.
    return {**json.loads(done.stdout.splitlines()[-1]), "process": seconds}


def _rows(case: str, results: Mapping[str, dict[str, Any]], size: int, versions: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    medians = {
        name: float(np.median([run["seconds"] for run in result["runs"]]))
        for name, result in results.items()
        if "runs" in result
    }
    for name, result in results.items():
        row: dict[str, Any] = {"case": case, "variant": name, "version": versions[name]}
        if "runs" not in result:
            yield row | result
            continue
        runs = result["runs"]
        row |= asdict(quantiles([run["seconds"] * 1e3 for run in runs]))
        row["mb_per_s"] = size / 1e6 / medians[name]
        if "second" in runs[0]:
            row["second_mb_per_s"] = size / 1e6 / float(np.median([run["second"] for run in runs]))
        row |= {
            "peak_mb": float(np.median([run["peak_mb"] for run in runs])),
            "process_s": float(np.median([run["process"] for run in runs])),
            "speedup": medians[name] / medians[OURS] if OURS in medians else None,
            "same_result": result["same_result"],
        }
        yield row
