"""Load the weights of a Hugging Face folder into our model."""

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
_IMAGE_PREFIXES = ("vision_tower.", "multi_modal_projector.")


def read_model(folder: Path, dtype: torch.dtype = torch.float32) -> TransformerLM:
    """Return the model in a folder, on the CPU, with its matrices in `dtype`; see `load_weights`."""
    folder = Path(folder)
    config = read_config(folder)
    with torch.device("meta"):
        model = TransformerLM(config)
    # Vectors stay in float32, as in `TransformerLM.cast`. Start from zeros, which the rows that pad the vocabulary keep.
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
    """Copy the weights of a folder into a model of the same shape, one tensor at a time.

    Weights are float32, bfloat16 or float16, in `model.safetensors` or in shards with an index. Pickles are refused. A tensor
    that is missing, unknown, or of another shape or dtype is a `UserError` that names it, raised before any weight changes.
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
            for stored in opened.keys():  # noqa: SIM118 (not a mapping)
                name = _name(stored, images)
                if name is None:
                    continue
                if name == _HEAD and tied:
                    tied_head = True
                    continue
                if name not in views:
                    raise UserError(f"{folder} has a tensor {stored}, which is not supported")
                part, allowed = opened.get_slice(stored), views[name].shape
                dtype, shape = part.get_dtype(), tuple(part.get_shape())
                if shape != allowed or dtype not in _DTYPES:
                    found = f"{_DTYPES.get(dtype, dtype)} {shape}"
                    raise UserError(f"{folder} has {stored} as {found}: expected float32, bfloat16 or float16 {allowed}")
                missing.discard(name)
    if missing:
        raise UserError(f"{folder} lacks the tensor {min(missing)}: download it again")
    # Some files also contain the head of tied embeddings.
    found = dict(_tensors(files, images, (_EMBEDDING, _HEAD))) if tied_head else {}
    if tied_head and not torch.equal(found[_HEAD], found[_EMBEDDING]):
        raise UserError(f"{folder} has tie_word_embeddings true, but its lm_head.weight differs from the embedding")


def _name(stored: str, images: bool) -> str | None:
    # Return the name in the language model alone; None for tensors that it does not need.
    if images:
        if stored.removeprefix("model.").startswith(_IMAGE_PREFIXES):
            return None
        return stored.replace("language_model.", "", 1)
    # Old files contain the RoPE frequencies, which follow from the configuration.
    return None if stored.endswith("rotary_emb.inv_freq") else stored


def _opened(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {file}: {error}; download it again") from error


def _tensors(files: Iterable[Path], images: bool, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    # Yield only `names`, if given.
    for file in files:
        with _opened(file) as opened:
            for stored in opened.keys():  # noqa: SIM118 (not a mapping)
                name = _name(stored, images)
                if name is not None and (names is None or name in names):
                    yield name, opened.get_tensor(stored)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS_FILE).exists():
        return [folder / WEIGHTS_FILE]
    if (folder / INDEX_FILE).exists():
        names = read_document(folder / INDEX_FILE, "the index of the weights").values.get("weight_map")
        # Accept bare file names only, so that an index cannot point outside its folder.
        if not isinstance(names, dict) or not all(isinstance(name, str) and Path(name).name == name for name in names.values()):
            raise UserError(f"{folder / INDEX_FILE} has no weight_map of tensors to files in the same folder")
        return [require_file(folder / name, "weights", "download it again") for name in sorted(set(names.values()))]
    pickles = sorted(folder.glob("*.bin"))
    if pickles:
        raise UserError(
            f"{folder} has its weights only in {pickles[0].name}, a pickle that can run any code: convert it to safetensors "
            "with transformers, AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW)"
        )
    raise UserError(f"{folder} has no weights: expected {WEIGHTS_FILE} or {INDEX_FILE}")
