import math

import pytest
import torch

from tilewright.tokenizer import Tokenizer
from tilewright.train import train
from tilewright.train.bits_per_byte import bits_per_byte, bytes_per_token, token_sizes
from tilewright.train.data.datasets import open_dataset
from tilewright.train.data.sampling import TrainingData
from tilewright.train.data.validation import ValidationData
from tilewright.train.metrics import read_metrics


def test_token_sizes_are_bytes_of_text():
    vocab = {byte: bytes([byte]) for byte in range(256)} | {256: b"ab", 258: b"abab"}
    sizes = token_sizes(Tokenizer(vocab, [(b"a", b"b"), (b"ab", b"ab")], ["<|endoftext|>"]))
    # 257 is not a token, and 259 is the end-of-text token.
    assert sizes.tolist() == [1] * 256 + [2, 0, 4, 0]


def test_bytes_per_token_ignores_unscored_targets():
    sizes = torch.tensor([1, 4, 0])
    inputs = torch.zeros(2, 3, dtype=torch.long)
    batches = [(inputs, torch.tensor([[0, 1, 2], [-100, 1, -100]])), (inputs[:1], torch.tensor([[0, 0, 0]]))]
    assert bytes_per_token(batches, sizes) == 12 / 7
    assert bytes_per_token([], sizes) == 0.0


def test_bits_per_byte_converts_nats_to_bits():
    assert bits_per_byte(6 * math.log(2), 2) == 3.0
    assert math.isnan(bits_per_byte(1.0, 0))


def test_run_logs_bits_per_byte(changed):
    config = changed(steps=4)
    tokenizer = Tokenizer.load(config.data.tokenizer)
    result = train(config)
    num_bytes = num_tokens = 0
    valid = open_dataset(config.data.valid, tokenizer)
    for _, targets in ValidationData(valid, config.eval_sequences, config.model.context_length).batches(4):
        text = tokenizer.decode(targets.flatten().tolist(), skip_special_tokens=True)
        num_bytes, num_tokens = num_bytes + len(text), num_tokens + targets.numel()
    expected = result.valid_loss * num_tokens / num_bytes / math.log(2)
    assert result.valid_bits_per_byte == pytest.approx(expected, rel=1e-12)
    assert read_metrics(config.out)[-1]["valid_bits_per_byte"] == result.valid_bits_per_byte
    resumed = train(config, resume="auto")
    assert resumed.valid_bits_per_byte == result.valid_bits_per_byte
    # Training losses use the bytes of the step's own text.
    data = TrainingData((open_dataset(config.data.train[0], tokenizer),), config.model.context_length, config.seed)
    rows = read_metrics(config.out)
    for step, row in enumerate(rows):
        _, targets = data.batch(range(step * 4, step * 4 + 4))
        num_bytes = len(tokenizer.decode(targets.flatten().tolist(), skip_special_tokens=True))
        assert row["bits_per_byte"] == pytest.approx(row["loss"] * targets.numel() / num_bytes / math.log(2), rel=1e-9)
    assert result.train_bits_per_byte == rows[-1]["bits_per_byte"]
