"""A finished run, opened again: its model and tokenizer, ready to generate."""

from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..model import TransformerLM, generate
from ..tokenizer import END_OF_TEXT, Tokenizer
from .checkpoint.layout import load_weights
from .config import load_config
from .device import resolve_device, resolve_dtype
from .folder import CONFIG_FILE, TOKENIZER_FILE, find_newest_valid


def load_run(run: Path, device: str = "auto") -> tuple[TransformerLM, Tokenizer]:
    """Return the model of the run's newest valid checkpoint, with the mean of its weights where it keeps one, and tokenizer."""
    config = load_config(run / CONFIG_FILE)
    part = "model" if config.ema_decay is None else "ema"
    checkpoint = find_newest_valid(run, [part])
    model = TransformerLM(config.model).to(resolve_device(device))
    load_weights(checkpoint, model, part)
    return model.eval(), Tokenizer.load(run / TOKENIZER_FILE)


@dataclass(frozen=True)
class SampleConfig:
    """How to go on with a text."""

    prompt: str = "Once upon a time"
    """What the text begins with; '' begins a new document."""
    num_samples: int = 1
    """Texts to write."""
    max_new_tokens: int | None = None
    """Most tokens to add; by default to the end of the context."""
    temperature: float = 0.7
    """0 always takes the most likely token; above 1 flattens the distribution."""
    top_k: int | None = None
    """Choose among the k most likely tokens only."""
    top_p: float | None = 0.9
    """Choose among the fewest tokens that together have this probability."""
    seed: int | None = None
    """The same seed gives the same text."""

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise UserError(f"num_samples is {self.num_samples}: it must be at least 1")


def write_texts(model: TransformerLM, tokenizer: Tokenizer, config: SampleConfig) -> list[str]:
    """Return texts that begin with the prompt and go on to the end of the text, of the context, or of `max_new_tokens`."""
    stop = tokenizer.end_of_text_id
    ids = tokenizer.encode(config.prompt)
    if not ids:
        if stop is None:
            raise UserError(f"the prompt is empty and the tokenizer has no {END_OF_TEXT} to begin with: give a prompt")
        ids = [stop]
    continuations = generate(
        model,
        [ids] * config.num_samples,
        config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        stop_token=stop,
        vocab_size=tokenizer.vocab_size,
        seed=config.seed,
        dtype=resolve_dtype("auto", model.rope_cos.device),
    )
    return [config.prompt + tokenizer.decode(new) for new in continuations]
