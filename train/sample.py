"""The options of texts that a model is to write, and the texts themselves."""

import json
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..files import read_text
from .pretrained import TextModel
from .texts import DrawConfig, Text, continue_texts


@dataclass(frozen=True)
class SampleConfig(DrawConfig):
    """How to go on with texts."""

    prompt: tuple[str, ...] = ("Once upon a time",)
    """What each text begins with; '' begins a new document."""
    prompts_file: Path | None = None
    """A file of prompts in place of those: one a line, or JSON lines with "prompt" in a .jsonl."""
    num_samples: int = 1
    """Texts to write for each prompt."""
    max_new_tokens: int | None = None
    """Most tokens to add; by default to the end of the context."""
    stop: tuple[str, ...] = ()
    """Strings before which a text ends."""
    crop: bool = False
    """Let the beginning of a prompt go that is too long, which is an error otherwise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_samples < 1:
            raise UserError(f"num_samples is {self.num_samples}: it must be at least 1")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}: it must be at least 1")
        if "" in self.stop:
            raise UserError("a stop string is empty: it must have at least one character")
        # What is wrong with these is said before a model is loaded.
        prompts = self.read_prompts()
        if not prompts:
            raise UserError("there is no prompt: give one, '' to begin a new document")
        for prompt in prompts:
            try:
                prompt.encode()
            except UnicodeEncodeError:
                # Half a surrogate pair, from JSON or a terminal that is not in UTF-8.
                raise UserError(f"the prompt {prompt!a:.60} is not valid Unicode: write it in UTF-8") from None

    def read_prompts(self) -> list[str]:
        """Return the prompts, from the file where one is named."""
        return list(self.prompt) if self.prompts_file is None else read_prompts(self.prompts_file)


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a file: its lines without blank ones, or in a .jsonl each line's "prompt"."""
    text = read_text(path, "prompts file")
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if path.suffix != ".jsonl":
        return [line.removesuffix("\r") for _, line in lines]
    prompts = []
    for number, line in lines:
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, TypeError, LookupError, RecursionError):
            prompt = None
        if not isinstance(prompt, str):
            raise UserError(f'{path}, line {number} is {line:.60}: a JSON object with a string "prompt" is needed')
        prompts.append(prompt)
    return prompts


def write_texts(text_model: TextModel, config: SampleConfig) -> list[Text]:
    """Return texts that go on to the end of the text, of the context, to a stop string, or for `max_new_tokens`."""
    return continue_texts(
        text_model,
        config.read_prompts(),
        config.max_new_tokens,
        config.sampling,
        num_samples=config.num_samples,
        stop=config.stop,
        seed=config.seed,
        crop=config.crop,
    )
