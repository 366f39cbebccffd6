"""Models as folders in Hugging Face's manner: `config.json` and safetensors, which `transformers` and most servers read."""

from .config import CONFIG_FILE, family_of_folder, read_config
from .families import FAMILIES, canonical, choose_family
from .read import load_weights, read_model
from .tensors import tensor_views
from .write import GENERATION_FILE, save_model, write_model

__all__ = [
    "CONFIG_FILE",
    "FAMILIES",
    "GENERATION_FILE",
    "canonical",
    "choose_family",
    "family_of_folder",
    "load_weights",
    "read_config",
    "read_model",
    "save_model",
    "tensor_views",
    "write_model",
]
