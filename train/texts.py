"""Generate text from prompts, streamed or complete, with stop strings and end tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UserError
from ..model import BatchEngine, Generation, Sampling
from ..tokenizer import END_OF_TEXT
from .device import resolve_dtype
from .pretrained import TextModel


def make_engine(text_model: TextModel, num_slots: int, max_length: int | None = None) -> BatchEngine:
    """Return an engine that samples only ids of the tokenizer, in the device's preferred dtype."""
    model = text_model.model
    dtype = resolve_dtype("auto", model.rope_cos.device)
    return BatchEngine(model, num_slots, max_length, vocab_size=text_model.tokenizer.vocab_size, dtype=dtype)


def encode_prompt(text_model: TextModel, prompt: str, parse_special: bool = True) -> list[int]:
    """Return the ids of a prompt, preceded by the begin tokens; '' starts a new document.

    Without `parse_special`, names of special tokens in the prompt are encoded as plain text.
    """
    tokenizer = text_model.tokenizer
    ids = tokenizer.encode(prompt) if parse_special else encode_literally(text_model, prompt)
    begin = list(text_model.begin_tokens)
    if begin and ids[: len(begin)] != begin:
        ids = begin + ids
    if not ids:
        if not text_model.end_tokens:
            raise UserError(f"the prompt is empty and the tokenizer has no {END_OF_TEXT} to start from: give a prompt")
        ids = [text_model.end_tokens[0]]
    return ids


def encode_literally(text_model: TextModel, text: str) -> list[int]:
    """Return the ids of a text; names of special tokens are encoded as plain text."""
    return text_model.tokenizer.encode(text, allowed_special=(), disallowed_special=())


class TextStream:
    """Decodes a generation incrementally, up to the first of the `stop` strings.

    Text that may be the start of a stop string, and incomplete UTF-8 sequences, are held back.
    """

    def __init__(
        self, text_model: TextModel, prompt: Sequence[int], stop: Sequence[str] = (), skip_special_tokens: bool = False
    ) -> None:
        self._decoder = text_model.tokenizer.stream_decoder(skip_special_tokens=skip_special_tokens)
        # Some tokenizers drop a space at the start of a text. Decode the prompt first, so that the generation keeps its space.
        self._decoder.decode(prompt)
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False
        """Whether a stop string was found."""

    def add(self, tokens: Sequence[int]) -> str:
        """Return the text that the new tokens complete."""
        return self._cut(self._decoder.decode(tokens), final=False)

    def finish(self) -> str:
        """Return the rest of the text, after the last token."""
        return self._cut(self._decoder.finish(), final=True)

    def _cut(self, text: str, final: bool) -> str:
        if self.stopped:
            return ""
        held = self._held + text
        places = [place for stop in self._stop if (place := held.find(stop)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return held[: min(places)]
        # Hold back the longest suffix of the text that is a prefix of a stop string.
        longest = max(map(len, self._stop), default=0)
        starts = range(max(0, len(held) - longest + 1), len(held))
        keep = next((i for i in starts if any(stop.startswith(held[i:]) for stop in self._stop)), len(held))
        if final:
            keep = len(held)
        self._held = held[keep:]
        return held[:keep]


@dataclass(frozen=True)
class Text:
    """A generated continuation of a prompt."""

    prompt: str
    text: str
    """Generated text, without the prompt."""
    num_tokens: int
    """Number of generated tokens."""
    finish_reason: str
    """stop: an end token or a stop string; length: `max_new_tokens` or the end of the context."""


def continue_texts(
    text_model: TextModel,
    prompts: Sequence[str],
    max_new_tokens: int | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    *,
    num_samples: int = 1,
    stop: Sequence[str] = (),
    seed: int | None = None,
    crop: bool = False,
    num_slots: int = 16,
) -> list[Text]:
    """Continue each prompt `num_samples` times; return the texts grouped by prompt.

    Sample i of each prompt uses `seed` + i, so a text does not depend on the other prompts and samples. At most `num_slots`
    texts are generated at a time.
    """
    if not prompts or num_samples < 1:
        return []
    context_length = text_model.model.config.context_length
    encoded = [encode_prompt(text_model, prompt) for prompt in prompts]
    longest = max(map(len, encoded)) + (context_length if max_new_tokens is None else max(1, max_new_tokens))
    num_slots = min(num_slots, len(prompts) * num_samples)
    engine = make_engine(text_model, num_slots, min(longest, context_length))
    writing: dict[Generation, _Writing] = {}
    for prompt, ids in zip(prompts, encoded, strict=True):
        for sample in range(num_samples):
            own_seed = None if seed is None else seed + sample
            generation = Generation(ids, max_new_tokens, sampling, text_model.end_tokens, own_seed)
            engine.add(generation, crop)
            writing[generation] = _Writing(prompt, TextStream(text_model, generation.prompt, stop))
    while engine.num_waiting or engine.num_running:
        for generation in engine.step():
            if writing[generation].read(generation):
                engine.cancel(generation, "stop")
    return [written.text(generation) for generation, written in writing.items()]


class _Writing:
    """A text during its generation."""

    def __init__(self, prompt: str, stream: TextStream) -> None:
        self.prompt, self.stream = prompt, stream
        self.pieces: list[str] = []
        self.num_read = 0

    def read(self, generation: Generation) -> bool:
        """Decode the new tokens; return whether a stop string was found."""
        self.pieces.append(self.stream.add(generation.tokens[self.num_read :]))
        self.num_read = len(generation.tokens)
        if generation.finish_reason is not None:
            self.pieces.append(self.stream.finish())
        return self.stream.stopped

    def text(self, generation: Generation) -> Text:
        reason = "stop" if self.stream.stopped else str(generation.finish_reason)
        return Text(self.prompt, "".join(self.pieces), len(generation.tokens), reason)
