"""Build the null GPU and put it where PyTorch looks for NVIDIA's libraries: `python install.py` in the environment's Python.

PyTorch's CUDA build must be there without the packages `nvidia-*` (`pip install --no-deps torch`). It then imports, and finds
as many GPUs as the variable NULL_GPU says, none without it: so it also serves as a CPU build of a PyTorch that has none.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = ("memory.c", "report.c", "work.c", "runtime.c", "driver.c", "libraries.c")
# The headers of the CUDA version that PyTorch was built for; the libraries of the packages are not installed.
HEADERS = ("nvidia-cuda-runtime==13.0.96", "nvidia-cuda-crt==13.0.88")
# One file has the functions of all libraries. By this name Triton finds it.
LIBRARY = "libcuda.so.1"
# The names by which it is opened at run time: the linker's, and that of the library that PyTorch asks about NVLink.
FURTHER_NAMES = {"libcuda.so", "libnvidia-ml.so.1"}
FOREIGN = re.compile(r"lib(cu|nv|nccl)\w*\.so\.\d+")
SYMBOL = re.compile(r"(cu|nv|nccl|__cuda)\w+")
# What computes in a library counts as a launch.
COMPUTES = re.compile(r"cublas\w*(Gemm|gemm|Matmul$|gemv|dot)\w*|cudnnBackendExecute|nccl(All|Reduce|Broadcast|Send|Recv)\w*")


def library_folder() -> Path:
    """Return where PyTorch's own libraries are."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit("torch is not installed here")
    return Path(spec.origin).parent / "lib"


def _lines(*command: str | Path) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def needed_libraries(libraries: Iterable[Path]) -> set[str]:
    """Return the names of NVIDIA's libraries that these ones load."""
    shown = [line for path in libraries for line in _lines("readelf", "--dynamic", path) if "(NEEDED)" in line]
    return {match[0] for line in shown if (match := FOREIGN.search(line))}


def symbols(libraries: Iterable[Path], which: str) -> set[str]:
    """Return the functions that are `--undefined-only` or `--defined-only` in libraries and may be NVIDIA's."""
    shown = [line.split()[-1].split("@")[0] for path in libraries for line in _lines("nm", "--dynamic", which, path)]
    return {name for name in shown if SYMBOL.fullmatch(name)}


def driver_functions(libraries: Iterable[Path]) -> set[str]:
    """Return the driver's and NVML's functions that are found by their names at run time, by PyTorch and Triton."""
    texts = [path.read_bytes() for path in libraries if path.name == "libc10_cuda.so"]
    triton = find_spec("triton")
    if triton is not None and triton.origin is not None:
        texts.append((Path(triton.origin).parent / "backends/nvidia/driver.c").read_bytes())
    return {name.decode() for text in texts for name in re.findall(rb"\b(?:cu[A-Z][a-z]+|nvml)[A-Z]\w+\b", text)}


def stubs(names: Iterable[str]) -> str:
    """Return C functions of these names that do nothing."""
    lines = ['#include "null.h"']
    for name in sorted(names):
        body = f'return library_call("{name}");' if COMPUTES.fullmatch(name) else "return 0;"
        lines.append(f"long {name}(void) {{ {body} }}")
    return "\n".join(lines) + "\n"


def compile_library(target: Path, stubbed: Iterable[str], headers: Path) -> None:
    """Compile the null GPU to a shared library."""
    with tempfile.TemporaryDirectory() as folder:
        generated = Path(folder) / "stubs.c"
        generated.write_text(stubs(stubbed))
        sources = [HERE / name for name in SOURCES]
        options = ["-O1", "-shared", "-fPIC", "-fno-builtin", "-Wall", "-Wno-unused-function", f"-Wl,-soname,{LIBRARY}"]
        command = ["gcc", *options, f"-I{HERE}", f"-I{headers}", "-o", target, *sources, generated, "-ldl", "-lpthread"]
        subprocess.run(command, check=True)


def install() -> Path:
    """Build the library for the PyTorch of this environment, and return it."""
    folder = library_folder()
    own = sorted(path for path in folder.glob("*.so") if not path.is_symlink())
    needed = needed_libraries(own)
    if not needed:
        sys.exit(f"{folder} holds a CPU build of PyTorch, for which there is no GPU to stand in for")
    real = [path for name in needed for path in (folder.parent.parent / "nvidia").glob(f"**/{name}")]
    if real:
        sys.exit(f"{real[0]} is NVIDIA's own: install torch with --no-deps into an environment of its own")
    with tempfile.TemporaryDirectory() as headers:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", headers, *HEADERS]
        subprocess.run(pip, check=True)
        include = next(Path(headers).glob("nvidia/*/include"))
        # Built twice: the first shows which functions the sources have.
        first = Path(headers) / LIBRARY
        compile_library(first, (), include)
        wanted = symbols(own, "--undefined-only") | driver_functions(own)
        missing = wanted - symbols(own, "--defined-only") - symbols([first], "--defined-only")
        library = folder / LIBRARY
        # A process that has loaded the old library keeps it, and one that starts meanwhile finds a whole one.
        built = folder / f"{LIBRARY}.{os.getpid()}"
        compile_library(built, missing, include)
        built.replace(library)
    for name in {*needed, *FURTHER_NAMES} - {LIBRARY}:
        link = folder / f"{name}.{os.getpid()}"
        link.symlink_to(LIBRARY)
        link.replace(folder / name)
    return library


if __name__ == "__main__":
    print(f"built {install()}")
