"""Chat in the terminal: answers are printed while they are generated."""

import signal
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event

from ..errors import UserError
from ..model import Generation
from ..tokenizer.chat_template import ChatTemplate
from .conversation import Message, fit_conversation, require_chat_template
from .options import ChatConfig
from .pretrained import TextModel, load_text_model
from .texts import TextStream, make_engine

HELP = "/reset clears the conversation, Ctrl-C stops an answer, Ctrl-D ends the chat"


class Chat:
    """A conversation with a model. When it exceeds `max_length`, the oldest turns are dropped."""

    def __init__(self, text_model: TextModel, template: ChatTemplate, config: ChatConfig) -> None:
        context_length = text_model.model.config.context_length
        max_length = config.max_length or min(context_length, 4096)
        self._max_new_tokens = config.max_new_tokens or max(1, min(512, max_length // 2))
        if self._max_new_tokens >= max_length:
            raise UserError(f"max_new_tokens is {self._max_new_tokens}: expected less than max_length, {max_length}")
        self._text_model, self._template, self._config = text_model, template, config
        self._engine = make_engine(text_model, 1, max_length)
        self._max_prompt_tokens = max_length - self._max_new_tokens
        self.reset()

    def reset(self) -> None:
        """Drop all messages except the system prompt."""
        system = self._config.system
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.num_left_out = 0
        """Number of oldest turns that were not part of the last prompt."""

    def answer(self, message: str) -> Generator[str, None, None]:
        """Yield the answer to a message, one (possibly empty) piece for each token.

        If the generator is closed early, the pieces so far become the answer in `messages`.
        """
        asked: list[Message] = [*self.messages, {"role": "user", "content": message}]
        ids, self.num_left_out = fit_conversation(self._text_model, self._template, asked, self._max_prompt_tokens)
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
    """Chat with the model in a folder over stdin and stdout, until the end of input."""
    # Checked before the weights are loaded, so that a missing template fails fast.
    template = require_chat_template(folder, config.template)
    chat = Chat(load_text_model(folder, config.device, config.tokenizer), template, config)
    if sys.stdin.isatty():
        with suppress(ImportError):
            # Makes input() editable.
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
            print(f"unknown command {message.split()[0]}: {HELP}")
        elif message.strip():
            _print_answer(chat, message)


@contextmanager
def _interrupted() -> Iterator[Event]:
    """Yield an event that Ctrl-C sets. A KeyboardInterrupt could leave the engine in the middle of a step."""
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
                    print(f"[the conversation is too long: dropped the oldest {chat.num_left_out} turns]", file=sys.stderr)
                print(piece, end="", flush=True)
                if interrupted.is_set():
                    break
    except UserError as error:
        print(f"tilewright: error: {error}", file=sys.stderr)
    finally:
        # Free the engine's slot now, not at the next garbage collection.
        answer.close()
    print()
