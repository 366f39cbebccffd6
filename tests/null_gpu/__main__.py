"""Run all checks on the null GPU: its own tests, the tests marked `gpu` and the rehearsal (`python -m null_gpu`, in tests/)."""

import os
import subprocess
import sys
from pathlib import Path

from .install import library_folder

TESTS = Path(__file__).resolve().parents[1]


def main() -> int:
    """Run the parts that the command line names, or all; return 1 if one of them failed."""
    environment = Path(sys.prefix)
    # Separate caches, so that autotuning results on the null GPU are never used on a real one.
    variables = {
        "NULL_GPU": "1",
        "TRITON_LIBCUDA_PATH": str(library_folder()),
        "TRITON_CACHE_DIR": str(environment / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(environment / "inductor"),
    }
    os.environ.update(variables)
    pytest = [sys.executable, "-m", "pytest", "-p", "null_gpu.plugin", "-p", "no:cacheprovider"]
    parts = {
        "own": [*pytest, str(TESTS / "null_gpu")],
        "gpu": [*pytest, "--numprocesses", "2", "--dist", "worksteal", "-m", "gpu", str(TESTS)],
        "rehearsal": [sys.executable, "-m", "null_gpu.rehearsal"],
    }
    names = sys.argv[1:] or [*parts]
    if unknown := {*names} - {*parts}:
        sys.exit(f"unknown part {', '.join(sorted(unknown))}: expected {', '.join(parts)}")
    return max([subprocess.run(parts[name], cwd=TESTS).returncode != 0 for name in names])


if __name__ == "__main__":
    sys.exit(main())
