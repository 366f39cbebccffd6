"""Check the computed answers of two published CS336 write-ups against ours: `docs/writeups.md`.

`python -m tilewright.bench.writeups` writes the page. It computes our values, and whether the write-ups' numbers agree with
them to as many digits as they have. Nothing here is measured.
"""

import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..datasheet import GPUS
from ..errors import UserError
from ..files import write_text
from ..model import MODELS, ModelConfig
from ..model.accounting import (
    HANDOUT,
    adamw_flops,
    forward_flops,
    forward_flops_by_group,
    handout_memory,
    largest_batch,
    num_parameters,
    operations,
    parameters_by_group,
    training_memory,
    training_plan,
)
from ..model.memory_size import GB, GIB

PAGE = Path(__file__).parent.parent / "docs" / "writeups.md"
XL = MODELS["gpt2-xl"]
BLANK = "blank"


@dataclass(frozen=True)
class Row:
    """One question with our answer, the answers of write-ups A and B, and a verdict."""

    question: str
    ours: str
    a: str
    b: str
    verdict: str


def judge(ours: float, theirs: str, unit: float = 1.0) -> str:
    """Compare `theirs`, a number in `unit`, with `ours` to as many digits as it has: right, truncated, or wrong.

    If both are whole numbers of ones, right means equal.
    """
    digits = theirs.replace(",", "")
    if isinstance(ours, int) and unit == 1:
        return "right" if ours == int(digits) else "wrong"
    step = unit * 10.0 ** -len(digits.partition(".")[2])
    difference = ours - float(digits) * unit
    if abs(difference) <= step / 2:
        return "right"
    return "right, but truncated, not rounded" if 0 < difference < step else "wrong"


def _number(question: str, ours: float, shown: str, a: str, b: str, unit: float = 1.0, suffix: str = "", note: str = "") -> Row:
    """Return the row of one number; `a` and `b` are theirs in `unit`, or empty."""
    verdicts = [f"{name} is {judge(ours, theirs, unit)}" for name, theirs in (("A", a), ("B", b)) if theirs]
    a, b = (f"{theirs}{suffix}" if theirs else "-" for theirs in (a, b))
    return Row(question, shown, a, b, "; ".join([*verdicts, note] if note else verdicts))


def _fails(data: bytes) -> str | None:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return str(error)
    return None


def _unicode() -> list[Row]:
    def by_byte(text: str) -> str | None:
        return next((error for byte in text.encode() if (error := _fails(bytes([byte])))), None)

    a_sequence, b_sequence = b"\xc3\x28", b"\x80\x80"
    return [
        Row(
            "What does `chr(0)` return?",
            f"`{chr(0)!r}`, a string of one character, U+0000",
            "`'b'\\x00'`",
            "`'\\x00'`",
            f"B is right; A's is not valid Python: the string is `{chr(0)!r}`, its UTF-8 bytes are `{chr(0).encode()!r}`",
        ),
        Row(
            "A text that cannot be decoded byte by byte",
            f"any character outside ASCII: 牛 is `{'牛'.encode()!r}`, and `{by_byte('牛')}`",
            "牛, which fails at byte 0xe7",
            "你好",
            "both are right" if by_byte("牛") and "0xe7" in str(by_byte("牛")) and by_byte("你好") else "wrong",
        ),
        Row(
            "Two bytes that decode to no character",
            f"`{a_sequence!r}`: {_fails(a_sequence)}; `{b_sequence!r}`: {_fails(b_sequence)}",
            f"`{a_sequence!r}`",
            "`'\\x80\\x80'`",
            "both are right" if _fails(a_sequence) and _fails(b_sequence) else "wrong",
        ),
    ]


def _parameters() -> list[Row]:
    groups, count = parameters_by_group(XL), num_parameters(XL)
    small_ff = dataclasses.replace(XL, d_ff=4288)
    embedding, attention, ffn = groups["embedding"], groups["attention"] // 48, groups["feed-forward"] // 48
    return [
        _number("gpt2-xl, embedding", embedding, f"{embedding:,}", "", "80,441,200", note="its total uses the right value"),
        _number("gpt2-xl, attention of a block", attention, f"{attention:,}", "", "10,240,000"),
        _number("gpt2-xl, feed-forward of a block", ffn, f"{ffn:,}", "", "30,720,000"),
        _number("gpt2-xl, all parameters", count, f"{count:,}", "2,127,057,600", "2,127,057,600"),
        _number("in float32, bytes", 4 * count, f"{4 * count:,}", "", "8,508,230,400"),
        _number("in float32, GB", 4 * count, f"{4 * count / GB:.3f} GB = {4 * count / GIB:.3f} GiB", "8.5", "8", GB, " GB"),
        Row(
            "with d_ff 4,288, the handout of 2026",
            f"{num_parameters(small_ff):,} parameters, {4 * num_parameters(small_ff) / GB:.2f} GB, "
            f"{forward_flops(small_ff) / 1e12:.3f} TFLOP forward",
            "-",
            "-",
            "neither answers",
        ),
    ]


