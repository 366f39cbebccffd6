"""Build the null GPU and install it where PyTorch loads NVIDIA's libraries: `python install.py` with the environment's Python.

The environment needs PyTorch's CUDA build without the `nvidia-*` packages (`pip install --no-deps torch`). PyTorch then finds
as many GPUs as the variable NULL_GPU gives, by default none. Without NULL_GPU it behaves like a CPU build.
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
# The headers of PyTorch's CUDA version. Only the headers of these packages are used.
HEADERS = ("nvidia-cuda-runtime==13.0.96", "nvidia-cuda-crt==13.0.88")
# One file contains the functions of all libraries. Triton loads it under this name.
LIBRARY = "libcuda.so.1"
# Names under which it is opened at run time: the linker's name, and the library for NVLink queries.
FURTHER_NAMES = {"libcuda.so", "libnvidia-ml.so.1"}
FOREIGN = re.compile(r"lib(cu|nv|nccl)\w*\.so\.\d+")
SYMBOL = re.compile(r"(cu|nv|nccl|__cuda)\w+")
# Library functions that count as launches.
COMPUTES = re.compile(r"cublas\w*(Gemm|gemm|Matmul$|gemv|dot)\w*|cudnnBackendExecute|nccl(All|Reduce|Broadcast|Send|Recv)\w*")


def library_folder() -> Path:
    """Return the folder of PyTorch's libraries."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit("torch is not installed here")
    return Path(spec.origin).parent / "lib"


def _lines(*command: str | Path) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def needed_libraries(libraries: Iterable[Path]) -> set[str]:
    """Return the names of the NVIDIA libraries that `libraries` depend on."""
    shown = [line for path in libraries for line in _lines("readelf", "--dynamic", path) if "(NEEDED)" in line]
    return {match[0] for line in shown if (match := FOREIGN.search(line))}


def symbols(libraries: Iterable[Path], which: str) -> set[str]:
    """Return the functions with NVIDIA-like names that are `--undefined-only` or `--defined-only` in the libraries."""
    shown = [line.split()[-1].split("@")[0] for path in libraries for line in _lines("nm", "--dynamic", which, path)]
    return {name for name in shown if SYMBOL.fullmatch(name)}


def driver_functions(libraries: Iterable[Path]) -> set[str]:
    """Return the driver and NVML functions that PyTorch and Triton look up by name at run time."""
    texts = [path.read_bytes() for path in libraries if path.name == "libc10_cuda.so"]
    triton = find_spec("triton")
    if triton is not None and triton.origin is not None:
        texts.append((Path(triton.origin).parent / "backends/nvidia/driver.c").read_bytes())
    return {name.decode() for text in texts for name in re.findall(rb"\b(?:cu[A-Z][a-z]+|nvml)[A-Z]\w+\b", text)}


def stubs(names: Iterable[str]) -> str:
    """Return the source of C functions with these names that do nothing."""
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
    """Build and install the library for this environment's PyTorch; return its path."""
    folder = library_folder()
    own = sorted(path for path in folder.glob("*.so") if not path.is_symlink())
    needed = needed_libraries(own)
    if not needed:
        sys.exit(f"{folder} holds a CPU build of PyTorch: expected a CUDA build")
    real = [path for name in needed for path in (folder.parent.parent / "nvidia").glob(f"**/{name}")]
    if real:
        sys.exit(f"{real[0]} is NVIDIA's library: install torch with --no-deps into a separate environment")
    with tempfile.TemporaryDirectory() as headers:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", headers, *HEADERS]
        subprocess.run(pip, check=True)
        include = next(Path(headers).glob("nvidia/*/include"))
        # Built twice: the first build shows which functions the sources define.
        first = Path(headers) / LIBRARY
        compile_library(first, (), include)
        wanted = symbols(own, "--undefined-only") | driver_functions(own)
        missing = wanted - symbols(own, "--defined-only") - symbols([first], "--defined-only")
        library = folder / LIBRARY
        # Replace atomically: running processes keep the old library, and new ones never load an incomplete file.
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
