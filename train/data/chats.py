"""Encoding of chats to a marked token file, whose marks select the tokens that the assistant wrote."""

import hashlib
from pathlib import Path

import numpy as np

from ...errors import UserError
from ...files import atomic_file, require_absent, require_file
from ...tokenizer import AnyTokenizer
from ...tokenizer.chat_template import ChatTemplate
from ...tokenizer.chats import SCORED, encode_chat_lines, iter_chat_lines
from ...tokenizer.encode_file import Advance, progress
from ...tokenizer.workers import choose_workers, ordered_map
from .token_file import FileStamp, TokenHeader, TokenWriter


def chats_fingerprint(tokenizer: AnyTokenizer, template: ChatTemplate) -> str:
    """Return the SHA-256 (hex) of the tokenizer and the template, which together determine ids and marks."""
    return hashlib.sha256(f"{tokenizer.fingerprint} {template.fingerprint}".encode()).hexdigest()


def encode_chats(
    path: Path,
    tokenizer: AnyTokenizer,
    template: ChatTemplate,
    out: Path,
    num_workers: int | None = None,
    advance: Advance | None = None,
) -> TokenHeader:
    """Encode the conversations in `path` to the marked token file `out`, in parallel. `out` appears only when it is complete.

    Each line is a JSON object with `messages`, a list of objects with the strings `role` and `content`. The tokens of the
    assistant's messages, and the tokens that end its turns, are scored. Raises a `UserError` for an invalid line, with its
    number, and for a file without messages of the assistant.
    """
    require_file(path, "chats")
    require_absent(out)
    stamp, digest, num_bytes, num_scored = FileStamp.of(path), hashlib.sha256(), 0, 0
    workers = choose_workers(num_workers, stamp.size)
    with atomic_file(out) as file:
        writer = TokenWriter(file, tokenizer.vocab_size, chats_fingerprint(tokenizer, template), marked=True)
        results = ordered_map(encode_chat_lines, (tokenizer, template), iter_chat_lines(path), workers)
        with progress(f"encoding {path.name}", None, advance=advance) as advance:
            for group, (ids, marks) in results:
                writer.append(ids, marks)
                num_scored += int(np.count_nonzero(marks & SCORED))
                for line in group.lines:
                    digest.update(line)
                    num_bytes += len(line)
                advance(sum(map(len, group.lines)))
        if not num_scored:
            raise UserError(f"{path} has no message of the role assistant: at least one is needed for training")
        if FileStamp.of(path) != stamp:
            raise UserError(f"cannot encode {path}: the file changed in the meantime; encode it again")
        return writer.save(num_bytes, digest.hexdigest(), stamp)


def chats_sha256(path: Path) -> str:
    """Return the SHA-256 (hex) of the lines of `path`, as in `TokenHeader.text_sha256`."""
    digest = hashlib.sha256()
    for group in iter_chat_lines(path):
        for line in group.lines:
            digest.update(line)
    return digest.hexdigest()
