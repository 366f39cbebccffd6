"""The command `tilewright`: one subcommand for each thing a person does.

Each subcommand is a function whose typed arguments tyro turns into options. They import what they need when they run, so
that `tilewright --help` does not wait for torch.
"""

import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from . import __version__
from .errors import UserError

Positional = tyro.conf.Positional


def demo(arguments: Sequence[str]) -> None:
    """Turn raw text into a model that writes stories, on any machine, in minutes."""
    from .train.demo import DemoConfig, run_demo

    run_demo(_parse(DemoConfig, "demo", arguments, demo.__doc__))


def corpus_stories(
    out: Path = Path("data/stories"),
    megabytes: float = 100.0,
    valid_megabytes: float = 2.0,
    seed: int = 0,
) -> None:
    """Write the embedded corpus: children's stories from a seeded generator, as train.txt and valid.txt.

    Args:
        out: Folder of the two files.
        megabytes: Size of train.txt, in MB.
        valid_megabytes: Size of valid.txt, in MB; its stories are others.
        seed: The same seed gives the same bytes.
    """
    from .files import require_absent
    from .train.data.corpus import check_stories, write_stories

    train, valid = (require_absent(out / name) for name in ("train.txt", "valid.txt"))
    for size in (megabytes, valid_megabytes):
        check_stories(size, seed)
    write_stories(train, megabytes, seed=2 * seed)
    write_stories(valid, valid_megabytes, seed=2 * seed + 1)
    print(f"wrote {train} and {valid}; next: tilewright tokenizer train {train}")


def corpus_fetch(name: Positional[Literal["tinystories", "openwebtext"]], out: Path | None = None) -> None:
    """Download a corpus from the Hugging Face hub, as train.txt and valid.txt; an interrupted download goes on.

    Args:
        name: Which corpus.
        out: Folder of the two files; by default data/NAME.
    """
    from .train.data.corpus import fetch

    folder = out or Path("data") / name
    fetch(name, folder)
    print(f"next: tilewright tokenizer train {folder / 'train.txt'}")


def corpus_split(texts: Positional[tuple[Path, ...]], out: Path, valid_share: float = 0.01) -> None:
    """Split texts into train.txt and valid.txt, each document by the hash of its own bytes.

    Args:
        texts: Files, folders or globs of UTF-8 text, plain, .gz or .zst, with <|endoftext|> after each document.
        out: Folder of the two files.
        valid_share: Share of the documents that become validation text.
    """
    from .train.data.corpus_split import split_corpus

    split = split_corpus(texts, out, valid_share)
    sides = {"train.txt": (split.train_documents, split.train_bytes), "valid.txt": (split.valid_documents, split.valid_bytes)}
    for name, (documents, size) in sides.items():
        print(f"wrote {out / name}: {documents:,} documents, {size / 1e6:,.1f} MB")
    print(f"next: tilewright tokenizer train {out / 'train.txt'}")


