"""Byte-level BPE: train a vocabulary on a file, encode text and whole files, decode ids, store the result.

Names and results follow CS336: the GPT-2 pattern cuts text into pretokens, merges never cross a pretoken, special tokens
are hard boundaries. The room knows no torch, so that its worker processes start fast.
"""

from .encode_file import iter_encoded, token_dtype
from .patterns import END_OF_TEXT
from .tokenizer import Tokenizer
from .trainer import train_bpe

__all__ = ["END_OF_TEXT", "Tokenizer", "iter_encoded", "token_dtype", "train_bpe"]
