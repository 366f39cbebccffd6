"""Trainers for the bench, on random tokens, with this project's kernels or with PyTorch alone."""

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..kernels import use_backend
from ..model import ModelConfig, TransformerLM, transformer
from ..model.accounting import Policy
from ..tokenizer import END_OF_TEXT, Tokenizer, train_bpe
from ..train import TrainConfig, preset
from ..train.config import DataConfig, Precision
from ..train.data.corpus import write_stories
from ..train.data.sampling import TrainingData
from ..train.data.token_file import TokenDataset, write_tokens
from ..train.device import resolve_device
from ..train.presets import corpus_files
from ..train.trainer import Trainer

# Matches the model, whose vocabulary is padded.
OWN_POLICY = Policy(vocabulary="padded")
TORCH_POLICY = dataclasses.replace(OWN_POLICY, ops="eager", loss="whole")


@dataclasses.dataclass(frozen=True)
class Variant:
    """How to compute a step: with this project's kernels or PyTorch alone, compiled or not, as a CUDA graph or not."""

    kernels: bool
    compiled: bool
    graph: bool = False
    precision: Precision = "auto"

    @property
    def policy(self) -> Policy:
        """The accounting policy of the variant."""
        policy = OWN_POLICY if self.kernels else TORCH_POLICY
        return policy if self.precision == "auto" else dataclasses.replace(policy, compute=self.precision)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Use the variant for calls and compilation in the block; compiled code depends on the state inside the block."""
        if self.kernels:
            yield
            return
        with use_backend("reference"), patch.object(transformer, "linear_cross_entropy", _torch_loss):
            yield


VARIANTS: Mapping[str, Variant] = {
    "eager": Variant(kernels=False, compiled=False),
    "compile + kernels": Variant(kernels=True, compiled=True),
    "compile": Variant(kernels=False, compiled=True),
    "compile + kernels + graph": Variant(kernels=True, compiled=True, graph=True),
    "compile + kernels, fp8": Variant(kernels=True, compiled=True, precision="fp8"),
    "compile + kernels, fp8_rowwise": Variant(kernels=True, compiled=True, precision="fp8_rowwise"),
}

# Blocks of Llama 3 8B (Grattafiori et al. 2024, table 3). With all 32 blocks and 128,256 tokens, one GPU has no memory for a
# training step. The vocabulary is small, so that the blocks take the time.
LLAMA_BLOCKS = "llama-3-8b, 4 blocks"
_LLAMA = ModelConfig(
    8192, 8192, d_model=4096, num_layers=4, num_heads=32, num_kv_heads=8, d_ff=14_336, rope_theta=500_000.0
)  # fmt: skip


def base_config(name: str) -> TrainConfig:
    """Return a preset, or the run of `LLAMA_BLOCKS`."""
    if name == LLAMA_BLOCKS:
        return dataclasses.replace(preset("gpt2-small"), model=_LLAMA, batch_size=2, micro_batch_size=2)
    return preset(name)


def _torch_loss(x: Tensor, weight: Tensor, targets: Tensor, num_classes: int, **_: Any) -> Tensor:
    # As in a typical training script: the reference would save memory at the cost of a second product.
    logits = F.linear(x, weight.to(x.dtype))[..., :num_classes]
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction="sum")


@contextmanager
def random_trainer(config: TrainConfig) -> Iterator[Trainer]:
    """Create a trainer on random tokens, without a run folder."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.tokens"
        write_tokens(path, [np.random.default_rng(0).integers(0, config.model.vocab_size, 2**20)], config.model.vocab_size)
        data = TokenDataset(path)
        samples = TrainingData((data,), config.model.context_length, config.seed)
        # Initialize on the device: a CPU takes longer to draw billions of weights than the steps take.
        with resolve_device(config.device):
            trainer = Trainer(config, samples, data)
        try:
            yield trainer
        finally:
            trainer.close()


def write_corpus(folder: Path, megabytes: float, valid_megabytes: float, vocab_size: int) -> DataConfig:
    """Write generated stories and a tokenizer trained on them to `folder`; return the files."""
    files = corpus_files(folder)
    write_stories(files.train[0], megabytes, seed=0)
    write_stories(files.valid, valid_megabytes, seed=1)
    Tokenizer(*train_bpe(files.train[0], vocab_size, [END_OF_TEXT]), [END_OF_TEXT]).save(files.tokenizer)
    return files


def config_for(name: str, device: torch.device, batch_size: int | Literal["auto"], **changes: Any) -> TrainConfig:
    """Return a named run with one micro-batch of `batch_size` sequences per step."""
    return dataclasses.replace(base_config(name), batch_size=batch_size, micro_batch_size=None, device=str(device), **changes)


@cache
def counted_flops(model: ModelConfig) -> int:
    """Return PyTorch's count of the FLOPs of one sequence, forward and backward, on meta tensors."""
    with torch.device("meta"):
        meta = TransformerLM(model)
        tokens = torch.zeros(1, model.context_length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        meta(tokens).sum().backward()
    return counter.get_total_flops()
