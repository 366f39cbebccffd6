"""Convert conversations to prompts with a chat template. Only the template can produce special tokens."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import UserError
from ..tokenizer.chat_template import ChatTemplate
from .pretrained import TextModel
from .texts import encode_literally

Message = Mapping[str, str]
"""`role` (system, user, assistant) and `content`."""

# Replaces a special token's name inside a message: its index between two noncharacters (Unicode 16, section 23.7).
_PLACEHOLDER = "\ufdd2{}\ufdd3"
_PLACEHOLDERS = re.compile("\ufdd2([0-9]+)\ufdd3")


def require_chat_template(folder: Path, template: Path | None = None) -> ChatTemplate:
    """Return the chat template in the file `template`, by default the folder's; raise a `UserError` if there is none."""
    if not folder.is_dir():
        raise UserError(f"folder {folder} does not exist: expected a Hugging Face model folder, or the folder of a run")
    found = ChatTemplate.load(folder, template)
    if found is None:
        raise UserError(f"{folder} has no chat template: pass one with --template FILE")
    return found


def encode_conversation(text_model: TextModel, template: ChatTemplate, messages: Sequence[Message]) -> list[int]:
    """Return the token ids of a conversation, up to the start of the assistant's next turn.

    The name of a special token inside a message is encoded as plain text, so a message cannot end its own turn or start
    another. If any message contains such a name, the text between special tokens is encoded piece by piece; otherwise the whole
    conversation is encoded at once. Added tokens that the tokenizer does not mark as special, such as Qwen3's `<think>`, are
    recognized everywhere.
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
    """Return the ids of a conversation, at most `num_tokens`, and the number of oldest turns that were dropped.

    A turn is a user message and its answer. System messages are always kept. Raise a `UserError` if the last turn alone is too
    long.
    """
    system = [message for message in messages if message["role"] == "system"]
    others = [message for message in messages if message["role"] != "system"]
    begins, ids = [i for i, message in enumerate(others) if message["role"] == "user"], []
    for left_out, begin in enumerate(begins):
        ids = encode_conversation(text_model, template, [*system, *others[begin:]])
        if len(ids) <= num_tokens:
            return ids, left_out
    raise UserError(
        f"the last message is too long: with the system prompt it has {len(ids)} tokens, expected at most {num_tokens}"
    )
