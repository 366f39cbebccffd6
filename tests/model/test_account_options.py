"""Every numeric option of `account`, with values at and beyond its ends: figures, or one line that names it."""

import json
import math

import pytest

from tilewright.cli import main

NUMBERS = ("0", "-1", "1", "1e-320", "1e-3", "1e30", "1e308", "nan", "inf", "-inf", str(10**17), str(10**18), str(10**30))
OPTIONS = (
    "context_length",
    "batch_size",
    "num_gpus",
    "mfu",
    "tokens_per_second",
    "tokens",
    "price_per_gpu_hour",
    "vocab_multiple",
    "policy.window",
    "policy.logit_chunk_bytes",
    "policy.checkpointing",
)


def finite(value):
    if isinstance(value, dict | list):
        return all(map(finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def run(capsys, *arguments):
    """Return the report, or the error: that of a type is tyro's, in a box, all others are one line."""
    try:
        status = main(["account", *arguments])
    except SystemExit:
        return None, "not parsed"
    printed, error = capsys.readouterr()
    assert (status, error) == (0, "") or (status == 2 and not printed and error.count("\n") == 1), (arguments, error)
    return json.loads(printed) if printed else None, error


@pytest.mark.parametrize("option", OPTIONS)
def test_a_number_gives_figures_or_one_line(capsys, option):
    for number in NUMBERS:
        report, error = run(capsys, "gpt2-small", "--gpu", "h200", "--json", f"--{option.replace('_', '-')}={number}")
        if report is None:
            assert error == "not parsed" or option.rpartition(".")[2].split("_")[0] in error, error
        else:
            assert finite(report), (option, number)
        capsys.readouterr()


@pytest.mark.parametrize("memory", ["0GB", "1e3GB", "-1GB", "nanGB", f"{10**30}GB", f"{'9' * 400}TB", "0.0000001MB"])
def test_a_memory_that_no_gpu_has_is_one_line(capsys, memory):
    _, error = run(capsys, "gpt2-small", "--batch-size", "auto", f"--memory={memory}")
    assert "memory" in error


@pytest.mark.parametrize("option", ["--tokens", "--tokens-per-second", "--price-per-gpu-hour"])
def test_what_needs_a_gpu_is_refused_without(capsys, option):
    _, error = run(capsys, "gpt2-small", option, "2")
    assert "is given without a GPU, whose peak the time needs: name one with --gpu" in error
