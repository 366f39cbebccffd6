"""The model thread, and the jobs and pieces it exchanges with the server's event loop."""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from ...errors import UserError
from ...model import BatchEngine, Generation
from ..texts import TextStream
from .errors import ApiError

_log = logging.getLogger("tilewright.serving")


@dataclass(frozen=True)
class Piece:
    """A part of a generated text. The last part of a text has a finish reason."""

    index: int
    """Index of the text in its job."""
    text: str
    finish_reason: str | None = None
    num_tokens: int = 0
    """Number of tokens of the whole text; set in its last part."""
    failed: bool = False


@dataclass(eq=False)
class Job:
    """The generations of one request."""

    generations: list[Generation]
    streams: list[TextStream]
    """Decoder of each generation."""
    loop: asyncio.AbstractEventLoop
    pieces: "asyncio.Queue[Piece]" = field(default_factory=asyncio.Queue)

    def put(self, piece: Piece) -> None:
        """Send a piece to the event loop, from any thread."""
        try:
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, piece)
        except RuntimeError:
            # The loop is closed, so no client is waiting.
            _log.debug("dropped a piece: the server's event loop is closed")


@dataclass(eq=False)
class _Text:
    job: Job
    index: int
    stream: TextStream
    num_read: int = 0


class Worker:
    """Runs an engine in a thread. At most `max_queue` texts wait for a slot; further jobs are rejected."""

    def __init__(self, engine: BatchEngine, max_queue: int) -> None:
        self.engine, self.max_queue = engine, max_queue
        self._texts: dict[Generation, _Text] = {}
        self._commands: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._num_texts = 0
        """Number of texts submitted and not ended."""
        self._closing = False
        self.failed = False
        self._thread = threading.Thread(target=self._run, name="tilewright-model", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Stop the thread after its current step; unfinished texts fail."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    @property
    def num_texts(self) -> int:
        """Number of texts that run or wait."""
        return self._num_texts

    def submit(self, job: Job) -> None:
        """Queue a job whose prompts have been checked; raise an `ApiError` if the queue is full."""
        with self._changed:
            if self._closing or self.failed:
                raise ApiError(503, "the server is shutting down or has failed")
            if self._num_texts + len(job.generations) > self.engine.num_slots + self.max_queue:
                raise ApiError(429, f"{self._num_texts} texts are running or queued: try again later", code="queue_full")
            self._num_texts += len(job.generations)
            self._commands.append(lambda: self._begin(job))
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Cancel the unfinished texts of a job and free their slots."""
        with self._changed:
            self._commands.append(lambda: self._cancel(job))
            self._changed.notify()

    def _begin(self, job: Job) -> None:
        for index, (generation, stream) in enumerate(zip(job.generations, job.streams, strict=True)):
            self._texts[generation] = _Text(job, index, stream)
            try:
                self.engine.add(generation)
            except UserError as error:
                # Prompts are checked before they are queued, but an error must not end the thread.
                _log.error("rejected a queued request: %s", error)
                self._end(generation, failed=True)

    def _cancel(self, job: Job) -> None:
        for generation in job.generations:
            if generation in self._texts:
                self.engine.cancel(generation)
                self._end(generation)

    def _run(self) -> None:
        try:
            while self._wait():
                for generation in self.engine.step():
                    self._read(generation)
        except UserError as error:
            _log.error("%s; the server accepts no more requests", error)
            self.failed = True
        except Exception:
            _log.exception("the model failed: the server accepts no more requests")
            self.failed = True
        with self._changed:
            self._closing = True
            commands, self._commands = self._commands, deque()
        for command in commands:
            command()
        for generation in list(self._texts):
            self._end(generation, failed=True)

    def _wait(self) -> bool:
        """Run queued commands, and wait until there is a text to run; return False when closing."""
        while True:
            with self._changed:
                while not (self._commands or self._closing or self._texts):
                    self._changed.wait()
                if self._closing:
                    return False
                commands, self._commands = self._commands, deque()
            for command in commands:
                command()
            if self._texts:
                return True

    def _read(self, generation: Generation) -> None:
        text = self._texts.get(generation)
        if text is None:
            return
        piece = text.stream.add(generation.tokens[text.num_read :])
        text.num_read = len(generation.tokens)
        if text.stream.stopped:
            self.engine.cancel(generation, "stop")
        if generation.finish_reason is None:
            if piece:
                text.job.put(Piece(text.index, piece))
            return
        self._end(generation, piece + text.stream.finish())

    def _end(self, generation: Generation, piece: str = "", failed: bool = False) -> None:
        text = self._texts.pop(generation)
        with self._changed:
            self._num_texts -= 1
        reason = "stop" if text.stream.stopped else generation.finish_reason
        text.job.put(Piece(text.index, piece, reason or "cancelled", len(generation.tokens), failed))
