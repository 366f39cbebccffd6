"""Every numeric option of `account`, with values at and beyond its limits, gives figures or a one-line error that names it."""

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
    """Return the report or the error. tyro prints type errors in a box; all other errors are one line."""
    try:
        status = main(["account", *arguments])
    except SystemExit:
        return None, "not parsed"
    printed, error = capsys.readouterr()
    assert (status, error) == (0, "") or (status == 2 and not printed and error.count("\n") == 1), (arguments, error)
    return json.loads(printed) if printed else None, error


@pytest.mark.parametrize("option", OPTIONS)
def test_numeric_options_give_figures_or_a_one_line_error(capsys, option):
    for number in NUMBERS:
        report, error = run(capsys, "gpt2-small", "--gpu", "h200", "--json", f"--{option.replace('_', '-')}={number}")
        if report is None:
            assert error == "not parsed" or option.rpartition(".")[2].split("_")[0] in error, error
        else:
            assert finite(report), (option, number)
        capsys.readouterr()


@pytest.mark.parametrize("memory", ["0GB", "1e3GB", "-1GB", "nanGB", f"{10**30}GB", f"{'9' * 400}TB", "0.0000001MB"])
def test_invalid_memory_sizes_give_a_one_line_error(capsys, memory):
    _, error = run(capsys, "gpt2-small", "--batch-size", "auto", f"--memory={memory}")
    assert "memory" in error


@pytest.mark.parametrize("option", ["--tokens", "--tokens-per-second", "--price-per-gpu-hour"])
def test_options_that_need_a_gpu_are_rejected_without_one(capsys, option):
    _, error = run(capsys, "gpt2-small", option, "2")
    assert "needs the peak of a GPU: name one with --gpu" in error
