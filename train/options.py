"""Options of the commands that generate text, and of the demo. This module imports no torch, so that help appears at once."""

import json
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..files import read_text
from ..model.sampling import Sampling, check_seed


@dataclass(frozen=True, kw_only=True)
class DrawConfig:
    """Sampling options."""

    temperature: float = 0.7
    """Sampling temperature; 0 always selects the most likely token."""
    top_k: int | None = None
    """Sample only from the k most likely tokens."""
    top_p: float | None = 0.9
    """Sample only from the smallest set of tokens whose total probability is at least this."""
    min_p: float | None = None
    """Sample only from tokens with at least this fraction of the greatest probability."""
    repetition_penalty: float = 1.0
    """Penalty for tokens that the prompt or the text already contains; 1 is none (Keskar et al. 2019)."""
    seed: int | None = None
    """Random seed; sample i of a prompt uses seed + i."""

    def __post_init__(self) -> None:
        # Check the options before a model is loaded.
        _ = self.sampling
        check_seed(self.seed)

    @property
    def sampling(self) -> Sampling:
        """The options as `Sampling`."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)


@dataclass(frozen=True)
class SampleConfig(DrawConfig):
    """Options of text generation."""

    prompt: tuple[str, ...] = ("Once upon a time",)
    """Prompts to continue; '' starts a new document."""
    prompts_file: Path | None = None
    """File with prompts, which replaces --prompt: one prompt per line, or a .jsonl file of objects with "prompt"."""
    num_samples: int = 1
    """Number of texts for each prompt."""
    max_new_tokens: int | None = None
    """Maximum number of new tokens; by default, generate to the end of the context."""
    stop: tuple[str, ...] = ()
    """Strings before which a text ends."""
    tokenizer: Path | None = None
    """File of the tokenizer; default: tokenizer.json in the model's folder."""
    crop: bool = False
    """Truncate prompts that are too long on the left; by default they are an error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_samples < 1:
            raise UserError(f"num_samples is {self.num_samples}: expected at least 1")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}: expected at least 1")
        if "" in self.stop:
            raise UserError("a stop string is empty: expected at least one character")
        # Check the prompts before a model is loaded.
        prompts = self.read_prompts()
        if not prompts:
            raise UserError("there is no prompt: expected at least one, '' to start a new document")
        for prompt in prompts:
            try:
                prompt.encode()
            except UnicodeEncodeError:
                # A lone surrogate, from JSON or from a terminal that does not use UTF-8.
                raise UserError(f"the prompt {prompt!a:.60} is not valid Unicode: expected UTF-8") from None

    def read_prompts(self) -> list[str]:
        """Return the prompts of `prompts_file` if it is set, else `prompt`."""
        return list(self.prompt) if self.prompts_file is None else read_prompts(self.prompts_file)


def read_prompts(path: Path) -> list[str]:
    """Return the prompts in a file: its non-blank lines, or the "prompt" of each object in a .jsonl file."""
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
            raise UserError(f'{path}, line {number} is {line:.60}: expected a JSON object with a string "prompt"')
        prompts.append(prompt)
    return prompts


@dataclass(frozen=True)
class ChatConfig(DrawConfig):
    """Options of a chat."""

    system: str | None = None
    """System prompt."""
    template: Path | None = None
    """File with a chat template; by default, the folder's own."""
    max_new_tokens: int | None = None
    """Maximum number of tokens of an answer; by default 512, or half of max_length if that is less."""
    max_length: int | None = None
    """Maximum number of tokens of the conversation including the next answer; by default the context, at most 4,096."""
    device: str = "auto"
    """cuda, cpu, or auto."""
    tokenizer: Path | None = None
    """File of the tokenizer; default: tokenizer.json in the model's folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_new_tokens", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}: expected at least 1")


@dataclass(frozen=True)
class DemoConfig:
    """Options of the demo. With the defaults it takes two to four minutes on two CPU cores."""

    out: Path | None = None
    """New folder for the demo; by default runs/demo, or the first of runs/demo-2, runs/demo-3, ... that does not exist."""
    megabytes: float = 12.0
    """Size of the training corpus in MB."""
    vocab_size: int = 2048
    """Vocabulary size of the tokenizer."""
    steps: int = 800
    """Number of optimizer steps."""
    prompt: str = "Once upon a time"
    """Prompt of the samples, during and after training."""
    seed: int = 0
    """Random seed of the corpus, the weights, the batches and the sample."""

    def __post_init__(self) -> None:
        if self.vocab_size < 257:
            raise UserError(f"vocab_size is {self.vocab_size}: expected at least 257, for 256 bytes and <|endoftext|>")
