"""Summary of the results for the README: one line per op, step and peak, marked if not measured yet."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .jobs import Row
from .peers import OWN
from .results import Run


@dataclass(frozen=True)
class Headline:
    """One line of the table: the subject, the result, and the machine; the result is empty if not measured."""

    what: str
    result: str = ""
    where: str = ""


def _with_best_peer(rows: Sequence[Row], own: Row, how: str) -> str:
    """Return the result `how`, compared with the fastest peer of the same case."""
    others = [row for row in rows if row.get("case") == own.get("case") and row.get("p50_ms")]
    # Exclude our own other kernels.
    peers = [row for row in others if not f"{row.get('variant')},".startswith(f"{OWN},")]
    if not peers:
        return how
    best = min(peers, key=lambda row: row["p50_ms"])
    return f"{how}; {best['variant']} takes {best['p50_ms'] / own['p50_ms']:.2f} times as long"


def _largest(rows: Sequence[Row], op: str) -> Row | None:
    found = [row for row in rows if row.get("op") == op and row.get("variant") == OWN and row.get("p50_ms")]
    return max(found, key=lambda row: row.get("size", 0), default=None)


def _ceilings(rows: Sequence[Row]) -> str:
    parts = []
    for row in rows:
        rate = f"{row['gb_per_s'] / 1e3:.2f} TB/s" if row.get("gb_per_s") else f"{row.get('tflop_per_s') or 0:,.0f} TFLOP/s"
        share = f" ({row['share_of_datasheet']:.0%} of the datasheet)" if row.get("share_of_datasheet") else ""
        if row.get("gb_per_s") or row.get("tflop_per_s"):
            parts.append(f"{row.get('variant')} {rate}{share}")
    return ", ".join(parts)


def _op(op: str, by_flops: bool = False) -> Callable[[Sequence[Row]], str]:
    def format_rows(rows: Sequence[Row]) -> str:
        parts = []
        for direction in ("forward", "backward", "both"):
            row = _largest(rows, f"{op} {direction}")
            if row is None or (direction == "both" and parts):
                continue
            rate = f"{row.get('tflop_per_s') or 0:,.0f} TFLOP/s" if by_flops else f"{row.get('gb_per_s') or 0:,.0f} GB/s"
            share = f", {row['share_of_roofline']:.0%} of the roofline" if row.get("share_of_roofline") else ""
            named = "forward and backward" if direction == "both" else direction
            parts.append(
                _with_best_peer(rows, row, f"{row.get('case', op).removesuffix(' ' + direction)}, {named}: {rate}{share}")
            )
        return "<br>".join(parts)

    return format_rows


def _training(rows: Sequence[Row]) -> str:
    parts = []
    for row in rows:
        if row.get("tokens_per_s") and row.get("mfu") and row.get("variant") == "compile + kernels":
            peak = f", {row['peak_gb']:.1f} GB" if row.get("peak_gb") else ""
            host = f", the host {row['host_share']:.0%} of a step" if row.get("host_share") else ""
            parts.append(f"{row.get('case')}: {row['tokens_per_s']:,.0f} tokens/s, MFU {row['mfu']:.1%}{peak}{host}")
    return "<br>".join(parts)


def _generation(rows: Sequence[Row]) -> str:
    found = [row for row in rows if row.get("tokens_per_s") and row.get("share_of_datasheet")]
    return "<br>".join(
        f"{row.get('case')}: {row['tokens_per_s']:,.0f} tokens/s, {row['share_of_datasheet']:.0%} of the bandwidth limit"
        for row in found
    )


def _memory(rows: Sequence[Row]) -> str:
    errors = [row["error"] for row in rows if row.get("error") is not None]
    return f"{min(errors):+.1%} to {max(errors):+.1%} from the prediction, {len(errors)} configurations" if errors else ""


def _run(rows: Sequence[Row]) -> str:
    found = [row for row in rows if row.get("tokens_per_s") and row.get("valid_loss") and row.get("mfu")]
    return "<br>".join(
        f"{row.get('case')}: {row.get('tokens') or 0:,} tokens in {row.get('whole_run_s') or 0:,.0f} s, "
        f"{row['tokens_per_s']:,.0f} tokens/s, MFU {row['mfu']:.1%}, validation loss {row['valid_loss']:.3f}"
        for row in found
    )


def _overhead(rows: Sequence[Row]) -> str:
    found = [row for row in rows if row.get("overhead_p50") is not None]
    return "<br>".join(f"{row.get('case')}: {row['overhead_p50']:z.1%} on top of the model and the optimizer" for row in found)


def _tests(rows: Sequence[Row]) -> str:
    return ", ".join(f"{row['variant']}: {row['summary']}" for row in rows if row.get("summary"))


def _tokenizer(beginning: str) -> Callable[[Sequence[Row]], str]:
    def format_rows(rows: Sequence[Row]) -> str:
        for own in rows:
            if str(own.get("case", "")).startswith(beginning) and own.get("variant") == OWN and own.get("mb_per_s"):
                return _with_best_peer(
                    rows, own, f"{own['case'].removeprefix(beginning).strip(', ')}: {own['mb_per_s']:,.1f} MB/s"
                )
        return ""

    return format_rows


Line = tuple[str, str, bool, Callable[[Sequence[Row]], str]]
"""Subject, stage, whether the line needs a GPU, and the formatter."""


def _lines() -> Iterator[Line]:
    # Imported here because the rest of the report needs no torch.
    from ..kernels.op import ALL

    yield ("ceilings", "ceilings", True, _ceilings)
    yield ("GPU-marked tests", "tests", True, _tests)
    for op in ALL.values():
        if op.group == "own":
            yield (f"`{op.name}`", "kernels", True, _op(op.name, by_flops=op.bound_by == "flops"))
    for head_dim in (128, 64):
        of_head_dim = _op(f"attention K{head_dim}", by_flops=True)
        yield (f"`attention`, head dim {head_dim}, causal", "attention", True, of_head_dim)
    yield ("training", "training", True, _training)
    yield ("generation", "generation", True, _generation)
    yield ("peak memory", "memory", True, _memory)
    yield ("a training run", "run", True, _run)
    yield ("the training loop", "overhead", False, _overhead)
    yield ("training a tokenizer", "tokenizer", False, _tokenizer("train "))
    yield ("encoding, one thread", "tokenizer", False, _tokenizer("encode to lists, one thread"))
    yield ("decoding", "tokenizer", False, _tokenizer("decode"))


def headlines(runs: Sequence[Run]) -> list[Headline]:
    """Return the lines of the README, each from the newest of `runs` (oldest first) that has its figures."""
    lines = []
    for what, stage, needs_gpu, format_rows in _lines():
        candidates = (run for run in reversed(runs) if run.is_gpu or not needs_gpu)
        results = ((format_rows([row for row in run.stage(stage) if "not_measured" not in row]), run) for run in candidates)
        result, run = next(((result, run) for result, run in results if result), ("", None))
        lines.append(Headline(what, result, run.provenance if run else ""))
    return lines
