"""Write our model as a folder that `transformers` reads."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ...files import atomic_folder, require_absent
from ..transformer import TransformerLM
from .config import CONFIG_FILE, config_document, dumped
from .families import choose_family
from .read import INDEX_FILE, WEIGHTS_FILE
from .tensors import TensorView, tensor_views

GENERATION_FILE = "generation_config.json"
"""Name of the generation settings in a folder: `generation_config.json`."""
SHARD_BYTES = 5_000_000_000
"""Most bytes of weights in a file; a single larger tensor gets its own file."""
Dtype = Literal["float32", "bfloat16"]


def write_model(
    model: TransformerLM,
    folder: Path,
    *,
    dtype: Dtype = "float32",
    family: str | None = None,
    vocab_size: int | None = None,
    begin_token: int | None = None,
    end_tokens: Sequence[int] = (),
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `model` into an existing folder.

    The family is `family` if it supports the model's shape, else the first that does; see `choose_family`. `vocab_size` drops
    the tokens from that ID on, such as those that a tokenizer does not have. `begin_token` starts a text, and each of
    `end_tokens` ends one. Weights of more than `shard_bytes` are split into several files with an index. A model that no
    family supports is a `UserError`.
    """
    size = model.config.vocab_size if vocab_size is None else vocab_size
    if not 1 <= size <= model.config.vocab_size:
        raise ValueError(f"vocab_size is {size}: expected from 1 to the model's, {model.config.vocab_size}")
    config = dataclasses.replace(model.config, vocab_size=size)
    ends = list(end_tokens) if len(end_tokens) > 1 else next(iter(end_tokens), None)
    tokens = {"bos_token_id": begin_token, "eos_token_id": ends}
    # transformers does not train the row of a padding token, so only the generation config has one.
    document = config_document(config, choose_family(config, family)) | tokens | {"pad_token_id": None, "torch_dtype": dtype}
    generation = tokens | {"pad_token_id": next(iter(end_tokens), None)}
    (folder / CONFIG_FILE).write_text(dumped(document))
    (folder / GENERATION_FILE).write_text(dumped(generation))
    _write_weights(folder, tensor_views(model.config, model.get_parameter, size), getattr(torch, dtype), shard_bytes)


def save_model(
    model: TransformerLM,
    folder: Path,
    dtype: Dtype = "float32",
    family: str | None = None,
    begin_token: int | None = None,
    end_tokens: Sequence[int] = (),
) -> None:
    """Write `model` as a new folder, atomically; see `write_model`."""
    choose_family(model.config, family)
    with atomic_folder(require_absent(folder, "remove it or name another folder")) as temporary:
        write_model(model, temporary, dtype=dtype, family=family, begin_token=begin_token, end_tokens=end_tokens)


def _write_weights(folder: Path, views: Mapping[str, TensorView], dtype: torch.dtype, shard_bytes: int) -> None:
    sizes = {name: math.prod(view.shape) * dtype.itemsize for name, view in views.items()}
    shards = list(_shards(sizes, shard_bytes))
    files: dict[str, str] = {}
    with tqdm(total=len(views), desc="writing weights", unit="tensor", leave=False, disable=None) as bar:
        for number, names in enumerate(shards, 1):
            file = WEIGHTS_FILE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            # Copy one shard at a time, to bound memory.
            save_file({name: _tensor(views[name], dtype) for name in names}, folder / file, metadata={"format": "pt"})
            files |= dict.fromkeys(names, file)
            bar.update(len(names))
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files}
        (folder / INDEX_FILE).write_text(dumped(index))


def _tensor(view: TensorView, dtype: torch.dtype) -> Tensor:
    return view.theirs().detach().to("cpu", dtype).contiguous()


def _shards(sizes: Mapping[str, int], most: int) -> Iterator[list[str]]:
    # Fill shards with names in order, each up to `most` bytes.
    shard: list[str] = []
    total = 0
    for name, size in sizes.items():
        if shard and total + size > most:
            yield shard
            shard, total = [], 0
        shard.append(name)
        total += size
    yield shard
