"""The demo: from raw text to a model that generates stories, on any machine."""

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import UserError
from ..files import write_text
from ..tokenizer import END_OF_TEXT, Tokenizer, train_bpe
from .config import TrainConfig
from .data.corpus import write_stories
from .data.encoding import encode_text
from .folder import require_no_run
from .options import DemoConfig, SampleConfig
from .plot import FILE_NAME as PLOT_FILE
from .presets import corpus_files, preset
from .pretrained import load_text_model
from .run import TrainResult, train
from .sample import write_texts
from .sample_log import FILE_NAME as SAMPLES_FILE

SUMMARY_FILE = "summary.json"


@dataclass(frozen=True)
class DemoSummary:
    """Measurements of the demo."""

    corpus_bytes: int
    tokenizer_seconds: float
    bytes_per_token: float
    result: TrainResult
    seconds: float
    sample: str


def _free_folder() -> Path:
    candidates = (Path("runs") / name for name in ("demo", *(f"demo-{n}" for n in range(2, 10_000))))
    return next(folder for folder in candidates if not folder.exists())


def train_config(demo: DemoConfig, out: Path) -> TrainConfig:
    """Return the configuration of the demo's training run in the folder `out`."""
    base = preset("stories-cpu")
    return dataclasses.replace(
        base,
        out=out,
        model=dataclasses.replace(base.model, vocab_size=demo.vocab_size),
        data=corpus_files(out / "data"),
        steps=demo.steps,
        seed=demo.seed,
        sample_prompts=(demo.prompt,),
        optimizer=dataclasses.replace(base.optimizer, warmup_steps=min(base.optimizer.warmup_steps, demo.steps // 2)),
    )


def run_demo(demo: DemoConfig, console: Console | None = None) -> DemoSummary:
    """Create a corpus, a tokenizer, a model and a story; print a table of measurements and return them.

    If a signal stops training, a checkpoint is saved and a `KeyboardInterrupt` is raised.
    """
    console = console or Console()
    start = time.perf_counter()
    out = _free_folder() if demo.out is None else demo.out
    require_no_run(out)
    if (out / "data").exists():
        raise UserError(f"{out} already contains a demo: choose another folder with --out")
    config = train_config(demo, out)
    files, (train_text,) = config.data, config.data.train

    console.print(f"[bold]1/4[/] corpus: {demo.megabytes:g} MB of stories to {escape(str(train_text))}")
    corpus_bytes = write_stories(train_text, demo.megabytes, seed=2 * demo.seed)
    # A different seed gives different stories, so the validation text is not in the training text.
    write_stories(files.valid, max(0.5, demo.megabytes / 50), seed=2 * demo.seed + 1)

    console.print(f"[bold]2/4[/] tokenizer: {demo.vocab_size:,} tokens to {escape(str(files.tokenizer))}")
    tokenizer_start = time.perf_counter()
    tokenizer = Tokenizer(*train_bpe(train_text, demo.vocab_size, [END_OF_TEXT]), [END_OF_TEXT])
    tokenizer_seconds = time.perf_counter() - tokenizer_start
    tokenizer.save(files.tokenizer)
    num_prompt_tokens = len(tokenizer.encode(demo.prompt))
    if num_prompt_tokens >= config.model.context_length:
        raise UserError(f"the prompt has {num_prompt_tokens} tokens: expected fewer than {config.model.context_length}")
    # A small corpus can yield fewer merges than requested.
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size))
    header = encode_text(train_text, tokenizer, train_text.with_suffix(".tokens"))

    console.print(f"[bold]3/4[/] model: {config.steps:,} steps to {escape(str(out))}")
    result = train(config)
    if result.stopped_by:
        console.print(
            f"stopped by {result.stopped_by} after step {result.steps:,}; resume with\n"
            f"tilewright train stories-cpu --out {out} --resume auto",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        raise KeyboardInterrupt

    sampling = SampleConfig((demo.prompt,), seed=demo.seed)
    console.print(f"[bold]4/4[/] sample: temperature {sampling.temperature}, top-p {sampling.top_p}\n")
    text = write_texts(load_text_model(out, config.device), sampling)[0]
    sample = text.prompt + text.text
    console.print(sample, markup=False, highlight=False, style="italic")

    summary = DemoSummary(
        corpus_bytes, tokenizer_seconds, header.text_bytes / header.num_tokens, result, time.perf_counter() - start, sample
    )
    write_text(out / SUMMARY_FILE, json.dumps(dataclasses.asdict(summary), indent=2, default=str) + "\n")
    console.print(_table(summary, config))
    console.print(
        f"Next: tilewright generate {out} --prompt 'Lily found a' --temperature 0.6\n"
        "      tilewright corpus fetch tinystories: the README continues from there to a model of 17 M parameters",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return summary


def _table(summary: DemoSummary, config: TrainConfig) -> Table:
    result = summary.result
    mfu = f"n/a: the peak of {result.device} is unknown" if result.mfu is None else f"{result.mfu:.1%} of {result.device}"
    table = Table(show_header=False, title=escape(f"\n{result.run}: {summary.seconds:.0f} s in all"))
    for name, value in {
        "corpus": f"{summary.corpus_bytes / 1e6:.1f} MB",
        "tokenizer": f"{summary.tokenizer_seconds:.1f} s, {summary.bytes_per_token:.2f} bytes/token",
        "parameters": f"{result.num_parameters:,}",
        "tokens seen": f"{result.steps * config.tokens_per_step:,}",
        "speed": f"{result.tokens_per_second:,.0f} tokens/s",
        "training loss": f"{result.train_loss:.3f} nats/token, {result.train_bits_per_byte:.3f} bits/byte",
        "validation loss": f"{result.valid_loss:.3f} nats/token, {result.valid_bits_per_byte:.3f} bits/byte",
        "MFU": mfu,
        "loss curve": str(result.run / PLOT_FILE),
        "checkpoints": str(result.run / "checkpoints"),
        "metrics": str(result.run / "metrics.jsonl"),
        "samples": str(result.run / SAMPLES_FILE),
    }.items():
        if name != "loss curve" or Path(value).exists():
            table.add_row(name, escape(value))
    return table
