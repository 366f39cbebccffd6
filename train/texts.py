"""Texts continued by a model: from prompts to text that ends where it should, piece by piece or whole."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UserError
from ..model import BatchEngine, Generation, Sampling
from ..model.sampling import check_seed
from ..tokenizer import END_OF_TEXT
from .device import resolve_dtype
from .pretrained import TextModel


@dataclass(frozen=True, kw_only=True)
class DrawConfig:
    """How to draw the tokens of a text."""

    temperature: float = 0.7
    """0 always takes the most likely token; above 1 flattens the distribution."""
    top_k: int | None = None
    """Choose among the k most likely tokens only."""
    top_p: float | None = 0.9
    """Choose among the fewest tokens that together have this probability."""
    min_p: float | None = None
    """Choose among tokens that have at least this share of the greatest probability."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that the text has already, prompt included, become less likely (Keskar et al. 2019)."""
    seed: int | None = None
    """The same seed gives the same texts; sample i of a prompt is drawn with seed + i."""

    def __post_init__(self) -> None:
        # What is wrong with these is said before a model is loaded.
        _ = self.sampling
        check_seed(self.seed)

    @property
    def sampling(self) -> Sampling:
        """The settings of a draw."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)


def make_engine(text_model: TextModel, num_slots: int, max_length: int | None = None) -> BatchEngine:
    """Return an engine that draws ids of the tokenizer only, in the dtype that is best for the device."""
    model = text_model.model
    dtype = resolve_dtype("auto", model.rope_cos.device)
    return BatchEngine(model, num_slots, max_length, vocab_size=text_model.tokenizer.vocab_size, dtype=dtype)


def encode_prompt(text_model: TextModel, prompt: str, parse_special: bool = True) -> list[int]:
    """Return the ids of a text to be continued, behind those that stand before every text; '' begins a new document.

    Without `parse_special` the name of a special token in the text is text like any other.
    """
    tokenizer = text_model.tokenizer
    ids = tokenizer.encode(prompt) if parse_special else encode_literally(text_model, prompt)
    begin = list(text_model.begin_tokens)
    if begin and ids[: len(begin)] != begin:
        ids = begin + ids
    if not ids:
        if not text_model.end_tokens:
            raise UserError(f"the prompt is empty and the tokenizer has no {END_OF_TEXT} to begin with: give a prompt")
        ids = [text_model.end_tokens[0]]
    return ids


def encode_literally(text_model: TextModel, text: str) -> list[int]:
    """Return the ids of a text in which nothing is a special token."""
    return text_model.tokenizer.encode(text, allowed_special=(), disallowed_special=())


class TextStream:
    """The text of a generation as its tokens come in, up to the first of the `stop` strings.

    What may be the beginning of a stop string, and bytes that are no whole character yet, are held back.
    """

    def __init__(
        self, text_model: TextModel, prompt: Sequence[int], stop: Sequence[str] = (), skip_special_tokens: bool = False
    ) -> None:
        self._decoder = text_model.tokenizer.stream_decoder(skip_special_tokens=skip_special_tokens)
        # Some tokenizers take a blank from what a text begins with: here the prompt does.
        self._decoder.decode(prompt)
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False
        """Whether a stop string was found."""

    def add(self, tokens: Sequence[int]) -> str:
        """Return the text that is certain now and was not before."""
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
        # The longest end of the text that a stop string begins with.
        longest = max(map(len, self._stop), default=0)
        starts = range(max(0, len(held) - longest + 1), len(held))
        keep = next((i for i in starts if any(stop.startswith(held[i:]) for stop in self._stop)), len(held))
        if final:
            keep = len(held)
        self._held = held[keep:]
        return held[:keep]


@dataclass(frozen=True)
class Text:
    """What a model made of a prompt."""

    prompt: str
    text: str
    """What follows the prompt."""
    num_tokens: int
    """Tokens that were generated."""
    finish_reason: str
    """stop: at an end token or a stop string; length: at the limit or the end of the context."""


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
    """Continue each prompt `num_samples` times; return the texts, those of one prompt beside each other.

    Sample i of any prompt is drawn with `seed` + i: it does not depend on what else is asked for. Up to `num_slots` texts are
    written at a time.
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
    """A text that grows."""

    def __init__(self, prompt: str, stream: TextStream) -> None:
        self.prompt, self.stream = prompt, stream
        self.pieces: list[str] = []
        self.num_read = 0

    def read(self, generation: Generation) -> bool:
        """Take in new tokens; return whether a stop string was among them."""
        self.pieces.append(self.stream.add(generation.tokens[self.num_read :]))
        self.num_read = len(generation.tokens)
        if generation.finish_reason is not None:
            self.pieces.append(self.stream.finish())
        return self.stream.stopped

    def text(self, generation: Generation) -> Text:
        reason = "stop" if self.stream.stopped else str(generation.finish_reason)
        return Text(self.prompt, "".join(self.pieces), len(generation.tokens), reason)
