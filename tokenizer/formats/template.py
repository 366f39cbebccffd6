"""The tokens that the `post_processor` of a `tokenizer.json` inserts before every text, such as Llama 3's begin-of-text."""

from pathlib import Path
from typing import Any

from ...errors import UserError
from .tokenizer_data import entry


def template_prefix(document: dict[str, Any], path: Path | str) -> tuple[int, ...]:
    """Return the ids before the text in the template of a single text; () if there is no template."""
    try:
        return tuple(id for part in _parts(document.get("post_processor")) for id in _prefix(part))
    except (KeyError, TypeError, UserError) as error:
        raise UserError(f"{path} has a malformed post_processor: {error}") from None


def _parts(processor: Any) -> list[Any]:
    if isinstance(processor, dict) and processor.get("type") == "Sequence":
        return [part for each in entry(processor, "processors", list) for part in _parts(each)]
    return [processor]


def _prefix(processor: Any) -> list[int]:
    if not isinstance(processor, dict) or processor.get("type") != "TemplateProcessing":
        return []
    ids: list[int] = []
    for piece in entry(processor, "single", list):
        if "SpecialToken" not in piece:
            break
        ids += processor["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
    return ids
