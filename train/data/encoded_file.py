"""The token file of a text or of chats: encoded if missing, and checked against its source if present."""

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
    """Open `tokens`, the token file of `text` (plain text or chats). Encodes `text` if the file is missing.

    Raises a `UserError` if the token file belongs to another text, tokenizer or template, and never overwrites it. The text is
    identified by name, size and modification time, or by its hash if these differ. `advance` is passed to `encode_text`.
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
    """Open a token file. Raises a `UserError` if it was encoded with another tokenizer or chat template."""
    dataset = TokenDataset(path)
    if dataset.header.marked:
        if dataset.header.tokenizer != chats_fingerprint(tokenizer, _required(template, path)):
            raise UserError(f"{path} was encoded with another tokenizer or chat template; remove it to encode it again")
    elif dataset.header.tokenizer != tokenizer.fingerprint:
        raise UserError(
            f"{path} was encoded with another tokenizer, or with another version of the package regex if the pattern is a "
            "regular expression; remove it to encode it again, or name its tokenizer"
        )
    return dataset


def _required(template: ChatTemplate | None, path: Path) -> ChatTemplate:
    if template is None:
        raise UserError(
            f"{path} has chats, but the tokenizer's folder has no chat_template.jinja; add one, or name a template with "
            "--data.chat-template"
        )
    return template


def _hashes(text: Path) -> Iterator[str]:
    yield text_sha256(text, END_OF_TEXT)
    # Earlier versions encoded tables without the ends of documents. Other texts contain them.
    if text_bytes(text) is None:
        yield text_sha256(text)


def _check_text(text: Path, dataset: TokenDataset) -> None:
    stamp, header = dataset.header.text_file, dataset.header
    if stamp is not None and stamp.name == text.name and not text.exists():
        # The text may be deleted once it is encoded.
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
            raise UserError(f"{dataset.path} was encoded from another {text.name}; remove it to encode the text again")
        raise UserError(f"{dataset.path} was encoded from {stamp.name}, not from {text.name}; rename one of the texts")
