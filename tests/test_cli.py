import json
import subprocess
import sys

import pytest

import tilewright
from tilewright.cli import main
from tilewright.cli.command_line import COMMANDS, SYNONYMS


def run(capsys, *arguments):
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as exit:  # from tyro
        status = exit.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def folder(corpus, tmp_path, monkeypatch):
    """The working directory: a temporary folder with the texts of a small corpus in data/."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("train.txt", "valid.txt"):
        (tmp_path / "data" / name).write_bytes((corpus / name).read_bytes())
    return tmp_path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    from tilewright.train.data.corpus import write_stories

    folder = tmp_path_factory.mktemp("cli")
    write_stories(folder / "train.txt", 0.1, seed=0)
    write_stories(folder / "valid.txt", 0.05, seed=1)
    return folder


TRAIN = (
    "train", "stories-cpu", "--model.vocab-size", 300, "--model.d-model", 16, "--model.num-heads", 2,
    "--model.context-length", 32,
    "--data.train", "data/train.txt", "--data.valid", "data/valid.txt", "--data.tokenizer", "data/tokenizer.json",
    "--steps", 4, "--eval-sequences", 8, "--optimizer.warmup-steps", 1, "--batch-size", 2, "--device", "cpu",
    "--out", "runs/one",
)  # fmt: skip


def test_train_tokenize_generate_and_resume(capsys, folder):
    status, out, _ = run(capsys, "tokenizer", "train", "data/train.txt", "--vocab-size", 300)
    assert status == 0
    assert out.startswith("wrote data/tokenizer.json: 300 tokens in")
    status, out, _ = run(capsys, "tokenizer", "encode", "data/train.txt")
    assert status == 0
    assert "as uint16" in out
    status, out, err = run(capsys, *TRAIN)
    assert status == 0, err
    assert "runs/one: validation loss" in out
    assert "step 4/4" in err
    status, out, _ = run(capsys, "generate", "runs/one", "--prompt", "One day", "--max-new-tokens", 5, "--seed", 1)
    assert status == 0
    assert out.startswith("One day")
    # A resumed run uses its saved settings.
    status, out, err = run(capsys, "train", "stories-cpu", "--out", "runs/one", "--resume", "auto")
    assert status == 0, err
    # New settings are checked against the saved ones, not against the preset, whose warmup is longer than this run.
    status, out, err = run(capsys, "train", "stories-cpu", "--out=runs/one", "--resume=auto", "--steps", 6, "--extend", 1e-3)
    assert status == 0, err
    assert "step 6/6" in err


def test_a_tokenizer_is_trained_from_counts_in_several_sizes(capsys, folder):
    train = ("tokenizer", "train")
    assert run(capsys, *train, "data", "--out", "whole.json", "--vocab-size", 320, "--save-counts", "both.counts")[0] == 0
    status, out, _ = run(capsys, *train, "--from-counts", "both.counts", "--out", "of.json", "--vocab-size", 280, 320)
    assert status == 0
    assert [line.split(":")[0] for line in out.splitlines()] == ["wrote of-280.json", "wrote of-320.json"]
    assert (folder / "of-320.json").read_bytes() == (folder / "whole.json").read_bytes()
    extend = ("--extend", "of-280.json", "--out", "again.json", "--vocab-size", 320)
    assert run(capsys, *train, "data/*.txt", "--memory", "64 MB", *extend)[0] == 0
    assert (folder / "again.json").read_bytes() == (folder / "whole.json").read_bytes()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_counts_must_match_the_options(capsys, folder):
    train = ("tokenizer", "train")
    assert run(capsys, *train, "data/train.txt", "--out", "a.json", "--vocab-size", 280, "--save-counts", "counts")[0] == 0
    options = ("--pattern", "o200k", "--out", "b.json", "--vocab-size", 280)
    assert run(capsys, *train, "data/train.txt", *options)[0] == 0
    status, _, err = run(capsys, *train, "--from-counts", "counts", "--extend", "b.json", "--out", "c.json")
    assert status == 2
    assert "b.json and the counts in counts differ in pattern or special tokens" in err
    status, _, err = run(capsys, *train, "data/train.txt", "--from-counts", "counts", "--out", "c.json")
    assert (status, err) == (2, err)
    assert "expected either texts or --from-counts" in err


def test_decoding_prints_the_text(capfdbinary, folder):
    assert main(["tokenizer", "train", "data/valid.txt", "--vocab-size", "280"]) == 0
    assert main(["tokenizer", "encode", "data/valid.txt"]) == 0
    capfdbinary.readouterr()
    assert main(["tokenizer", "decode", "data/valid.tokens"]) == 0
    assert capfdbinary.readouterr().out == (folder / "data" / "valid.txt").read_bytes()


def test_several_texts_are_encoded_to_shards(capsys, folder):
    assert run(capsys, "tokenizer", "train", "data/valid.txt", "--vocab-size", 280)[0] == 0
    status, out, err = run(capsys, "tokenizer", "encode", "data/*.txt")
    assert status == 0, err
    assert out.startswith("wrote ")
    assert "data.tokens: " in out
    assert "tokens in 2 shards as uint16" in out
    names = sorted(path.name for path in (folder / "data.tokens").iterdir())
    assert names == ["index.json", "train.txt.tokens", "valid.txt.tokens"]
    # Encoding again keeps the files and prints the same lines.
    assert run(capsys, "tokenizer", "encode", "data/*.txt") == (0, out, "")
    status, _, err = run(capsys, "tokenizer", "encode", "data/train.txt", "data/valid.txt")
    assert status == 2
    assert "cannot encode 2 texts without --out: name a folder for their shards" in err


def test_the_embedded_corpus(capsys, folder):
    options = ("corpus", "stories", "--megabytes", 0.05, "--valid-megabytes", 0.02, "--out", "data/stories")
    status, out, _ = run(capsys, *options)
    assert status == 0
    assert "next: tilewright tokenizer train data/stories/train.txt" in out
    assert (folder / "data/stories/train.txt").read_text() != (folder / "data/stories/valid.txt").read_text()
    status, _, err = run(capsys, *options)
    assert status == 2
    assert "train.txt exists already" in err


def test_help_lists_every_command(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0
    for name in COMMANDS:
        assert f"\n  {name} " in out, name


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        ("profile", "train PRESET --profile"),
        ("finetune", "train --init FOLDER"),
        ("fine-tun", "train --init FOLDER"),
        ("tokenize", "tokenizer encode"),
        ("benchmark", "bench"),
        ("trian", "train"),
        ("Train", "train"),
        ("stories", "corpus stories"),
        ("corpus fecth", "corpus fetch"),
        ("tokenizer inspekt", "tokenizer inspect"),
        ("bench repotr", "bench report"),
        ("bench kernel", "bench kernels"),
    ],
)
def test_an_unknown_command_suggests_the_near_one(capsys, arguments, command):
    status, out, err = run(capsys, *arguments.split())
    assert (status, out) == (2, "")
    assert err.endswith(f" is unknown: try `tilewright {command}`\n")


@pytest.mark.parametrize("arguments", [[""], ["tokenizer", ""], ["tokenizer", "--json"], ["--json"]])
def test_an_unknown_command_without_a_near_one_lists_the_commands(capsys, arguments):
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert f"command {' '.join(arguments)!r} is unknown: choose one of " in err


def test_suggestions_are_commands():
    names = {*COMMANDS, *(name.split()[0] for name in COMMANDS)}
    for suggestion in SYNONYMS.values():
        words = [word for word in suggestion.split() if word.islower() and not word.startswith("-")]
        assert " ".join(words[:2]) in names or words[0] in names, suggestion


def test_a_group_lists_its_commands(capsys):
    status, out, _ = run(capsys, "corpus")
    assert status == 0
    assert "stories" in out
    assert "fetch" in out
    assert "demo" not in out


def test_the_version(capsys):
    assert run(capsys, "--version") == (0, f"tilewright {tilewright.__version__}\n", "")
    assert run(capsys, "version") == run(capsys, "--version")
    assert run(capsys) == run(capsys, "--help") == run(capsys, "help")


def test_help_without_docstrings(capsys, monkeypatch):
    # As under `python -OO`.
    monkeypatch.setattr(COMMANDS["demo"], "__doc__", None)
    assert run(capsys, "--help")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dance"], "command 'dance' is unknown: choose one of demo, corpus stories"),
        (["corpus", "dance"], "command 'corpus dance' is unknown: choose one of stories, fetch"),
        (["train", "gpt9"], "preset 'gpt9' is unknown: expected one of stories-cpu"),
        (["tokenizer", "train", "none.txt"], "none.txt does not exist"),
        (["tokenizer", "train", "data/train.txt", "--vocab-size", "256"], "vocab_size is 256: expected at least 257"),
        (["tokenizer", "train", "data/train.txt", "--num-workers", "0"], "num_workers is 0: expected at least 1"),
        (["tokenizer", "train", "data/train.txt", "--vocab-size"], "--vocab-size has no value"),
        (
            ["tokenizer", "train", "data/train.txt", "--out", "data/t.json", "--save-counts", "data/../data/t.json"],
            "the output file of the tokenizer: choose another file",
        ),
        (["tokenizer", "train"], "expected either texts or --from-counts"),
        (
            ["tokenizer", "train", "data/train.txt", "--memory", "much"],
            "memory is 'much': expected a size such as 500MB or 2GB",
        ),
        (
            ["tokenizer", "encode", "data/train.txt"],
            "data/tokenizer.json does not exist: make one with `tilewright tokenizer train`",
        ),
        (["tokenizer", "decode", "data/train.txt"], "is not a token file"),
        (["train", "stories-cpu", "--steps", "0"], "steps is 0: expected at least 1"),
        (["train", "stories-cpu", "--optimizer.lr", "0"], "optimizer.lr is 0.0: expected a finite number above 0"),
        (["train", "stories-cpu", "--model.num-heads", "3"], "num_heads 3 gives a head dim of"),
        (["train", "stories-cpu", "--model.rope-theta", "0"], "rope_theta is 0.0"),
        (["train", "stories-cpu", "--device", "meta"], "device is 'meta': expected auto"),
        (["train", "stories-cpu"], "data/stories/tokenizer.json does not exist"),
        (["generate", "data"], "expected the folder of a run"),
        (["generate", "data", "--num-samples", "0"], "num_samples is 0: expected at least 1"),
        (["demo", "--megabytes", "0"], "the size of the corpus is 0 MB: expected a finite number above 0"),
        (["demo", "--vocab-size", "256"], "vocab_size is 256: expected at least 257"),
        (["corpus", "stories", "--valid-megabytes", "0"], "the size of the corpus is 0 MB: expected a finite number above 0"),
        (["corpus", "stories", "--seed", "-1"], "seed is -1: expected 0 or more"),
        (["account", ""], "preset '' is unknown: expected one of stories-cpu"),
        (["chat", "nowhere"], "folder nowhere does not exist: expected a Hugging Face model folder"),
        (["account", "gpt9"], "preset 'gpt9' is unknown: expected one of stories-cpu"),
        (["account", "gpt2-small", "--gpu", "h300"], "gpu is 'h300': expected one of A100 SXM 80GB, H100 SXM"),
        (["account", "gpt2-small", "--gpu", "h100"], "gpu is 'h100': expected one of A100 SXM 80GB, H100 SXM"),
        (["account", "gpt2-xl", "--batch-size", "auto"], "batch_size auto needs --memory"),
        (["account", "gpt2-xl", "--batch-size", "0"], "batch_size is 0: expected from 1 to"),
        (["account", "gpt2-xl", "--batch-size", "auto", "--memory", "80"], "memory is '80': expected a number"),
        (["account", "gpt2-xl", "--batch-size", "auto", "--memory", "8GB"], "is too small for one sequence of 1024 tokens"),
        (["account", "gpt2-xl", "--context-length", "0"], "context_length is 0: expected from 1 to"),
        (["account", "gpt2-xl", "--gpu", "h200", "--mfu", "1.5"], "mfu is 1.5: expected from 1e-06 to 1"),
        (["account", "gpt2-xl", "--gpu", "h200", "--tokens-per-second", "1e9"], "tokens_per_second is 1000000000.0"),
        (["bench", "report", "--readme", "MISSING.md"], "README MISSING.md does not exist"),
        (["bench", "report", "--results", "data", "--readme", "data/train.txt"], "data holds no results"),
        (["bench", "kernels", "--device", "abacus"], "device is 'abacus': expected auto, cuda, cuda:N or cpu"),
    ],
)
def test_bad_input_prints_one_line_and_exits_with_2(capsys, folder, arguments, message):
    before = sorted(folder.rglob("*"))
    status, out, err = run(capsys, *arguments)
    assert status == 2
    assert out == "" or arguments[0] == "demo"
    assert message in err
    assert err.startswith("tilewright: error: ")
    assert err.count("\n") == 1
    assert sorted(folder.rglob("*")) == before or arguments[0] == "demo"


def test_accounting_as_tables_and_as_json(capsys, tmp_path):
    status, out, _ = run(capsys, "account", "gpt2-xl", "--gpu", "h200", "--batch-size", "auto", "--memory", "80GB")
    assert status == 0
    for figure in ("2,127,057,600", "4,513,336,524,800", "66.91%", "15,517,753,344 x batch + 34,032,921,600", "H200 SXM"):
        assert figure in out
    path = tmp_path / "account.png"
    options = ("--context-length", 16384, "--policy.checkpointing", 7, "--vocab-multiple", 64, "--plot", path, "--json")
    status, out, _ = run(capsys, "account", "gpt2-small", "--tokens-per-second", 1e5, "--gpu", "H100 SXM", *options)
    assert status == 0
    report = json.loads(out)
    assert report["shape"]["vocab_size"] == 50_304
    assert report["policy"]["checkpointing"] == 7
    assert report["memory"]["peak_bytes"] == max(report["memory"]["peaks_bytes"].values())
    assert report["plan"]["tokens_per_second"] == pytest.approx(1e5)
    mfu = {row["name"]: row["mfu"] for row in report["conventions"]}
    assert mfu["tilewright"] == pytest.approx(report["plan"]["mfu"])
    assert path.read_bytes().startswith(b"\x89PNG")


def test_without_a_gpu_the_known_ones_are_listed(capsys):
    status, out, _ = run(capsys, "account", "gpt2-small")
    assert status == 0
    assert "name a GPU with --gpu, one of A100 SXM 80GB, H100 SXM" in " ".join(out.split())
    assert "best possible MFU" not in out
    assert json.loads(run(capsys, "account", "gpt2-small", "--json")[1])["speed"] is None


def raising(error):
    def command():
        raise error

    return command


def test_a_warning_is_one_line(capsys, folder):
    (folder / "short.txt").write_text("the cat sat on the mat")
    with pytest.warns(UserWarning, match="no more pairs"):
        assert run(capsys, "tokenizer", "train", "short.txt", "--vocab-size", 300)[0] == 0
    script = (
        "from tilewright.cli import main; main(['tokenizer', 'train', 'short.txt', '--vocab-size', '300', '--out', 'b.json'])"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=folder)
    assert shown.stderr.startswith("tilewright: warning: the text has no more pairs to merge")
    assert shown.stderr.count("\n") == 1


def test_an_interruption_prints_one_line(capsys, monkeypatch):
    monkeypatch.setitem(COMMANDS, "tokenizer decode", raising(KeyboardInterrupt()))
    status, _, err = run(capsys, "tokenizer", "decode")
    assert status == 130
    assert err == "tilewright: interrupted\n"


def test_a_full_disk_is_an_error_without_a_traceback(capsys, monkeypatch):
    monkeypatch.setitem(COMMANDS, "tokenizer decode", raising(OSError(28, "No space left on device")))
    status, _, err = run(capsys, "tokenizer", "decode")
    assert status == 1
    assert err == "tilewright: error: [Errno 28] No space left on device\n"
