"""The tokenizer against its peers, on the embedded corpus: the same text, the same vocabulary, results compared first."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..tokenizer import END_OF_TEXT, Tokenizer, iter_encoded, train_bpe
from ..tokenizer.patterns import GPT2_PATTERN
from ..train.corpus import write_stories
from .timing import time_variants


def _train_hugging_face(path: Path, vocab_size: int) -> Callable[[], Any] | None:
    try:
        from tokenizers import Tokenizer as PeerTokenizer
        from tokenizers import models, pre_tokenizers, trainers
    except ImportError:
        return None

    def run() -> None:
        peer = PeerTokenizer(models.BPE())
        peer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
        )  # pyright: ignore[reportCallIssue]
        peer.train([str(path)], trainer)

    return run


def _encode_tiktoken(tokenizer: Tokenizer, text: str) -> Callable[[], list[int]] | None:
    try:
        import tiktoken
    except ImportError:
        return None
    specials = tokenizer.special_tokens
    ranks = {token: i for i, token in tokenizer.vocab.items() if i not in specials.values()}
    peer = tiktoken.Encoding("peer", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=specials)
    return lambda: peer.encode(text, allowed_special="all")


def bench_tokenizer(megabytes: float = 10.0, vocab_size: int = 4096) -> Iterator[dict[str, Any]]:
    """Yield the times of training and encoding on `megabytes` MB of stories, in MB/s of text."""
    cpu = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stories.txt"
        size = write_stories(path, megabytes)
        tokenizer = Tokenizer(*train_bpe(path, vocab_size, [END_OF_TEXT]), [END_OF_TEXT])
        text = path.read_text()
        trainers = {
            "tilewright": lambda: train_bpe(path, vocab_size, [END_OF_TEXT]),
            "tokenizers": _train_hugging_face(path, vocab_size),
        }
        encoders = {
            "tilewright": lambda: tokenizer.encode(text),
            "tilewright, file, all cores": lambda: sum(map(len, iter_encoded(path, tokenizer))),
            "tiktoken": _encode_tiktoken(tokenizer, text),
        }
        peer = encoders["tiktoken"]
        if peer is not None and peer() != tokenizer.encode(text):
            raise AssertionError("tiktoken gives other ids with the same ranks: the comparison would mean nothing")
        for job, variants in {f"train {vocab_size} tokens": trainers, "encode": encoders}.items():
            present = {name: run for name, run in variants.items() if run is not None}
            for name, times in time_variants(present, cpu, rounds=3).items():
                speed = size / 1e6 / (times.p50_ms * 1e-3)
                yield {"case": f"{job}, {megabytes:g} MB of stories", "variant": name, **asdict(times), "mb_per_s": speed}