def _flops() -> list[Row]:
    layer = {op.name: op.forward_flops for op in operations(XL, policy=HANDOUT) if op.layer == 0}
    qkv, w13 = layer["q_proj"] + layer["k_proj"] + layer["v_proj"], layer["w1"] + layer["w3"]
    block, head, total = sum(layer.values()), forward_flops_by_group(XL)["head"], forward_flops(XL)
    attention = layer["scores"] + layer["values"]
    ffn = w13 + layer["w2"]
    off = 48 * block - 4_348_631_347_200
    billion, tera = 1e9, 1e12
    return [
        _number("Q, K, V of a block", qkv, f"{qkv:,}", "15,728,640,000", ""),
        _number("scores QK^T of a block", layer["scores"], f"{layer['scores']:,}", "3,355,443,200", ""),
        _number("scores times V of a block", layer["values"], f"{layer['values']:,}", "3,355,443,200", ""),
        _number("output projection of a block", layer["output_proj"], f"{layer['output_proj']:,}", "5,242,880,000", ""),
        _number("all projections of a block", 4 * layer["q_proj"], f"{4 * layer['q_proj']:,}", "", "20.97", billion, "B"),
        _number("attention of a block", attention, f"{attention:,}", "", "6.71", billion, "B"),
        _number("W1 and W3 of a block", w13, f"{w13:,}", "41,943,040,000", ""),
        _number("W2 of a block", layer["w2"], f"{layer['w2']:,}", "20,971,520,000", ""),
        _number("feed-forward of a block", ffn, f"{ffn:,}", "62.9", "62.91", billion, "B"),
        _number("a block", block, f"{block:,}", "90,596,486,400", "", note="the sum of its own terms equals ours"),
        _number("48 blocks", 48 * block, f"{48 * block:,}", "4,348,631,347,200", "", note=f"{off:,} too few"),
        _number("head", head, f"{head:,}", "164,682,137,600", ""),
        _number("head, in short", head, f"{head / 1e9:.1f}B", "", "164.7", billion, "B"),
        _number("gpt2-xl, total", total, f"{total:,}", "4,513,313,484,800", "", note=f"{off:,} too few"),
        _number("the same, in short", total, f"{total / 1e12:.4f}T", "4.51", "4.51", tera, "T"),
        _number("blocks, share of all", 4800 * block / total, f"{4800 * block / total:.2f}%", "96.3", "", suffix="%"),
        Row("feed-forward, share of a block", f"{100 * ffn / block:.1f}%", "about 70%", "-",
            f"A is {judge(100 * ffn / block, '7', 10)} to its one digit"),
    ]  # fmt: skip


# Total in TFLOP and the shares of projections, attention, feed-forward and head in each write-up. A has the shares of all
# blocks together and of the head.
MODELS_OF_THE_WRITEUPS = {
    "gpt2-small": (("0.32", "77.7", "22.3"), ("0.350", "16.6", "11.1", "49.8", "22.6")),
    "gpt2-medium": (("1.03", "90", "10"), ("1.03", "20.0", "10.0", "59.9", "10.2")),
    "gpt2-large": (("2.23", "94", "6"), ("2.26", "21.4", "8.6", "64.2", "5.2")),
    "gpt2-xl": (("4.51", "96.3", ""), ("4.51", "22.3", "7.1", "66.9", "3.6")),
}


def _shares(config: ModelConfig, context: int | None = None) -> list[float]:
    groups = forward_flops_by_group(config, context)
    return [100 * flops / sum(groups.values()) for flops in groups.values()]


