"""The thread in which the model runs, and what the server's loop exchanges with it."""

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
    """A part of a text, and with the last part how it ended."""

    index: int
    """Which of a job's texts it belongs to."""
    text: str
    finish_reason: str | None = None
    num_tokens: int = 0
    """Tokens of the whole text, with the last part."""
    failed: bool = False


@dataclass(eq=False)
class Job:
    """The texts of one request."""

    generations: list[Generation]
    streams: list[TextStream]
    """Those of the generations, which have taken in the prompts."""
    loop: asyncio.AbstractEventLoop
    pieces: "asyncio.Queue[Piece]" = field(default_factory=asyncio.Queue)

    def put(self, piece: Piece) -> None:
        """Hand a piece to the loop, from any thread."""
        try:
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, piece)
        except RuntimeError:
            # The loop was closed: nobody waits for it any more.
            _log.debug("a piece came after the server's loop had ended")


@dataclass(eq=False)
class _Text:
    job: Job
    index: int
    stream: TextStream
    num_read: int = 0


class Worker:
    """Runs an engine in a thread. At most `max_queue` texts wait for a slot; jobs beyond that are refused."""

    def __init__(self, engine: BatchEngine, max_queue: int) -> None:
        self.engine, self.max_queue = engine, max_queue
        self._texts: dict[Generation, _Text] = {}
        self._commands: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._num_texts = 0
        """Texts that were submitted and have not ended."""
        self._closing = False
        self.failed = False
        self._thread = threading.Thread(target=self._run, name="tilewright-model", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """End the thread after its present step, and what is still running with it."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    @property
    def num_texts(self) -> int:
        """Texts that run or wait."""
        return self._num_texts

    def submit(self, job: Job) -> None:
        """Queue a job, all of whose generations have been checked; a full queue raises an `ApiError`."""
        with self._changed:
            if self._closing or self.failed:
                raise ApiError(503, "the server is shutting down or has failed: try another")
            if self._num_texts + len(job.generations) > self.engine.num_slots + self.max_queue:
                raise ApiError(429, f"{self._num_texts} texts are in work or queued: try again later", code="queue_full")
            self._num_texts += len(job.generations)
            self._commands.append(lambda: self._begin(job))
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """End a job's texts and free their slots; those that have ended stay as they are."""
        with self._changed:
            self._commands.append(lambda: self._cancel(job))
            self._changed.notify()

    def _begin(self, job: Job) -> None:
        for index, (generation, stream) in enumerate(zip(job.generations, job.streams, strict=True)):
            self._texts[generation] = _Text(job, index, stream)
            try:
                self.engine.add(generation)
            except UserError as error:
                # Checked before it was queued; an error here still must not end the thread.
                _log.error("a request was refused late: %s", error)
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
            _log.error("%s; the server answers no more requests", error)
            self.failed = True
        except Exception:
            _log.exception("the model failed: the server answers no more requests")
            self.failed = True
        with self._changed:
            self._closing = True
            commands, self._commands = self._commands, deque()
        for command in commands:
            command()
        for generation in list(self._texts):
            self._end(generation, failed=True)

    def _wait(self) -> bool:
        """Do what was asked for, and wait while there is nothing to run; return whether to go on."""
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
