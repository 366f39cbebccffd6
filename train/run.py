"""A finished run, opened again: its model and tokenizer."""

from pathlib import Path

from ..model import TransformerLM
from ..tokenizer import AnyTokenizer, read_tokenizer
from .checkpoint.layout import load_weights
from .config import load_config
from .device import resolve_device
from .folder import CONFIG_FILE, TOKENIZER_FILE, find_newest_valid


def load_run(run: Path, device: str = "auto") -> tuple[TransformerLM, AnyTokenizer]:
    """Return the model of the run's newest valid checkpoint, with the mean of its weights where it keeps one, and tokenizer."""
    config = load_config(run / CONFIG_FILE)
    part = "model" if config.ema_decay is None else "ema"
    checkpoint = find_newest_valid(run, [part])
    model = TransformerLM(config.model).to(resolve_device(device))
    load_weights(checkpoint, model, part)
    return model.eval(), read_tokenizer(run / TOKENIZER_FILE)