def tokenizer_train(
    texts: Positional[tuple[Path, ...]] = (),
    vocab_size: tuple[int, ...] = (10_000,),
    special_tokens: tuple[str, ...] = ("<|endoftext|>",),
    out: Path | None = None,
    pattern: str = "gpt2",
    ties: Literal["cs336", "huggingface"] = "cs336",
    min_frequency: int = 1,
    max_token_length: int | None = None,
    column: str = "text",
    memory: str | None = None,
    num_workers: int | None = None,
    extend: Path | None = None,
    save_counts: Path | None = None,
    from_counts: Path | None = None,
) -> None:
    """Train a byte-level BPE tokenizer on text.

    Args:
        texts: Files, folders or globs of UTF-8 text, plain, .gz or .zst; .jsonl and .parquet with a document a row.
        vocab_size: Tokens in all: 256 bytes, merges, special tokens. Of several, each is written, as tokenizer-SIZE.json.
        special_tokens: Tokens that merges never cross; they separate the documents of plain text.
        out: Where to write it; by default tokenizer.json beside the first text or the counts.
        pattern: How text splits into pretokens: gpt2, cl100k, o200k, or a regular expression.
        ties: Which of several most frequent pairs merges first: the lexicographically greater, or as Hugging Face has it.
        min_frequency: A pair that occurs less often never merges.
        max_token_length: Longest token, in bytes.
        column: Where the text is in .jsonl and .parquet.
        memory: How much counts may take, such as 500MB or 2GB; what is more is kept on disk beside --out.
        num_workers: Threads; by default one a core.
        extend: A tokenizer whose merges come first, under new ids; its pattern and special tokens are used.
        save_counts: A file for the counts of pretokens, from which other sizes can be trained at once.
        from_counts: Such a file, in place of text; its pattern and special tokens are used.
    """
    import time

    from .files import require_absent
    from .tokenizer import Tokenizer, counts_file
    from .tokenizer.formats import save_tokenizer
    from .tokenizer.pretokens import count_text
    from .tokenizer.sources import Files
    from .tokenizer.trainer import check_training, known_ids, learn_bpe, shorten_vocab

    if bool(texts) == (from_counts is not None):
        raise UserError("either texts or --from-counts is needed: make a corpus with `tilewright corpus`")
    base = from_counts or texts[0]
    path = out or (base if base.is_dir() else base.parent) / "tokenizer.json"
    several = len(set(vocab_size)) > 1
    if not vocab_size:
        raise UserError("--vocab-size has no value: at least one size is needed")
    paths = {size: path.with_stem(f"{path.stem}-{size}") if several else path for size in sorted(set(vocab_size))}
    if save_counts and save_counts.resolve() in {each.resolve() for each in paths.values()}:
        raise UserError(f"--save-counts is {save_counts}, where the tokenizer is to go: name another file")
    for each in (*paths.values(), *([save_counts] if save_counts else [])):
        require_absent(each)
    known = None
    if extend:
        known = Tokenizer.load(extend)
        known_ids(known.merges)
        pattern, special_tokens = known.pattern, tuple(known.special_tokens)
    rules: dict[str, Any] = {"ties": ties, "min_frequency": min_frequency, "max_token_length": max_token_length}
    start = time.perf_counter()
    if from_counts:
        text = counts_file.load_counts(from_counts)
        if known and (text.pattern, {*text.special_tokens}) != (pattern, {*special_tokens}):
            raise UserError(f"{extend} has another pattern or other special tokens than the counts in {from_counts}")
    else:
        check_training(min(paths), special_tokens, **rules)
        check_training(max(paths), special_tokens, num_known=len(known.merges) if known else 0)
        path.parent.mkdir(parents=True, exist_ok=True)
        options: dict[str, Any] = {"memory": _parse_bytes(memory), "scratch": path.parent, "num_workers": num_workers}
        text = count_text([Files(each, column) for each in texts], special_tokens, pattern=pattern, **options)
    if save_counts:
        counts_file.save_counts(save_counts, text)
    check_training(min(paths), text.special_tokens)
    _, merges = learn_bpe(text, max(paths), **rules, known_merges=known.merges if known else ())
    figures = {"text_bytes": text.text_bytes, "distinct_pretokens": len(text.counts), **rules}
    for size, each in paths.items():
        tokenizer = Tokenizer(*shorten_vocab(merges, size, text.special_tokens), text.special_tokens, text.pattern)
        save_tokenizer(each, tokenizer.data._replace(training=figures))
        specials = {token.encode() for token in text.special_tokens}
        longest = max((token for token in tokenizer.vocab.values() if token not in specials), key=len)
        print(
            f"wrote {each}: {tokenizer.vocab_size:,} tokens in {time.perf_counter() - start:.1f} s; "
            f"the longest is {longest.decode(errors='replace')!r}"
        )


def _parse_bytes(size: str | None) -> int | None:
    if size is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)B?", size.strip(), re.IGNORECASE)
    if found is None:
        raise UserError(f"memory is {size!r}: a size such as 500MB or 2GB is needed")
    return int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " "))


