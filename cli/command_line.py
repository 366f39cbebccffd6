"""The table of subcommands, its usage text, and suggestions for unknown commands."""

import difflib
from collections.abc import Callable, Sequence

from ..errors import UserError
from .account import account
from .bench import bench, bench_compare, bench_report, bench_tune
from .corpus import corpus_fetch, corpus_split, corpus_stories
from .doctor import doctor
from .eval import evaluate
from .generate import chat, generate, serve
from .options import parse
from .runs import checkpoint_convert, demo, export, sweep, train
from .tokenizer import tokenizer_decode, tokenizer_encode, tokenizer_export, tokenizer_inspect, tokenizer_train
from .tokenizer_warm import tokenizer_warm

COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "corpus stories": corpus_stories,
    "corpus fetch": corpus_fetch,
    "corpus split": corpus_split,
    "tokenizer train": tokenizer_train,
    "tokenizer encode": tokenizer_encode,
    "tokenizer decode": tokenizer_decode,
    "tokenizer export": tokenizer_export,
    "tokenizer inspect": tokenizer_inspect,
    "tokenizer warm": tokenizer_warm,
    "train": train,
    "sweep": sweep,
    "export": export,
    "checkpoint convert": checkpoint_convert,
    "generate": generate,
    "eval": evaluate,
    "chat": chat,
    "serve": serve,
    "account": account,
    "bench": bench,
    "bench tune": bench_tune,
    "bench report": bench_report,
    "bench compare": bench_compare,
    "doctor": doctor,
}
# Commands for words that other tools use.
SYNONYMS = {
    "benchmark": "bench",
    "decode": "tokenizer decode",
    "download": "corpus fetch",
    "encode": "tokenizer encode",
    "evaluate": "eval",
    "fine-tune": "train --init FOLDER",
    "finetune": "train --init FOLDER",
    "flops": "account",
    "inference": "generate",
    "pretrain": "train",
    "profile": "train PRESET --profile",
    "resume": "train PRESET --resume auto",
    "sample": "generate",
    "sft": "train --init FOLDER",
    "tokenize": "tokenizer encode",
    "tune": "bench tune",
}
# Commands that parse their arguments themselves: their options come from dataclasses, or do not need tyro.
_PARSE_THEMSELVES = (
    demo,
    train,
    sweep,
    generate,
    chat,
    serve,
    evaluate,
    account,
    bench,
    bench_tune,
    bench_report,
    bench_compare,
    doctor,
)


def usage(group: str = "") -> str:
    """Return the list of commands, or the commands of a group."""
    lines = [f"usage: tilewright {group}{' ' if group else ''}COMMAND [OPTIONS]", ""]
    if not group:
        lines += ["Trains Transformer language models, from raw text to generated text.", ""]
    for name, function in COMMANDS.items():
        if not group or name.startswith(f"{group} "):
            summary = (function.__doc__ or "").partition("\n")[0]
            lines.append(f"  {name.removeprefix(group).strip():18} {summary}")
    lines += ["", f"tilewright {group}{' ' if group else ''}COMMAND --help shows the options of a command."]
    if not group:
        lines.append("tilewright --version shows the version.")
    return "\n".join(lines)


def suggestions(command: str) -> list[str]:
    """Return commands near an unknown one: synonyms, commands that end with the word, and similar spellings."""
    group, _, word = command.rpartition(" ")
    if not group and word in SYNONYMS:
        return [SYNONYMS[word]]
    names = [name for name in COMMANDS if name.startswith(f"{group} ")] if group else list(COMMANDS)
    ends = [name for name in names if name.split()[-1] == word]
    known = {name.removeprefix(group).strip(): name for name in names}
    if not group:
        known |= SYNONYMS | {name.split()[0]: name.split()[0] for name in names}
    return ends or [known[near] for near in difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.7)]


def run(arguments: Sequence[str]) -> None:
    """Run the subcommand that `arguments`, at least one word, begin with."""
    for words in (2, 1):
        name, rest = " ".join(arguments[:words]), arguments[words:]
        function = COMMANDS.get(name)
        if function is not None:
            function(rest) if function in _PARSE_THEMSELVES else parse(function, name, rest)
            return
    word = arguments[0]
    group = word if any(name.startswith(f"{word} ") for name in COMMANDS) else ""
    rest = arguments[1:] if group else arguments
    if not rest or rest[0] in ("-h", "--help"):
        print(usage(group))
        return
    command = " ".join(arguments[:2] if group else [word])
    if near := suggestions(command):
        raise UserError(f"command {command!r} is unknown: try {' or '.join(f'`tilewright {name}`' for name in near)}")
    known = [name.removeprefix(group).strip() for name in COMMANDS if name.startswith(group)]
    raise UserError(f"command {command!r} is unknown: choose one of {', '.join(known)}")
