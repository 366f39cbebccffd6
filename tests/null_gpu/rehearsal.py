"""Run the commands that need a GPU on the null GPU: `python -m null_gpu.rehearsal [PART ...]`, with tests/ in PYTHONPATH.

The null GPU computes nothing, so values are not checked. The rehearsal checks that every command ends, that every launch,
pointer, copy and capture is valid, and that the bench survives kernels that hang or break the context.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .events import count, events

# A tiny model on the embedded corpus.
MODEL = shlex.split(
    "--model.vocab-size 512 --model.context-length 32 --model.d-model 32 --model.num-layers 2 --model.num-heads 2"
    " --model.d-ff 64"
)
DATA = shlex.split("--data.train corpus/train.txt --data.valid corpus/valid.txt --data.tokenizer corpus/tokenizer.json")
STEPS = shlex.split(
    "--steps 12 --batch-size 4 --log-every 4 --eval-every 8 --eval-sequences 8 --checkpoint-every 8 --optimizer.warmup-steps 3"
)
TILEWRIGHT = ("-m", "tilewright")
# The command line without checks of values.
UNCHECKED = ("-m", f"{__package__}.small_bench")
# In PyTorch 2.11 the pool of Inductor's processes can wait for 5 minutes when a command ends (pytorch/pytorch#162199).
COMPILING = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
# The displayed counts of a part, and their column widths.
COLUMNS = {"launches": 9, "graphs": 7, "synchronisations": 16, "faults": 7}
BENCH_STAGES = ("machine", "ceilings", "kernels", "attention", "training", "generation", "memory", "run", "overhead")


@dataclass(frozen=True)
class Part:
    """One command, which must succeed within its time limit."""

    command: Sequence[str]
    """Arguments of Python."""
    needs: str | None = None
    """The part that must run first."""
    limit_s: float = 300
    stop_after: str | None = None
    """Send a SIGTERM after this output; None: let the command end by itself."""
    variables: dict[str, str] = field(default_factory=dict)
    flaw: Callable[[Path], str | None] = lambda folder: None
    """Check the folder after the command; return an error description or None."""


def _command(arguments: str, **rest: Any) -> Part:
    return Part((*TILEWRIGHT, *shlex.split(arguments)), **rest)


def _train(name: str, options: str = "", **rest: Any) -> Part:
    command = (*UNCHECKED, "train", "stories-cpu", *DATA, *MODEL, *STEPS, "--out", name, *shlex.split(options))
    left = _lacks(f"{name}/metrics.jsonl", f"{name}/loss.png", f"{name}/checkpoints")
    return Part(command, **{"needs": "corpus", "flaw": left, **rest})


def _lacks(*names: str) -> Callable[[Path], str | None]:
    return lambda folder: ", ".join(f"no {name}" for name in names if not (folder / name).exists()) or None


def _not_finished(run: str, steps: int) -> Callable[[Path], str | None]:
    """Return a check that the metrics of a run hold each step once, up to the last."""

    def flaw(folder: Path) -> str | None:
        seen = [row["step"] for row in _rows(folder / run / "metrics.jsonl")]
        return None if seen[-1:] == [steps] and seen == sorted({*seen}) else f"the steps in metrics.jsonl are {seen}"

    return flaw


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# Accepted reasons for unmeasured rows: nvidia-smi does not see this GPU, and peers may be missing or lack a shape.
EXPECTED = (
    "nvidia-smi does not answer", "not installed", "skipped", "does not support masks", "the same as SDPA flash",
    "several times", "its mask has T x S entries",
)  # fmt: skip


OWN = ("tilewright", "compile + kernels", "loop")


def _unmeasured(name: str) -> Callable[[Path], str | None]:
    """Return a check for unmeasured rows of this project's kernels, and for stages without rows."""

    def flaw(folder: Path) -> str | None:
        rows = _rows(folder / f"{name}.jsonl")
        missing = [row for row in rows if "not_measured" in row and not any(e in row["not_measured"] for e in EXPECTED)]
        own = [row for row in missing if row.get("variant", "tilewright") in OWN]
        if not any(row["stage"] == name.removeprefix("bench-") and "case" in row for row in rows):
            return "no rows"
        return "; ".join(f"{row['case']} {row.get('variant', '')}: {row['not_measured']}" for row in own)[:600] or None

    return flaw


def _survives(name: str, reason: str) -> Callable[[Path], str | None]:
    """Return a check that a bench lost exactly one job for this reason: rows before and after it are measured."""

    def flaw(folder: Path) -> str | None:
        rows = [row for row in _rows(folder / f"{name}.jsonl") if row["stage"] == "kernels" and "case" in row]
        lost = [i for i, row in enumerate(rows) if reason in row.get("not_measured", "")]
        if not lost:
            return f"no row says {reason!r}"
        timed = [i for i, row in enumerate(rows) if "p50_ms" in row]
        if not timed or not timed[0] < lost[0] < timed[-1]:
            return f"rows {lost} of {len(rows)} are lost, {timed} timed: one kernel took more than its job"
        return None

    return flaw


def _bench(name: str, *arguments: str, flaw: Callable[[Path], str | None], **rest: Any) -> Part:
    return Part(
        (*UNCHECKED, "bench", *arguments, "--out", f"{name}.jsonl"), flaw=flaw, limit_s=rest.pop("limit_s", 900), **rest
    )


# Only one op has a kernel of this name, and it is neither the first nor the last measured.
LOST = {"hangs": ("NULL_GPU_HANGS_AT", "hung: killed after"), "breaks": ("NULL_GPU_BREAKS_AT", "broke the GPU's context")}
LOST_KERNEL = "layer_norm_forward"

# Long enough for a signal to arrive before the last step.
LONGER = "--steps 60 --eval-every 30 --checkpoint-every 30"