def tokenizer_encode(
    text: Positional[Path], tokenizer: Path | None = None, out: Path | None = None, num_workers: int | None = None
) -> None:
    """Encode a text file to a token file, in parallel; an interrupted encoding goes on.

    Args:
        text: UTF-8 text.
        tokenizer: The tokenizer's file; by default tokenizer.json beside the text.
        out: Where to write the tokens; by default beside the text, with the ending .tokens.
        num_workers: Threads; by default one a core.
    """
    from .files import require_absent, require_file
    from .tokenizer import Tokenizer
    from .train.data.encoding import encode_text

    require_file(text, "text file", "make a corpus with `tilewright corpus`")
    path = require_absent(out or text.with_suffix(".tokens"))
    file = tokenizer or text.with_name("tokenizer.json")
    loaded = Tokenizer.load(require_file(file, "tokenizer", "make one with `tilewright tokenizer train`"))
    header = encode_text(text, loaded, path, num_workers)
    ratio = header.text_bytes / max(1, header.num_tokens)
    print(f"wrote {path}: {header.num_tokens:,} tokens as {header.dtype}, {ratio:.3f} bytes/token")


def tokenizer_decode(tokens: Positional[Path], tokenizer: Path | None = None) -> None:
    """Print the text of a token file.

    Args:
        tokens: A token file.
        tokenizer: The tokenizer's file; by default tokenizer.json beside the tokens.
    """
    from .files import require_file
    from .tokenizer import Tokenizer
    from .train.data.datasets import open_dataset
    from .train.data.encoding import decode_text
    from .train.data.token_file import TokenDataset

    TokenDataset(tokens)
    file = tokenizer or tokens.with_name("tokenizer.json")
    loaded = Tokenizer.load(require_file(file, "tokenizer", "name one with --tokenizer"))
    for piece in decode_text(open_dataset(tokens, loaded), loaded):
        sys.stdout.buffer.write(piece)
    sys.stdout.buffer.flush()


def tokenizer_export(
    source: Positional[Path], to: Literal["huggingface", "tiktoken", "gpt2", "tilewright"], out: Path | None = None
) -> None:
    """Write a tokenizer in the format of another library; it gives the same ids there.

    Args:
        source: A run's folder, or a tokenizer's file: Tilewright's own or a tokenizer.json of Hugging Face's.
        to: huggingface: one tokenizer.json; tiktoken: its ranks; gpt2: a folder with vocab.json and merges.txt.
        out: Where to write it; by default beside the file, under the name of the format.
    """
    from .files import require_absent
    from .tokenizer import Tokenizer
    from .tokenizer.formats import load_tokenizer, save_gpt2_files, save_huggingface, save_tiktoken, save_tokenizer

    file = _tokenizer_file(source)
    names = {"huggingface": "huggingface.json", "tiktoken": "ranks.tiktoken", "gpt2": "gpt2", "tilewright": "tilewright.json"}
    save = {"huggingface": save_huggingface, "tiktoken": save_tiktoken, "gpt2": save_gpt2_files, "tilewright": save_tokenizer}
    path = require_absent(out or file.with_name(names[to]))
    data = load_tokenizer(file)
    save[to](path, Tokenizer.of(data).data._replace(training=data.training))
    apart = f"; it does not hold the pattern, {data.pattern}, nor the special tokens, {data.special_tokens}"
    print(f"wrote {path}: {len(data.vocab):,} tokens{apart if to in ('tiktoken', 'gpt2') else ''}")


