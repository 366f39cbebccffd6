"""Run the demo and write its figures and loss curve into README.md: `make readme`."""

import datetime
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console

from ..errors import UserError
from ..files import atomic_file, require_file, write_text
from ..train.demo import DemoSummary, run_demo
from ..train.evaluation import EvalConfig, evaluate
from ..train.options import DemoConfig
from ..train.plot import FILE_NAME as LOSS_PLOT
from .machine import describe

CURVE = Path("docs/images/demo-loss.png")
BEGIN, END = "<!-- demo: written by `make readme` -->", "<!-- demo: end -->"


def demo_block(summary: DemoSummary, figures: dict, machine: dict) -> str:
    """Return README.md's block on the demo; `figures` come from `tilewright eval` on its validation text."""
    result = summary.result
    date = datetime.datetime.fromisoformat(machine["date"]).date()
    software = f"torch {machine['torch']}, commit {machine['commit']}, {date}"
    story = "\n".join(f"> {line}".rstrip() for line in summary.sample.strip().splitlines())
    return "\n".join(
        [
            BEGIN,
            f"Validation loss **{result.valid_loss:.3f}** nats/token, **{result.valid_bits_per_byte:.3f}** bits/byte, after "
            f"{result.steps:,} steps ({result.num_parameters:,} parameters, {summary.bytes_per_token:.2f} bytes/token), "
            f"{summary.seconds:.0f} s in all at {result.tokens_per_second:,.0f} tokens/s on "
            f"{machine['cpu_threads']} threads of {machine['device']} ({software}). `tilewright eval runs/demo --text "
            f"runs/demo/data/valid.txt` measures {figures['bits_per_byte']:.3f} bits/byte on the whole validation text: "
            f"perplexity {figures['perplexity']:.1f} per token of {figures['bytes_per_token']:.2f} bytes. The run's loss curve "
            "and a sample of its text:",
            "",
            f'<img src="{CURVE}" alt="Training and validation loss of the demo" width="640">',
            "",
            story,
            END,
        ]
    )


def replace_block(text: str, block: str, begin: str = BEGIN, end: str = END) -> str:
    """Return `text` with everything from the marker `begin` to the marker `end` replaced by `block`."""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise UserError(f"README.md has no block from {begin!r} to {end!r}: add these two lines where the figures belong")
    return text[: text.index(begin)] + block + text[text.index(end) + len(end) :]


def main(readme: Path = Path("README.md")) -> None:
    """Refresh `readme` from a run of the demo in a temporary folder."""
    text = require_file(readme, "the README", "run this in a checkout").read_text()
    replace_block(text, "")  # fail before the demo, not after
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "demo"
        summary = run_demo(DemoConfig(out=out), Console(stderr=True))
        valid = out / "data" / "valid.txt"
        curve = (out / LOSS_PLOT).read_bytes()
        figures = evaluate(out, EvalConfig(text=(valid,)))["text"][str(valid)]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with atomic_file(readme.parent / CURVE) as file:
        file.write(curve)
    write_text(readme, replace_block(text, demo_block(summary, figures, describe(device))))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"tilewright: error: {error}")
