"""A finished run, opened again: its model and tokenizer, ready to generate."""

from pathlib import Path

import torch

from ..errors import UserError
from ..model import TransformerLM, generate
from ..tokenizer import END_OF_TEXT, Tokenizer
from .checkpoint import list_checkpoints, load_weights
from .config import load_config
from .loop import CONFIG_FILE, TOKENIZER_FILE, resolve_device


def load_run(run: Path, device: str = "auto") -> tuple[TransformerLM, Tokenizer]:
    """Return the model of the run's newest checkpoint, and its tokenizer."""
    config = load_config(run / CONFIG_FILE)
    checkpoints = list_checkpoints(run)
    if not checkpoints:
        raise UserError(f"{run} has no checkpoint yet: train it to its first one")
    model = TransformerLM(config.model).to(resolve_device(device))
    load_weights(checkpoints[-1], model)
    return model.eval(), Tokenizer.load(run / TOKENIZER_FILE)


def write_story(
    model: TransformerLM,
    tokenizer: Tokenizer,
    prompt: str,
    num_samples: int = 1,
    max_new_tokens: int | None = None,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = 0.95,
    seed: int | None = None,
) -> list[str]:
    """Continue `prompt` up to the end of the text, of the context, or of `max_new_tokens`; return prompt and continuation.

    An empty prompt begins a new document.
    """
    stop = tokenizer.end_of_text_id
    ids = tokenizer.encode(prompt)
    if not ids:
        if stop is None:
            raise UserError(f"the prompt is empty and the tokenizer has no {END_OF_TEXT} to begin with: give a prompt")
        ids = [stop]
    with torch.autocast(model.rope_cos.device.type, torch.bfloat16, enabled=model.rope_cos.is_cuda):
        continuations = generate(
            model,
            [ids] * num_samples,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop_token=stop,
            seed=seed,
        )
    return [prompt + tokenizer.decode(new) for new in continuations]
