"""Weights of a folder, into a model of ours."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from ...errors import UserError
from ...files import require_file
from ..transformer import TransformerLM
from .config import has_images, read_config
from .document import read_document
from .tensors import TensorView, tensor_views

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_OF_IMAGES = ("vision_tower.", "multi_modal_projector.")


def read_model(folder: Path, dtype: torch.dtype = torch.float32) -> TransformerLM:
    """Return the model in a folder, on the CPU, its matrices in `dtype`; see `load_weights`."""
    folder = Path(folder)
    config = read_config(folder)
    with torch.device("meta"):
        model = TransformerLM(config)
    # Vectors stay in float32, as in `TransformerLM.cast`. Zeros, for the rows that pad the vocabulary.
    weights = {
        name: torch.zeros(weight.shape, dtype=dtype if weight.dim() > 1 else torch.float32)
        for name, weight in model.state_dict().items()
    }
    model.load_state_dict(weights, assign=True)
    model.make_tables()
    load_weights(model, folder)
    return model.eval()


@torch.no_grad()
def load_weights(model: TransformerLM, folder: Path) -> None:
    """Copy the weights of a folder into a model of its shape, one tensor at a time.

    They are float32, bfloat16 or float16, in `model.safetensors` or in shards with their index; never pickles. What is missing,
    of another shape or dtype, or unknown is a `UserError` that names it, before any weight is changed.
    """
    views = tensor_views(model.config, model.get_parameter, model.config.vocab_size)
    files = _weight_files(folder)
    images = has_images(folder)
    _check(folder, files, images, views, model.config.tie_embeddings)
    with tqdm(total=len(views), desc=f"reading {folder.name}", unit="tensor", leave=False, disable=None) as bar:
        for name, tensor in _tensors(files, images):
            if name in views:
                view = views[name].view
                view.copy_(tensor.reshape(view.shape))
                bar.update()


def _check(folder: Path, files: Iterable[Path], images: bool, views: dict[str, TensorView], tied: bool) -> None:
    missing = set(views)
    tied_head = False
    for file in files:
        with _opened(file) as opened:
            for stored in opened.keys():  # noqa: SIM118 (it is no mapping)
                name = _name(stored, images)
                if name is None:
                    continue
                if name == _HEAD and tied:
                    tied_head = True
                    continue
                if name not in views:
                    raise UserError(f"{folder} has a tensor {stored}, which our blocks lack")
                part, allowed = opened.get_slice(stored), views[name].shape
                dtype, shape = part.get_dtype(), tuple(part.get_shape())
                if shape != allowed or dtype not in _DTYPES:
                    found = f"{_DTYPES.get(dtype, dtype)} {shape}"
                    raise UserError(f"{folder} has {stored} as {found}: it must be float32, bfloat16 or float16 {allowed}")
                missing.discard(name)
    if missing:
        raise UserError(f"{folder} lacks the tensor {min(missing)}: download it anew")
    # Some files hold the head of tied embeddings too.
    found = dict(_tensors(files, images, (_EMBEDDING, _HEAD))) if tied_head else {}
    if tied_head and not torch.equal(found[_HEAD], found[_EMBEDDING]):
        raise UserError(f"{folder} has tie_word_embeddings true and an lm_head.weight of its own: they must be equal")


def _name(stored: str, images: bool) -> str | None:
    # The name in a language model that stands alone; None for what is not needed of it.
    if images:
        if stored.removeprefix("model.").startswith(_OF_IMAGES):
            return None
        return stored.replace("language_model.", "", 1)
    # Old files hold the frequencies of RoPE, which follow from the configuration.
    return None if stored.endswith("rotary_emb.inv_freq") else stored


def _opened(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({error}): download it anew") from error


def _tensors(files: Iterable[Path], images: bool, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    # Only those of `names`, where they are given.
    for file in files:
        with _opened(file) as opened:
            for stored in opened.keys():  # noqa: SIM118 (it is no mapping)
                name = _name(stored, images)
                if name is not None and (names is None or name in names):
                    yield name, opened.get_tensor(stored)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS_FILE).exists():
        return [folder / WEIGHTS_FILE]
    if (folder / INDEX_FILE).exists():
        names = read_document(folder / INDEX_FILE, "the index of the weights").values.get("weight_map")
        # Only names, so that an index cannot point out of its folder.
        if not isinstance(names, dict) or not all(isinstance(name, str) and Path(name).name == name for name in names.values()):
            raise UserError(f"{folder / INDEX_FILE} has no weight_map of tensors to files beside it")
        return [require_file(folder / name, "weights", "download it anew") for name in sorted(set(names.values()))]
    pickles = sorted(folder.glob("*.bin"))
    if pickles:
        raise UserError(
            f"{folder} has its weights in {pickles[0].name} only, a pickle that could run any code: write safetensors with "
            "transformers, AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW)"
        )
    raise UserError(f"{folder} holds no weights: {WEIGHTS_FILE} or {INDEX_FILE} is needed")
