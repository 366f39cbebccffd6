"""Run each example in an empty folder and check the last line of its output."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
LAST_LINES = {
    "kernels_in_your_module": r"loss 1\.\d+, with the PyTorch reference 1\.\d+",
    "patch_hugging_face": "after revert the logits are equal",
    "pretrain_and_finetune": r"assistant: The duck says quack\.",
    "train_tokenizer": r"1,000,\d{3} bytes on disk are [\d,]+ tokens: 2\.\d+ bytes/token",
    "write_a_kernel": "squared_relu equals its float64 oracle in 8 results, forward and backward",
}


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == LAST_LINES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", LAST_LINES)
def test_example(name, tmp_path):
    if name == "write_a_kernel":
        pytest.importorskip("triton")
    if name == "patch_hugging_face":
        pytest.importorskip("transformers")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert re.fullmatch(LAST_LINES[name], result.stdout.strip().splitlines()[-1]), result.stdout[-1000:]