def _models() -> list[Row]:
    rows = []
    for name, (a, b) in MODELS_OF_THE_WRITEUPS.items():
        total, shares = forward_flops(MODELS[name]), _shares(MODELS[name])
        rows.append(_number(f"{name}, one forward pass", total, f"{total:,}", a[0], b[0], 1e12, "T"))
        ours_of_a = [100 - shares[-1], shares[-1]]
        judged_a = [f"{x} {judge(ours, x)}" for ours, x in zip(ours_of_a, a[1:], strict=True) if x]
        judged_b = [f"{x} {judge(ours, x)}" for ours, x in zip(shares, b[1:], strict=True)]
        wrong = [f"A's {x}" for x in judged_a if not x.endswith("right")] + [
            f"B's {x}" for x in judged_b if not x.endswith("right")
        ]
        rows.append(
            Row(
                f"{name}, projections / attention / feed-forward / head",
                " / ".join(f"{share:.2f}" for share in shares) + "%",
                "blocks " + " / head ".join(x for x in a[1:] if x) + "%",
                " / ".join(b[1:]) + "%",
                "; ".join(wrong) or "both are right",
            )
        )
    return rows


def _long_context() -> list[Row]:
    short, long, shares = forward_flops(XL), forward_flops(XL, 16_384), _shares(XL, 16_384)
    ratio = long / short
    theirs = ("10.8", "55.2", "32.3", "1.8")
    right = all(judge(ours, x) == "right" for ours, x in zip(shares, theirs, strict=True))
    before = _shares(XL)[1]
    attention = f"{before:.2f}% to {shares[1]:.2f}%"
    both = judge(before, "7") == judge(shares[1], "55") == "right"
    return [
        _number("gpt2-xl at 16,384 tokens", long, f"{long:,}", "149.8", "150", 1e12, "T",
                "but B starts from 4.51B, for 4.51T"),
        _number("times the FLOPs at 1,024", ratio, f"{ratio:.2f}x", "33.2", "", suffix="x", note="for 16 times the tokens"),
        Row("attention, share at 1,024 and at 16,384", attention, "7% to 55%", "-", f"A is {'right' if both else 'wrong'}"),
        Row(
            "projections / attention / feed-forward / head",
            " / ".join(f"{share:.2f}" for share in shares) + "%",
            "-",
            " / ".join(theirs) + "%",
            f"B is {'right' if right else 'wrong'}",
        ),
    ]  # fmt: skip