def tokenizer_inspect(source: Positional[Path], text: Path | None = None) -> None:
    """Show a tokenizer's longest tokens, and how it takes to a text: bytes per token, unused tokens, a split.

    Args:
        source: A run's folder, or a tokenizer's file: Tilewright's own or a tokenizer.json of Hugging Face's.
        text: UTF-8 text to look at through it.
    """
    from rich.console import Console

    from .files import require_file
    from .tokenizer import Tokenizer
    from .tokenizer.formats import load_tokenizer
    from .tokenizer.inspect import beginning, coloured, report, split_of

    file = _tokenizer_file(source)
    if text is not None:
        require_file(text, "text file")
    data = load_tokenizer(file)
    tokenizer = Tokenizer.of(data)
    for name, line in report(data, tokenizer, text).items():
        print(f"{name:16} {line}")
    if text is not None:
        split = split_of(tokenizer, beginning(text))
        console = Console()
        print()
        console.print(coloured(split)) if console.is_terminal else print("|".join(split))


def _tokenizer_file(source: Path) -> Path:
    from .files import require_file

    file = source / "tokenizer.json" if source.is_dir() else source
    return require_file(file, "tokenizer", "name a run's folder or a tokenizer's file")


def train(arguments: Sequence[str]) -> None:
    """Train a model by a preset, any setting of which can be given anew; see `tilewright train PRESET --help`."""
    from .train.command import run_train_command

    run_train_command(arguments, "tilewright train")


def sweep(arguments: Sequence[str]) -> None:
    """Train a preset at every point of a grid of options; see `tilewright sweep --help`."""
    from .train.command import run_sweep_command

    run_sweep_command(arguments, "tilewright sweep")


def export(
    run: Positional[Path],
    to: Literal["hf"] = "hf",
    out: Path | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Write a run's model and tokenizer as a folder in Llama's format, which transformers loads.

    Args:
        run: Folder of the run.
        to: The format; hf is Llama's in Hugging Face's manner.
        out: The new folder; by default hf in the run's.
        dtype: Of the weights.
    """
    from .train.export import export_run

    print(f"wrote {export_run(run, to, out, dtype)}")


def checkpoint_convert(folder: Positional[Path], out: Positional[Path], num_shards: int | None = None) -> None:
    """Write a checkpoint again, as single files or in shards.

    Args:
        folder: A checkpoint, such as RUN/checkpoints/step-00000200.
        out: The new folder.
        num_shards: Shards of each file; by default single files.
    """
    from .train.checkpoint.sharded import convert_checkpoint

    if num_shards is not None and num_shards < 1:
        raise UserError(f"num_shards is {num_shards}: it must be at least 1")
    convert_checkpoint(folder, out, num_shards)
    print(f"wrote {out}")


def generate(arguments: Sequence[str]) -> None:
    """Let a trained model go on with a text."""
    from .train import SampleConfig, write_texts
    from .train.export import load_model

    def command(
        run: Positional[Path],
        config: Annotated[SampleConfig, tyro.conf.arg(name="")] = SampleConfig(),  # noqa: B008
        device: str = "auto",
    ) -> None:
        """Let a trained model go on with a text.

        Args:
            run: Folder of a run, or of a model in Llama's format.
            config: How.
            device: cuda, cpu, or auto.
        """
        print("\n\n---\n\n".join(write_texts(*load_model(run, device), config)))

    _parse(command, "generate", arguments)


def account(arguments: Sequence[str]) -> None:
    """Count a model's parameters, FLOPs, memory, time and money; see `tilewright account --help`."""
    import json

    from .model.accounting.plot import plot_account
    from .model.accounting.report import AccountConfig, model_of
    from .model.accounting.report import account as make_report
    from .model.accounting.tables import print_report

    def command(
        preset: Positional[str],
        config: Annotated[AccountConfig, tyro.conf.arg(name="")] = AccountConfig(),  # noqa: B008
    ) -> None:
        """Count a model's parameters, FLOPs, memory, time and money.

        Args:
            preset: A model by name, such as gpt2-xl.
            config: What to account for.
        """
        report = make_report(preset, config)
        if config.plot is not None:
            shape = model_of(preset, config)
            plot_account(preset, shape, report["batch_size"], report["context_length"], config.policy, config.plot)
        print(json.dumps(report, indent=2)) if config.json else print_report(report)

    _parse(command, "account", arguments)


def bench(arguments: Sequence[str]) -> None:
    """Measure the kernels, the tokenizer and the training loop; see `tilewright bench --help`."""
    from .bench import BenchConfig, run_bench

    run_bench(_parse(BenchConfig, "bench", arguments, bench.__doc__))


def bench_tune(arguments: Sequence[str]) -> None:
    """Find the fastest launches of attention's kernels on this GPU, and ship them from then on."""
    from .bench import TuneConfig, run_tune

    run_tune(_parse(TuneConfig, "bench tune", arguments, bench_tune.__doc__))


def bench_report(arguments: Sequence[str]) -> None:
    """Write all results of the bench as a page of tables and pictures, and refresh the README's table."""
    from .bench import ReportConfig, run_report

    run_report(_parse(ReportConfig, "bench report", arguments, bench_report.__doc__))


def bench_compare(arguments: Sequence[str]) -> None:
    """Compare the times of two runs of the bench; the exit status is 1 where a case has become slower."""
    from .bench import CompareConfig, run_compare

    if run_compare(_parse(CompareConfig, "bench compare", arguments, bench_compare.__doc__)):
        sys.exit(1)


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
    "train": train,
    "sweep": sweep,
    "export": export,
    "checkpoint convert": checkpoint_convert,
    "generate": generate,
    "account": account,
    "bench": bench,
    "bench tune": bench_tune,
    "bench report": bench_report,
    "bench compare": bench_compare,
}
# Their options come from dataclasses of rooms that import torch, so they parse their arguments themselves.
_PARSE_THEMSELVES = (demo, train, sweep, generate, account, bench, bench_tune, bench_report, bench_compare)


