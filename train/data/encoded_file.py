"""A token file beside its text or chats: made where it is missing, and never taken for that of another text."""

from collections.abc import Iterator
from pathlib import Path

from ...errors import UserError
from ...files import require_file
from ...tokenizer import END_OF_TEXT, AnyTokenizer
from ...tokenizer.chat_template import ChatTemplate
from ...tokenizer.chats import holds_chats
from ...tokenizer.encode_file import Advance
from ...tokenizer.text.sources import text_bytes
from .chats import chats_fingerprint, chats_sha256, encode_chats
from .encoding import encode_text, text_sha256
from .token_file import FileStamp, TokenDataset


def open_encoded(
    text: Path,
    tokens: Path,
    tokenizer: AnyTokenizer,
    template: ChatTemplate | None = None,
    num_workers: int | None = None,
    advance: Advance | None = None,
) -> TokenDataset:
    """Open `tokens`, the token file of a text or of chats, which are encoded first where it is missing.

    A token file of another text, another tokenizer or another template is a `UserError`: it is never overwritten. Whether the
    text is the same is told by its name, size and time, and by its hash where these differ. `advance` as for `encode_text`.
    """
    if not tokens.exists():
        if holds_chats(text):
            encode_chats(text, tokenizer, _required(template, text), tokens, num_workers, advance)
        else:
            encode_text(text, tokenizer, tokens, num_workers, advance=advance)
        return open_tokens(tokens, tokenizer, template)
    dataset = open_tokens(tokens, tokenizer, template)
    _check_text(text, dataset)
    return dataset


def open_tokens(path: Path, tokenizer: AnyTokenizer, template: ChatTemplate | None = None) -> TokenDataset:
    """Open a token file; one of another tokenizer or chat template is a `UserError`."""
    dataset = TokenDataset(path)
    if dataset.header.marked:
        if dataset.header.tokenizer != chats_fingerprint(tokenizer, _required(template, path)):
            raise UserError(f"{path} was made by another tokenizer or chat template: remove it to have it made again")
    elif dataset.header.tokenizer != tokenizer.fingerprint:
        raise UserError(
            f"{path} was made by another tokenizer, or, if the pattern is a regular expression, with another version of"
            " regex: remove it to have it made again, or name its tokenizer"
        )
    return dataset


def _required(template: ChatTemplate | None, path: Path) -> ChatTemplate:
    if template is None:
        raise UserError(
            f"{path} has chats, and the tokenizer's folder no chat template: name one with --data.chat-template, or put it "
            "there as chat_template.jinja"
        )
    return template


def _hashes(text: Path) -> Iterator[str]:
    yield text_sha256(text, END_OF_TEXT)
    # Older versions encoded tables without ends of documents; in other texts they are in the text.
    if text_bytes(text) is None:
        yield text_sha256(text)


def _check_text(text: Path, dataset: TokenDataset) -> None:
    stamp, header = dataset.header.text_file, dataset.header
    if stamp is not None and stamp.name == text.name and not text.exists():
        # A text that is encoded is no longer needed.
        return
    require_file(text, "text file")
    if FileStamp.of(text) == stamp:
        return
    if header.marked:
        changed = chats_sha256(text) != header.text_sha256
    else:
        changed = text_bytes(text) not in (None, header.text_bytes) or header.text_sha256 not in _hashes(text)
    if changed:
        if stamp is None or stamp.name == text.name:
            raise UserError(f"{dataset.path} was made from another {text.name}: remove it to have it made again")
        raise UserError(f"{dataset.path} was made from {stamp.name}, not from {text.name}: name one of the texts differently")