PARTS: dict[str, Part] = {
    "corpus-text": _command("corpus stories --out corpus --megabytes 0.2 --valid-megabytes 0.02"),
    "corpus": _command("tokenizer train corpus/train.txt --vocab-size 512", needs="corpus-text"),
    "eager": _train("eager", "--compile False"),
    "compiled": _train("compiled"),
    "accumulate": _train("accumulate", "--micro-batch-size 2"),
    "cuda-graphs": _train("cuda-graphs", "--cuda-graphs"),
    # Only two steps, because the largest batch that fits is huge for such a small model.
    "auto": _train(
        "auto", "--batch-size auto --activation-checkpointing auto --steps 2 --optimizer.warmup-steps 0 --compile False"
    ),
    "checkpointing": _train("checkpointing", "--activation-checkpointing block"),
    "profile": _train(
        "profile",
        "--compile False --profile --steps 20 --eval-every 20 --checkpoint-every 20",
        flaw=_lacks("profile/profile/trace.json", "profile/profile/memory.pickle"),
    ),
    "muon": _train("muon", "--optimizer.name muon"),
    "ema": _train("ema", "--ema-decay 0.9 --z-loss 1e-4"),
    "documents": _train("documents", "--data.documents"),
    "interrupted": _train("interrupted", f"--compile False {LONGER}", stop_after="step  4/60"),
    "resume": _train(
        "interrupted", f"--compile False {LONGER} --resume auto", needs="interrupted", flaw=_not_finished("interrupted", 60)
    ),
    "generate": Part((*UNCHECKED, *shlex.split("generate eager --max-new-tokens 8")), needs="eager"),
    "export": _command("export eager", needs="eager", flaw=_lacks("eager/hf/model.safetensors")),
    **{f"bench-{stage}": _bench(f"bench-{stage}", stage, flaw=_unmeasured(f"bench-{stage}")) for stage in BENCH_STAGES},
    "bench-tune": _bench("bench-tune", "tune", "attention", "--head-dims", "64", flaw=_unmeasured("bench-tune")),
    **{
        f"bench-{name}": _bench(
            f"bench-{name}", "kernels", flaw=_survives(f"bench-{name}", reason), variables={variable: LOST_KERNEL}
        )
        for name, (variable, reason) in LOST.items()
    },
}


def _stop(child: subprocess.Popen[bytes], log: Path, part: Part) -> None:
    """Send a SIGTERM as soon as the log contains `part.stop_after`."""
    until = time.monotonic() + part.limit_s
    while child.poll() is None and time.monotonic() < until and (part.stop_after or "") not in log.read_text(errors="replace"):
        time.sleep(0.01)
    child.terminate()


def _run(name: str, part: Part, folder: Path) -> tuple[str | None, dict[str, int], float]:
    """Run a part; return its error description or None, its event counts, and its duration in seconds."""
    trace, start = folder / f"{name}.trace", time.monotonic()
    tests = str(Path(__file__).resolve().parents[1])
    variables = {**os.environ, "NULL_GPU_TRACE": str(trace), "PYTHONPATH": tests, **COMPILING, **part.variables}
    with (folder / f"{name}.log").open("w") as log:
        # A separate process group, so that its children can be killed with it.
        child = subprocess.Popen(
            [sys.executable, "-P", *part.command], cwd=folder, env=variables, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            if part.stop_after is not None:
                _stop(child, folder / f"{name}.log", part)
            status = child.wait(part.limit_s)
            flaw = f"exit status {status}" if status else part.flaw(folder)
        except subprocess.TimeoutExpired:
            flaw = f"did not end within {part.limit_s:.0f} s"
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    counts = count(events(trace))
    if counts.get("faults") and flaw is None:
        flaw = "faults"
    return flaw, counts, time.monotonic() - start


def _with_needs(names: Sequence[str]) -> list[str]:
    chosen: list[str] = []
    for name in names:
        chain = [name]
        while (need := PARTS[chain[-1]].needs) is not None:
            chain.append(need)
        chosen += [each for each in reversed(chain) if each not in chosen]
    return chosen


def _end_of(path: Path, lines: int = 15) -> str:
    return "".join(f"    {line}\n" for line in path.read_text(errors="replace").splitlines()[-lines:])


def rehearse(names: Sequence[str], folder: Path) -> list[str]:
    """Run parts and their prerequisites in a folder and print a line for each; return the parts that failed."""
    flawed = []
    shown = " ".join(f"{name:>{width}}" for name, width in COLUMNS.items())
    print(f"{'part':20} {'seconds':>8} {shown}", flush=True)
    for name in _with_needs(names):
        flaw, counts, seconds = _run(name, PARTS[name], folder)
        figures = (f"{counts.get(key, 0):>{width},}" for key, width in COLUMNS.items())
        print(f"{name:20} {seconds:>8.1f} {' '.join(figures)}  {flaw or 'ok'}", flush=True)
        if flaw:
            flawed.append(name)
            print(_end_of(folder / f"{name}.log"), end="", flush=True)
    return flawed


def main() -> int:
    """Run the parts that the command line names, or all."""
    names = sys.argv[1:] or [*PARTS]
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        sys.exit(f"unknown part {', '.join(unknown)}: expected {', '.join(PARTS)}")
    if not os.environ.get("NULL_GPU"):
        sys.exit("NULL_GPU is not set: install the null GPU (tests/null_gpu/install.py) and set NULL_GPU=1")
    with tempfile.TemporaryDirectory() as folder:
        flawed = rehearse(names, Path(folder))
    print(f"{len(flawed)} parts failed{': ' if flawed else ''}{', '.join(flawed)}")
    return 1 if flawed else 0


if __name__ == "__main__":
    sys.exit(main())
