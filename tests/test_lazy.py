"""Packages import their public names on first use, and commands parse their arguments without importing torch."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tilewright.cli.command_line import COMMANDS

ROOT = Path(__file__).parent.parent
FOUND = [stub for top in ("bench", "kernels", "model", "tokenizer", "train") for stub in (ROOT / top).rglob("__init__.pyi")]
STUBS = {".".join(("tilewright", *stub.parent.relative_to(ROOT).parts)): stub for stub in FOUND}

RESOLVE = """
import importlib, json, pkgutil, sys

found = {}
for package in map(importlib.import_module, json.loads(sys.argv[1])):
    submodules = [module.name for module in pkgutil.iter_modules(package.__path__)]
    for name in submodules:
        importlib.import_module(f"{package.__name__}.{name}")
    kinds = {name: type(getattr(package, name)).__name__ for name in package.__all__}
    found[package.__name__] = [kinds, submodules, dir(package)]
print(json.dumps(found))
"""


def test_every_public_name_resolves_after_all_submodules_are_imported():
    command = [sys.executable, "-c", RESOLVE, json.dumps([*STUBS])]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(shown.stdout)
    assert set(found) >= {"tilewright.model", "tilewright.train", "tilewright.bench"}
    for package, (kinds, submodules, listed) in found.items():
        assert kinds, package
        assert not kinds.keys() & set(submodules), f"{package}: the submodule would replace the public name"
        assert "module" not in kinds.values(), package
        assert kinds.keys() <= set(listed), package


@pytest.mark.parametrize("stub", STUBS.values(), ids=STUBS)
def test_a_stub_lists_names_as_type_checkers_expect(stub):
    for node in ast.parse(stub.read_text()).body:
        assert isinstance(node, ast.ImportFrom)
        assert node.level == 1
        # Without `as`, a stub's import is private.
        assert all(name.asname == name.name for name in node.names)


def test_an_unknown_name_is_an_attribute_error():
    import tilewright.train

    with pytest.raises(AttributeError, match=r"module 'tilewright\.train' has no attribute 'dance'"):
        tilewright.train.dance  # noqa: B018


PARSE = """
import contextlib, io, json, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "numba", "matplotlib", "transformers"):
            raise AssertionError(f"{arguments} imports {name}")

sys.meta_path.insert(0, Blocker())
arguments = "the command line"
from tilewright.cli import main

for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(arguments)
        except SystemExit as exit:
            status = exit.code or 0
    print(json.dumps([arguments, status, out.getvalue(), err.getvalue()]))
"""

WRONG = [
    "account gpt9",
    "account gpt2-xl --gpu h300",
    "account gpt2-xl --batch-size auto",
    "bench nothing",
    "bench report --readme missing.md",
    "bench tune attention --head-dims 48",
    "chat folder --max-length 0",
    "demo --vocab-size 256",
    "eval folder",
    "generate folder --temperature -1",
    "serve folder --port 65536",
    "sweep stories-cpu",
    "train --init missing",
    "train gpt9",
    "train stories-cpu --optimizer.lr 0",
    "train stories-cpu --steps many",
]


def test_help_and_argument_errors_import_no_torch(tmp_path):
    (tmp_path / "model").mkdir()
    config = {
        "model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2,
        "num_hidden_layers": 1, "max_position_embeddings": 32, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    commands = [*COMMANDS, "train stories-cpu", "sweep stories-cpu", "train --init model"]
    cases = (
        {f"{name} --help": 0 for name in commands}
        | {f"{name} --no-such-option": 2 for name in commands}
        | dict.fromkeys(WRONG, 2)
    )
    command = [sys.executable, "-c", PARSE, json.dumps([case.split() for case in cases])]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    results = [json.loads(line) for line in shown.stdout.splitlines()]
    assert len(results) == len(cases)
    for (case, expected), (_, status, out, err) in zip(cases.items(), results, strict=True):
        assert status == expected, (case, out, err)
        if expected == 0:
            assert "usage" in out.lower(), case
            assert len(out) > 200, case
        else:
            assert not out, case
            assert err, case
