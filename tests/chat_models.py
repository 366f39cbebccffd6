"""A tiny chat model: random weights, a byte-level tokenizer, and a ChatML template."""

import torch

from tilewright.model import ModelConfig, TransformerLM
from tilewright.tokenizer import Tokenizer
from tilewright.train import TextModel

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> Tokenizer:
    """Return a tokenizer of all 256 bytes, two merges and the special tokens: 261 tokens."""
    vocab = {i: bytes([i]) for i in range(256)} | {256: b"th", 257: b"the"}
    return Tokenizer(vocab, [(b"t", b"h"), (b"th", b"e")], SPECIAL_TOKENS)


def tiny_model(context_length: int = 256) -> TextModel:
    """Return the model with random weights, seeded so that greedy texts have several tokens."""
    torch.manual_seed(3)
    tokenizer = tiny_tokenizer()
    model = TransformerLM(ModelConfig(tokenizer.vocab_size, context_length, d_model=32, num_layers=2, num_heads=2, d_ff=64))
    return TextModel(model.eval(), tokenizer, end_tokens=tuple(tokenizer.special_tokens[t] for t in SPECIAL_TOKENS[::2]))
