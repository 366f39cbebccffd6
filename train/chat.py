"""A conversation in the terminal: answers appear as they are drawn."""

import signal
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from ..errors import UserError
from ..model import Generation
from ..tokenizer.chat_template import ChatTemplate
from .conversation import Message, fit_conversation, require_chat_template
from .pretrained import TextModel, load_text_model
from .texts import DrawConfig, TextStream, make_engine

HELP = "/reset begins anew, Ctrl-C ends an answer, Ctrl-D the chat"


@dataclass(frozen=True)
class ChatConfig(DrawConfig):
    """How to talk."""

    system: str | None = None
    """System prompt."""
    template: Path | None = None
    """Chat template in place of the folder's."""
    max_new_tokens: int | None = None
    """Most tokens of an answer; by default 512, at most half of the conversation's."""
    max_length: int | None = None
    """Most tokens of a conversation with the next answer; by default the context, at most 4,096."""
    device: str = "auto"
    """cuda, cpu, or auto."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_new_tokens", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}: it must be at least 1")


class Chat:
    """A conversation with a model; the oldest turns are left out, whole, where it outgrows its room."""

    def __init__(self, text_model: TextModel, template: ChatTemplate, config: ChatConfig) -> None:
        context_length = text_model.model.config.context_length
        max_length = config.max_length or min(context_length, 4096)
        self._max_new_tokens = config.max_new_tokens or max(1, min(512, max_length // 2))
        if self._max_new_tokens >= max_length:
            raise UserError(f"max_new_tokens is {self._max_new_tokens}: it must be below the {max_length} of the conversation")
        self._text_model, self._template, self._config = text_model, template, config
        self._engine = make_engine(text_model, 1, max_length)
        self._room = max_length - self._max_new_tokens
        self.reset()

    def reset(self) -> None:
        """Forget all messages but the system prompt."""
        system = self._config.system
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.num_left_out = 0
        """Turns of the conversation that the model did not see when it last answered."""

    def answer(self, message: str) -> Generator[str, None, None]:
        """Yield the answer to a message, a piece a token, which may be empty; what came before a `close` stays the answer."""
        asked: list[Message] = [*self.messages, {"role": "user", "content": message}]
        ids, self.num_left_out = fit_conversation(self._text_model, self._template, asked, self._room)
        config = self._config
        generation = Generation(ids, self._max_new_tokens, config.sampling, self._text_model.end_tokens, config.seed)
        stream = TextStream(self._text_model, ids, skip_special_tokens=True)
        pieces: list[str] = []
        num_read = 0
        self._engine.add(generation)
        try:
            while generation.finish_reason is None:
                self._engine.step()
                piece = stream.add(generation.tokens[num_read:])
                num_read = len(generation.tokens)
                pieces.append(piece)
                yield piece
            pieces.append(stream.finish())
            yield pieces[-1]
        finally:
            self._engine.cancel(generation)
            self.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]


def run_chat(folder: Path, config: ChatConfig) -> None:
    """Talk with the model in a folder, over stdin and stdout, until the input ends."""
    # Before the weights, because a folder without one is then known at once.
    template = require_chat_template(folder, config.template)
    chat = Chat(load_text_model(folder, config.device), template, config)
    if sys.stdin.isatty():
        with suppress(ImportError):
            # Lines that are typed can be edited.
            import readline  # noqa: F401
        print(HELP)
    while True:
        try:
            message = input("> " if sys.stdin.isatty() else "")
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            return
        if message.strip() == "/reset":
            chat.reset()
        elif message.startswith("/"):
            print(f"{message.split()[0]} is no command: {HELP}")
        elif message.strip():
            _print_answer(chat, message)


@contextmanager
def _interrupted() -> Iterator[Event]:
    """Yield an event that Ctrl-C sets, in place of an exception, which could come in the middle of a step."""
    event = Event()
    before = signal.signal(signal.SIGINT, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def _print_answer(chat: Chat, message: str) -> None:
    left_out = chat.num_left_out
    answer = chat.answer(message)
    try:
        with _interrupted() as interrupted:
            for i, piece in enumerate(answer):
                if i == 0 and chat.num_left_out > left_out:
                    print(f"[turns left out, as they no longer fit: the oldest {chat.num_left_out}]", file=sys.stderr)
                print(piece, end="", flush=True)
                if interrupted.is_set():
                    break
    except UserError as error:
        print(f"tilewright: error: {error}", file=sys.stderr)
    finally:
        # Not left to the collector: the slot is needed for the next answer.
        answer.close()
    print()
