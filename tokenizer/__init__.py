"""Byte-level BPE: train a vocabulary, encode text and files to ids, decode ids to text, and store tokenizers.

Names and results follow CS336: the GPT-2 pattern splits text into pretokens, merges never cross a pretoken, and special
tokens are hard boundaries. The package does not import torch, so that its worker processes start fast.
"""

from .counting.count_text import count_text
from .counting.counts_file import load_counts, save_counts
from .encode_file import iter_encoded
from .encoding.encoder import token_dtype
from .huggingface_tokenizer import HuggingFaceTokenizer
from .learning.trainer import learn_bpe, shorten_vocab, train_bpe
from .reading import AnyTokenizer, read_tokenizer
from .text.patterns import END_OF_TEXT
from .text.sources import Documents, Files
from .tokenizer import Tokenizer

__all__ = [
    "END_OF_TEXT",
    "AnyTokenizer",
    "Documents",
    "Files",
    "HuggingFaceTokenizer",
    "Tokenizer",
    "count_text",
    "iter_encoded",
    "learn_bpe",
    "load_counts",
    "read_tokenizer",
    "save_counts",
    "shorten_vocab",
    "token_dtype",
    "train_bpe",
]
