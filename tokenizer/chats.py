"""Chats in JSON lines: the ids of each conversation, and the tokens that the assistant wrote."""

import json
from collections.abc import Iterator, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError
from .chat_template import ChatTemplate, Message, Span
from .reading import AnyTokenizer
from .text.streams import open_stream

BEGINS, SCORED = np.uint8(1), np.uint8(2)
"""Flags of a token: it begins a conversation; it is scored, that is, part of the training loss."""

_ENDINGS = (".jsonl", ".ndjson")
# Bytes that a worker encodes at a time.
_GROUP_BYTES = 1 << 18


class ChatLines(NamedTuple):
    """Consecutive lines of a file, with their line ends."""

    path: Path
    first: int
    """Number of the first line, counted from 1."""
    lines: list[bytes]


def holds_chats(path: Path) -> bool:
    """Return whether a file is in JSON lines and its first line has `messages`."""
    plain = path.with_suffix("") if path.suffix.lower() in (".gz", ".zst") else path
    if plain.suffix.lower() not in _ENDINGS or not path.is_file():
        return False
    with BufferedReader(open_stream(path)) as file:
        first = next((line for line in file if line.strip()), b"")
    try:
        row = json.loads(first)
    except ValueError:
        return False
    return isinstance(row, dict) and "messages" in row


def encode_conversation(
    messages: Sequence[Message], tokenizer: AnyTokenizer, template: ChatTemplate
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of a conversation, (n,) unsigned, and their flags, (n,) uint8.

    If the template renders it as several texts, the ids of the texts are concatenated.
    """
    parts = [_encode_text(tokenizer, text, spans) for text, spans in template.render_with_spans(messages)]
    return _concatenate(parts)


def _encode_text(tokenizer: AnyTokenizer, text: str, spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids and flags of a text whose `spans` the assistant wrote.

    The text is encoded at once, as in transformers. A token is scored if it overlaps a span. Scoring stops at the last
    special token if only white space follows it in the span: ChatML's newline after a turn belongs to the template, and no
    model has to generate it.
    """
    ids, offsets = tokenizer.encode_with_offsets(text, "characters")
    marks = np.zeros(len(ids), np.uint8)
    special = np.isin(ids, list(tokenizer.special_tokens.values()))
    for start, end in spans:
        inside = np.flatnonzero((offsets[:, 0] < end) & (offsets[:, 1] > start))
        ends = np.flatnonzero(special[inside])
        if len(ends) and not text[offsets[inside[ends[-1]], 1] : end].strip():
            inside = inside[: ends[-1] + 1]
        marks[inside] = SCORED
    # The first token is never predicted, so it is not scored.
    marks[:1] = BEGINS
    return ids, marks


def encode_chat_lines(encoder: tuple[AnyTokenizer, ChatTemplate], group: ChatLines) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of the conversations of `group`, (n,) unsigned, and their flags, (n,) uint8, concatenated.

    An invalid line raises a `UserError` that gives its number.
    """
    tokenizer, template = encoder
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    for number, line in enumerate(group.lines, group.first):
        if not line.strip():
            continue
        where = f"{group.path} line {number}"
        messages = _messages(line, where)
        try:
            parts.append(encode_conversation(messages, tokenizer, template))
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    return _concatenate(parts)


def _concatenate(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    if not parts:
        return np.zeros(0, np.uint16), np.zeros(0, np.uint8)
    ids, marks = zip(*parts, strict=True)
    return np.concatenate(ids), np.concatenate(marks)


def _messages(line: bytes, where: str) -> list[Message]:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}") from error
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where} has no messages: expected an object with a list of messages")
    for number, message in enumerate(messages, 1):
        for name in ("role", "content"):
            value = message.get(name) if isinstance(message, dict) else None
            if not isinstance(value, str):
                raise UserError(f"{where}: {name} of message {number} is {json.dumps(value):.60}: expected a string")
    return messages


def iter_chat_lines(path: Path) -> Iterator[ChatLines]:
    """Yield the lines of a file, with their ends, in groups of at least `_GROUP_BYTES` bytes."""
    lines: list[bytes] = []
    size, number = 0, 0
    with BufferedReader(open_stream(path)) as file:
        for number, line in enumerate(file, 1):
            lines.append(line)
            size += len(line)
            if size >= _GROUP_BYTES:
                yield ChatLines(path, number - len(lines) + 1, lines)
                lines, size = [], 0
    if lines:
        yield ChatLines(path, number - len(lines) + 1, lines)
