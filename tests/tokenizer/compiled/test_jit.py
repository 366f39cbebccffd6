"""Where compiled code is kept, and what is said when it is made: each time in a process of its own."""

import os
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest

from tilewright.tokenizer.compiled import jit

SCRIPT = """
import logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
import example
import numpy as np
print(example.total(np.arange(5)))
"""

EXAMPLE = """
from tilewright.tokenizer.compiled.jit import NUMBERS, compiled

@compiled(NUMBERS)
def total(numbers):
    sum = 0
    for number in numbers:
        sum += number
    return sum

"""

SAID = "compiling the tokenizer for this machine (once, some seconds)"


@pytest.fixture
def run(tmp_path):
    (tmp_path / "example.py").write_text(EXAMPLE)
    (tmp_path / "script.py").write_text(SCRIPT)

    def run(**environment):
        arguments = [sys.executable, "-B", tmp_path / "script.py"]
        # Beside the sources, wherever whoever runs the tests keeps his own.
        inherited = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
        done = subprocess.run(arguments, capture_output=True, text=True, env=inherited | environment, check=False)
        assert done.stderr == ""
        return done.stdout.splitlines()

    return run


def test_it_is_said_once_and_not_again_when_code_is_kept(run):
    assert run() == [SAID, "10"]
    assert run() == ["10"]


def test_code_is_made_anew_when_any_file_of_the_room_has_changed(monkeypatch):
    seen = []
    monkeypatch.setattr(jit.Path, "read_bytes", lambda path: seen.append(path.name) or b"")
    jit._sources.__wrapped__()
    assert {"unicode_classes.py", "scanner.py", "decoder.py", "jit.py"} <= {*seen}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_fork_waits_for_the_compiler():
    compiling_now, done = threading.Event(), threading.Event()

    def compile():
        with jit._LOCK:
            compiling_now.set()
            done.wait(0.2)

    thread = threading.Thread(target=compile)
    thread.start()
    compiling_now.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os._exit(0 if jit._LOCK.acquire(timeout=5) else 1)
    done.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0


def test_code_is_made_anew_when_the_kept_one_is_damaged(run, tmp_path):
    run()
    kept = [path for path in (tmp_path / "__pycache__").iterdir() if path.suffix in (".nbi", ".nbc")]
    assert kept
    for path in kept:
        path.write_bytes(path.read_bytes()[:50])
    assert run() == [SAID, "10"]
    assert run() == ["10"]


def test_it_works_where_nothing_can_be_kept(run, tmp_path):
    # A file where the folder should be: nobody can write into that, not even the superuser.
    (tmp_path / "__pycache__").write_text("")
    (tmp_path / "home").write_text("")
    nowhere = {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "home" / "cache")}
    assert run(**nowhere) == [SAID, "10"]
    assert run(**nowhere) == [SAID, "10"]


def test_a_disabled_compiler_is_named():
    arguments = [sys.executable, "-c", "import tilewright.tokenizer"]
    done = subprocess.run(arguments, capture_output=True, text=True, env=os.environ | {"NUMBA_DISABLE_JIT": "1"}, check=False)
    assert "ImportError: NUMBA_DISABLE_JIT is set" in done.stderr


def test_a_function_has_one_signature():
    from tilewright.tokenizer.counting.counter import PretokenCounter
    from tilewright.tokenizer.text.utf8 import repair_utf8

    counter = PretokenCounter()
    data = np.frombuffer(b"abc", np.uint8)
    counter.add(data, 0, np.array([3]), np.ones(1, np.int64))
    counter.add(data.copy(), 0, np.array([3]), np.ones(1, np.int64))
    assert dict(counter.counts().items()) == {b"abc": 2}
    with pytest.raises(TypeError):
        repair_utf8(np.zeros(3, np.int32))
    with pytest.raises(TypeError):
        repair_utf8(np.zeros(6, np.uint8)[::2])