def _adamw() -> list[Row]:
    fixed, each = handout_memory(XL, 0), handout_memory(XL, 1) - handout_memory(XL, 0)
    in_gb, in_gib = ((size - fixed) // each for size in (80 * GB, 80 * GIB))
    # Without targets (8 bytes a token): the measured model used its tokens as targets.
    peaks = [training_memory(XL, size, policy=HANDOUT).peak - 8 * size * XL.context_length for size in (1, 3)]
    fits = [largest_batch(XL, size, policy=HANDOUT) for size in (80 * GB, 80 * GIB)]
    peak = GPUS["NVIDIA A100-SXM4-80GB"].fp32
    days = training_plan(XL, 400_000 * 1024 * XL.context_length, peak * 1e12, mfu=0.5).days
    unanswered = (BLANK, BLANK, "neither answers")
    return [
        Row("parameters, P", "2VD + L(16D^2 + 2D) + D with d_ff = 4D", *unanswered),
        Row("bytes, all float32", "4P parameters, 4P gradients, 8P state", *unanswered),
        Row("bytes of activations, the handout's list", "4B[L(16TD + 2HT^2) + TD + 2TV]", *unanswered),
        Row("gpt2-xl, bytes", f"{each:,} x batch + {fixed:,}", *unanswered),
        Row("largest batch in 80 GB (80e9)", f"{in_gb}", *unanswered),
        Row("largest batch in 80 GiB", f"{in_gib}", *unanswered),
        Row(
            "actual peak memory, batch 1 and 3",
            f"{peaks[0]:,} and {peaks[1]:,} bytes (eager ops, naive attention, targets not counted)",
            *unanswered,
        ),
        Row("largest batch that actually fits, 80 GB and 80 GiB", f"{fits[0]} and {fits[1]}", *unanswered),
        Row("FLOPs of a step", f"14P = {adamw_flops(XL):,}", *unanswered),
        Row(f"400,000 steps of 1,024 at 50% of {peak} TFLOP/s", f"{days:,.1f} days", *unanswered),
    ]


def toy_losses(lr: float, seeds: int = 200, steps: int = 10) -> Tensor:
    """Return the loss that the last of `steps` steps prints, for each seed (seeds).

    The weights are 5 randn(10, 10) and the loss is mean(w^2), so the gradient is 2w / 100. Step t = 0, 1, ... has the learning
    rate lr / sqrt(t + 1).
    """
    draws = [torch.randn(10, 10, generator=torch.Generator().manual_seed(seed)) for seed in range(seeds)]
    weights = 5 * torch.stack(draws)
    # The last step prints its loss before the update.
    for t in range(steps - 1):
        weights = weights - lr / math.sqrt(t + 1) * (0.02 * weights)
    return weights.square().mean(dim=(1, 2))


def _learning_rates() -> list[Row]:
    rows = []
    for lr, a, b in ((1e1, "falls slowly", "4.01"), (1e2, "diverges", "1.83e-23"), (1e3, "diverges", "2.49e18")):
        losses, start = toy_losses(lr), toy_losses(lr, steps=1).median().item()
        low, middle, high = losses.min().item(), losses.median().item(), losses.max().item()
        way = "diverges" if middle > start else "falls slowly" if middle > start / 100 else "falls fastest"
        shown = f"{low:.2f} to {high:.2f}, median {middle:.2f}" if lr == 1e1 else f"about {middle:.0e}"
        verdict = f"A is {'right' if a == way else 'wrong'}; B is {'right' if low <= float(b) <= high else 'wrong'}"
        rows.append(Row(f"lr {lr:.0f}: the 10th loss, from about 25", f"{way}: {shown}", a, b, verdict))
    return rows


def _tokenizers() -> list[Row]:
    pile = 825 * GB

    def hours(bytes_per_second: float) -> float:
        return pile / bytes_per_second / 3600

    word, largest = " accomplishment", 2**16 - 1
    a_hours, b_hours, b_long = hours(3000), hours(2.459e6), hours(2.028e6)
    units = "it counts a GB as 1,024 MB"
    return [
        _number("the Pile, 825 GB, at 3,000 bytes/s", a_hours, f"{a_hours:,.1f} hours", "76,388", "", suffix=" hours"),
        _number("the Pile at 2.459 MB/s", b_hours, f"{b_hours:.1f} hours", "", "95.4", suffix=" hours", note=units),
        _number("the Pile at 2.028 MB/s", b_long, f"{b_long:.1f} hours", "", "115.7", suffix=" hours", note=units),
        Row("why uint16", f"2 bytes hold ids to {largest:,}: 10,000, 32,000 or {XL.vocab_size:,} tokens; 1 byte ends at 255",
            "10,000 < 65,535", "10K and 32K < 65,535", "both are right" if max(32_000, XL.vocab_size) <= largest else "wrong"),
        Row("bytes of the longest TinyStories token", f"`{word!r}` {len(word)}, `{word.strip()!r}` {len(word.strip())}",
            "'accomplishment', 15 bytes", "' accomplishment'", "B is right; A's 15 bytes include a space that it omits"),
    ]  # fmt: skip


SECTIONS = {
    "Unicode": _unicode,
    "Parameters of gpt2-xl": _parameters,
    "FLOPs of a forward pass of gpt2-xl, 1,024 tokens": _flops,
    "Four sizes": _models,
    "A context of 16,384": _long_context,
    "Training with AdamW": _adamw,
    "The learning-rate toy (200 seeds)": _learning_rates,
    "Tokenizers": _tokenizers,
}
INTRODUCTION = """\
# Computed questions of CS336 assignment 1

`python -m tilewright.bench.writeups` writes this page. `tilewright.model.accounting`, or the Python expression in the question,
computes our values. Write-up A and write-up B are two published answers; the page checks their numbers to as many digits as
they have. FLOPs count matrix products, with untied embeddings, three feed-forward matrices of d_ff = 4 d_model, attention in
full and a vocabulary of 50,257; `tilewright account gpt2-xl` prints the rest. Measured times, memory and bytes per token are
not included.
"""


def render() -> str:
    """Return the page."""
    lines = [INTRODUCTION]
    for title, rows in SECTIONS.items():
        lines += [f"## {title}", "", "| question | ours | write-up A | write-up B | who is right |", "|---|---|---|---|---|"]
        for row in rows():
            cells = (cell.replace("|", "\\|") for cell in (row.question, row.ours, row.a, row.b, row.verdict))
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main(page: Path = PAGE) -> None:
    """Write the page."""
    page.parent.mkdir(exist_ok=True)
    write_text(page, render())


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"tilewright: error: {error}")