def _parse(target: Callable[..., Any], name: str, arguments: Sequence[str], description: str | None = None) -> Any:
    return tyro.cli(target, prog=f"tilewright {name}", args=list(arguments), description=description)


def _usage(group: str = "") -> str:
    lines = [f"usage: tilewright {group}{' ' if group else ''}COMMAND [OPTIONS]", ""]
    if not group:
        lines += ["Trains Transformer language models, from raw text to generated text.", ""]
    for name, function in COMMANDS.items():
        if name.startswith(group):
            summary = (function.__doc__ or "").splitlines()[0]
            lines.append(f"  {name.removeprefix(group).strip():18} {summary}")
    lines += ["", f"tilewright {group}{' ' if group else ''}COMMAND --help shows the options of a command."]
    if not group:
        lines.append("tilewright --version shows the version.")
    return "\n".join(lines)


def _run(arguments: Sequence[str]) -> None:
    for words in (2, 1):
        name, rest = " ".join(arguments[:words]), arguments[words:]
        function = COMMANDS.get(name)
        if function is not None:
            function(rest) if function in _PARSE_THEMSELVES else _parse(function, name, rest)
            return
    word = arguments[0]
    group = word if any(name.startswith(f"{word} ") for name in COMMANDS) else ""
    rest = arguments[1:] if group else arguments
    if not rest or rest[0] in ("-h", "--help"):
        print(_usage(group))
        return
    known = [name.removeprefix(group).strip() for name in COMMANDS if name.startswith(group)]
    raise UserError(f"command {' '.join(arguments[:2] if group else [word])!r} is unknown: choose one of {', '.join(known)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status: 2 for a value that cannot be used, 130 when interrupted."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["--version"]:
        print(f"tilewright {__version__}")
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0
    warnings.formatwarning = lambda message, *_, **__: f"tilewright: warning: {message}\n"
    try:
        _run(arguments)
    except UserError as error:
        print(f"tilewright: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader, such as `head`, has what it wanted; closing stderr keeps Python from complaining as it exits.
        sys.stderr.close()
        return 0
    except OSError as error:
        print(f"tilewright: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("tilewright: interrupted", file=sys.stderr)
        return 130
    return 0
