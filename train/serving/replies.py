"""Responses of the OpenAI API: JSON of completions and chat completions, complete or streamed."""

import json
import time
import uuid
from collections.abc import AsyncIterator

from .errors import ApiError
from .worker import Piece

FAILED = ApiError(500, "the model failed on this request: see the server's log")


class Reply:
    """Builds the response to one request, for chat or completions."""

    def __init__(self, model: str, chat: bool, num_choices: int, prompt_tokens: int) -> None:
        self._chat, self._num_choices, self._prompt_tokens = chat, num_choices, prompt_tokens
        self._completion_tokens = 0
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def _usage(self) -> dict[str, int]:
        prompt, completion = self._prompt_tokens, self._completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    async def content(self, pieces: AsyncIterator[Piece]) -> dict[str, object]:
        """Return the complete response after all texts have ended."""
        texts, reasons = [""] * self._num_choices, [""] * self._num_choices
        async for piece in pieces:
            if piece.failed:
                raise FAILED
            texts[piece.index] += piece.text
            self._completion_tokens += piece.num_tokens
            reasons[piece.index] = piece.finish_reason or ""
        choices = []
        for index, (text, reason) in enumerate(zip(texts, reasons, strict=True)):
            content = {"message": {"role": "assistant", "content": text, "refusal": None}} if self._chat else {"text": text}
            choices.append({"index": index, **content, "logprobs": None, "finish_reason": reason})
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": self._usage()}

    async def events(self, pieces: AsyncIterator[Piece], include_usage: bool) -> AsyncIterator[str]:
        """Yield the response as server-sent events (WHATWG HTML, section 9.2), one for each piece."""
        extra: dict[str, object] = {"usage": None} if include_usage else {}
        if self._chat:
            for index in range(self._num_choices):
                yield self._event(index, {"role": "assistant", "content": ""}, None, extra)
        async for piece in pieces:
            if piece.failed:
                yield _line(FAILED.body)
                return
            self._completion_tokens += piece.num_tokens
            if piece.text:
                yield self._event(piece.index, {"content": piece.text}, None, extra)
            if piece.finish_reason is not None:
                yield self._event(piece.index, {}, piece.finish_reason, extra)
        if include_usage:
            yield _line({**self._head, "object": self._kind, "choices": [], "usage": self._usage()})
        yield "data: [DONE]\n\n"

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _event(self, index: int, delta: dict[str, str], reason: str | None, extra: dict[str, object]) -> str:
        content: dict[str, object] = {"delta": delta} if self._chat else {"text": delta.get("content", "")}
        choice = {"index": index, **content, "logprobs": None, "finish_reason": reason}
        return _line({**self._head, "object": self._kind, "choices": [choice], **extra})


def _line(content: dict[str, object]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
