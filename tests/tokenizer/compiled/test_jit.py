"""Compiling and caching of compiled functions, and the messages about it; each test runs in its own process."""

import hashlib
import os
import re
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

MESSAGE = "compiling the tokenizer for this machine (once)"


@pytest.fixture
def run(tmp_path):
    (tmp_path / "example.py").write_text(EXAMPLE)

    def run(beginning=""):
        arguments = [sys.executable, "-B", "-c", beginning + SCRIPT]
        environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
        done = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False, cwd=tmp_path)
        assert done.stderr == ""
        return re.sub(r"compiled in [\d.]+ s", "compiled in TIME", done.stdout).splitlines()

    return run


def cached_files(folder):
    return [*folder.glob("cache/*/example.total-*")]


def test_compiling_is_reported_once_and_cached_code_is_not(run, tmp_path):
    messages = run()
    [path] = cached_files(tmp_path)
    assert messages == [MESSAGE, f"compiled in TIME, stored in {path.parent}", "10"]
    assert run() == ["10"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_fork_waits_for_the_compiler():
    compiling_now, done, encoded = threading.Event(), threading.Event(), []

    def compile():
        with jit.LOCK:
            compiling_now.set()
            done.wait(0.2)
            # A log handler may encode text, which acquires this lock: the waiting fork must not hold it yet.
            encoded.append(jit.WORK_LOCK.acquire(timeout=5))
            if encoded[0]:
                jit.WORK_LOCK.release()

    thread = threading.Thread(target=compile)
    thread.start()
    compiling_now.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os._exit(0 if jit.LOCK.acquire(timeout=5) and jit.WORK_LOCK.acquire(timeout=5) else 1)
    done.set()
    thread.join()
    assert encoded == [True]
    assert os.waitpid(child, 0)[1] == 0


def test_damaged_code_is_compiled_again(run, tmp_path):
    run()
    [path] = cached_files(tmp_path)
    path.write_bytes(path.read_bytes()[:50])
    assert run()[0] == MESSAGE
    assert run() == ["10"]
    # Intact, but not readable by this Numba.
    path.write_bytes(hashlib.sha256(b"foreign").digest() + b"foreign")
    warning, *messages = run()
    assert warning.startswith("cannot load the machine code of example.total, compiling it again: ")
    assert messages[0] == MESSAGE
    assert run() == ["10"]


def test_compiling_works_without_a_writable_cache(run, tmp_path):
    # A file in place of the folder is not writable, not even for root.
    (tmp_path / "file").write_text("")
    nowhere = f"""
from pathlib import Path
from tilewright.tokenizer.compiled import store
store.machine_code_folders = lambda: [Path({str(tmp_path / "file")!r})]
"""
    expected = [MESSAGE, "compiled in TIME, not stored, because no cache folder is writable: set NUMBA_CACHE_DIR", "10"]
    assert run(nowhere) == expected
    assert run(nowhere) == expected


def test_numba_is_imported_only_to_compile():
    script = "import sys, tilewright.tokenizer; print('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "False\n"


def test_compiled_functions_have_distinct_names():
    assert len({each.name for each in jit.ALL}) == len(jit.ALL) > 15


def test_disabled_jit_raises():
    arguments = [sys.executable, "-c", "from tilewright.tokenizer.compiled import jit\nimport tilewright\njit._numba()"]
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
