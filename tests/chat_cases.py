"""Short random chats, with a tokenizer and a chat template for them."""

import json
import random

from tilewright.tokenizer import Tokenizer, train_bpe

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "small", "red", "bird", "in", "that", "old", "tree"]


def make_chats(count, seed=0, most_words=12):
    """Return conversations of one to three questions and answers."""
    rng = random.Random(seed)

    def message(role):
        return {"role": role, "content": " ".join(rng.choices(WORDS, k=rng.randint(1, most_words)))}

    return [[message(role) for _ in range(rng.randint(1, 3)) for role in ("user", "assistant")] for _ in range(count)]


def write_chats(path, chats):
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in chats))
    return path


def write_tokenizer(folder):
    """Write a tokenizer.json and the chat template into the folder; return the tokenizer."""
    text = folder / "words.txt"
    text.write_text(" ".join(WORDS * 20) + " user assistant system\n")
    tokenizer = Tokenizer(*train_bpe(text, 290, SPECIALS), SPECIALS)
    text.unlink()
    tokenizer.save(folder / "tokenizer.json")
    config = {"chat_template": CHATML, "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer
