"""Count the GPU calls of a training step on the null GPU: `python -m null_gpu.steps`, with tests/ in PYTHONPATH.

An iteration lasts from one call of `Trainer.train_step` to the next, so it includes the work of the loop between steps. The
first iterations compile and allocate and are not counted. Iterations that log metrics synchronize with the device.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

from .events import count, events, trace_to

FILE = Path(__file__).with_name("steps.json")
VARIANTS: dict[str, dict[str, Any]] = {
    "eager": {"compile": False},
    "compiled": {},
    "accumulate": {"micro_batch_size": 2},
    "cuda graphs": {"cuda_graphs": True},
    "cuda graphs, accumulate": {"cuda_graphs": True, "micro_batch_size": 2},
    "cuda graphs, muon": {"cuda_graphs": True, "name": "muon"},
    "muon": {"name": "muon"},
    "checkpointed": {"activation_checkpointing": "block"},
    "two sources": {"cuda_graphs": True, "names": ("a", "b")},
}
NUM_STEPS, WARMUP_STEPS, LOG_EVERY = 24, 8, 4
LIMIT_S = 300


def versions() -> dict[str, str]:
    """Return the versions of the packages that affect the counts."""
    import torch
    import triton

    return {"torch": torch.__version__, "triton": triton.__version__}


def _config(variant: str, folder: Path) -> Any:
    from tilewright.model import ModelConfig
    from tilewright.tokenizer import END_OF_TEXT, Tokenizer, train_bpe
    from tilewright.train import OptimizerConfig, TrainConfig
    from tilewright.train.data.corpus import write_stories
    from tilewright.train.presets import corpus_files

    files = corpus_files(folder)
    write_stories(files.train[0], 0.1, seed=0)
    write_stories(files.valid, 0.02, seed=1)
    Tokenizer(*train_bpe(files.train[0], 300, [END_OF_TEXT]), [END_OF_TEXT]).save(files.tokenizer)
    options = dict(VARIANTS[variant])
    data = files
    if names := options.pop("names", None):
        data = dataclasses.replace(files, train=(files.train[0], files.valid), names=names)
    optimizer = OptimizerConfig(name=options.pop("name", "adamw"), warmup_steps=3)
    # Wide enough to launch every kernel as in a real run. Validation and checkpoints come after the last step.
    model = ModelConfig(vocab_size=300, context_length=64, d_model=64, num_layers=2, num_heads=2, d_ff=128)
    return TrainConfig(
        out=folder / "run", model=model, data=data, steps=NUM_STEPS, batch_size=4, optimizer=optimizer, device="cuda",
        log_every=LOG_EVERY, eval_every=NUM_STEPS, checkpoint_every=NUM_STEPS, eval_sequences=4, **options,
    )  # fmt: skip


def measure(variant: str) -> dict[str, Any]:
    """Train in this process; return the counts of an iteration without and with logging, and the host time.

    All iterations should have the same counts; otherwise "differ" holds all distinct counts.
    """
    from tilewright.train import train
    from tilewright.train.trainer import Trainer

    own_step = Trainer.train_step
    began: dict[int, float] = {}

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def train_step(trainer: Trainer) -> Any:
            trace_to(folder / f"turn-{trainer.step}")
            began[trainer.step] = time.perf_counter()
            return own_step(trainer)

        config = _config(variant, folder)
        with patch.object(Trainer, "train_step", train_step):
            train(config)
        trace_to(None)
        turns = {step: count(events(folder / f"turn-{step}")) for step in range(WARMUP_STEPS, NUM_STEPS - 1)}
    logs = {step for step in turns if (step + 1) % LOG_EVERY == 0}
    silent = [turns[step] for step in turns if step not in logs]
    result: dict[str, Any] = {
        "step": silent[0],
        "step that logs": turns[min(logs)],
        "host_ms": round(1e3 * statistics.median(began[step + 1] - began[step] for step in turns if step not in logs), 2),
    }
    different = Counter(json.dumps(each, sort_keys=True) for each in silent)
    return result if len(different) == 1 else result | {"differ": [json.loads(each) for each in different]}


def measured(variant: str) -> dict[str, Any]:
    """Return the result of `measure` in a new process, without compiled or captured state."""
    path = os.pathsep.join([str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    # Compile kernels even if this process runs Triton's interpreter.
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-P", "-m", f"{__package__}.steps", variant],
        env=variables,
        timeout=LIMIT_S,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{variant}: exit status {done.returncode}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure the variant that the command line names, and print it; or measure all and write the file."""
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
        return
    if not os.environ.get("NULL_GPU"):
        sys.exit("NULL_GPU is not set: install the null GPU (tests/null_gpu/install.py) and set NULL_GPU=1")
    counts = {}
    for variant in VARIANTS:
        counts[variant] = measured(variant)
        print(variant, json.dumps(counts[variant]), flush=True)
    FILE.write_text(json.dumps({**versions(), "variants": counts}, indent=2) + "\n")


if __name__ == "__main__":
    main()
