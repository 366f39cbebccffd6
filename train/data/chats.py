"""Chats encoded to a marked token file, which says which tokens the assistant wrote."""

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
    """Return the sha256, in hex, of everything that decides which ids and marks a conversation gets."""
    return hashlib.sha256(f"{tokenizer.fingerprint} {template.fingerprint}".encode()).hexdigest()


def encode_chats(
    path: Path,
    tokenizer: AnyTokenizer,
    template: ChatTemplate,
    out: Path,
    num_workers: int | None = None,
    advance: Advance | None = None,
) -> TokenHeader:
    """Encode each conversation of `path` to the marked token file `out`, in parallel; it appears only when it is whole.

    A line is an object whose `messages` are objects of `role` and `content`, both texts. Scored are the tokens of what the
    assistant wrote and of what ends its turns. A line that cannot be used is a `UserError` that gives its number, and so is
    a file where the assistant never speaks.
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
            raise UserError(f"{path} has no message of the role assistant: there is nothing to learn")
        if FileStamp.of(path) != stamp:
            raise UserError(f"{path} changed while it was encoded: encode it again")
        return writer.save(num_bytes, digest.hexdigest(), stamp)


def chats_sha256(path: Path) -> str:
    """Return the hash of the lines of `path`, as the header of its token file has it."""
    digest = hashlib.sha256()
    for group in iter_chat_lines(path):
        for line in group.lines:
            digest.update(line)
    return digest.hexdigest()
