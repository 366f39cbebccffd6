"""Conversations as prompts: by a model's chat template, in which only the template itself has special tokens."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import UserError
from ..tokenizer.chat_template import ChatTemplate
from .pretrained import TextModel
from .texts import encode_literally

Message = Mapping[str, str]
"""`role` (system, user, assistant) and `content`."""

# Around the number of a special token that stood in a message: noncharacters (Unicode 16, section 23.7).
_PLACEHOLDER = "\ufdd2{}\ufdd3"
_PLACEHOLDERS = re.compile("\ufdd2([0-9]+)\ufdd3")


def require_chat_template(folder: Path, template: Path | None = None) -> ChatTemplate:
    """Return the chat template in the file `template`, or the folder's own; a folder without one is a `UserError`."""
    found = ChatTemplate.load(folder, template)
    if found is None:
        raise UserError(f"{folder} has no chat template, so its model is none for conversation: give one with --template FILE")
    return found


def encode_conversation(text_model: TextModel, template: ChatTemplate, messages: Sequence[Message]) -> list[int]:
    """Return the ids of a conversation up to where the assistant's next turn begins.

    The name of a special token in a message is text like any other: who writes a message cannot end it, or begin another's.
    A message whose ids need such care is encoded apart from the special tokens around it; all others are encoded in one.
    Added tokens that a tokenizer does not mark as special, such as Qwen3's `<think>`, are recognised everywhere.
    """
    tokenizer = text_model.tokenizer
    names = sorted(tokenizer.special_tokens, key=len, reverse=True)
    if not names:
        return tokenizer.encode(template.render(messages, add_generation_prompt=True))
    special = re.compile("|".join(map(re.escape, names)))
    if not any(special.search(message["content"]) for message in messages):
        return tokenizer.encode(template.render(messages, add_generation_prompt=True))

    def hide(content: str) -> str:
        return special.sub(lambda found: _PLACEHOLDER.format(names.index(found[0])), content)

    def show(text: str) -> str:
        return _PLACEHOLDERS.sub(lambda found: names[int(found[1])] if int(found[1]) < len(names) else found[0], text)

    hidden = [{**message, "content": hide(message["content"])} for message in messages]
    text = template.render(hidden, add_generation_prompt=True)
    ids, end = [], 0
    for found in special.finditer(text):
        ids += encode_literally(text_model, show(text[end : found.start()]))
        ids.append(tokenizer.special_tokens[found[0]])
        end = found.end()
    return ids + encode_literally(text_model, show(text[end:]))


def fit_conversation(
    text_model: TextModel, template: ChatTemplate, messages: Sequence[Message], num_tokens: int
) -> tuple[list[int], int]:
    """Return the ids of a conversation in at most `num_tokens`, and how many of its oldest turns were left out for that.

    A turn is a message of the user with the answer to it; a system prompt stays. Where the last turn alone is too long, that
    is a `UserError`.
    """
    system = [message for message in messages if message["role"] == "system"]
    others = [message for message in messages if message["role"] != "system"]
    begins, ids = [i for i, message in enumerate(others) if message["role"] == "user"], []
    for left_out, begin in enumerate(begins):
        ids = encode_conversation(text_model, template, [*system, *others[begin:]])
        if len(ids) <= num_tokens:
            return ids, left_out
    raise UserError(f"the last message is too long: with the system prompt it has {len(ids)} tokens, and {num_tokens} fit")
