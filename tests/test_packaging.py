"""The wheel: its files, an installation outside the checkout, and the base installation without extras."""

import contextlib
import importlib.metadata
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tilewright.cli import package_metadata

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split("\0")
    if files == [""]:
        pytest.skip("needs a git checkout, to tell the project's files from others")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(out),
        str(source),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_the_wheel_holds_the_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {"tilewright/py.typed", "tilewright/train/data/stories.txt", "tilewright/train/__init__.pyi"} <= set(names)
    for package in ("kernels", "model", "tokenizer", "train", "bench"):
        assert f"tilewright/{package}/__init__.py" in names
    assert not [name for name in names if "/tests/" in name or name.split("/")[-1].startswith(("test_", "conftest"))]
    assert {name.split("/")[0] for name in names} == {"tilewright", next(n.split("/")[0] for n in names if "dist-info" in n)}


BASE_ONLY = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1:]:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
import torch
import tilewright.kernels
from tilewright.model import ModelConfig, TransformerLM, generate

x, weight = torch.randn(2, 8), torch.ones(8)
assert tilewright.kernels.rms_norm(x, weight).shape == (2, 8)
model = TransformerLM(ModelConfig(64, 16, d_model=16, num_layers=1, num_heads=2, d_ff=32))
loss = model(torch.arange(8)[None]).float().logsumexp(-1).mean()
loss.backward()
assert [len(tokens) for tokens in generate(model, [[1, 2]], max_new_tokens=2)] == [2]
"""


def dependencies(package, seen):
    """Add a package and its transitive dependencies without extras to `seen`."""
    if package not in seen:
        seen.add(package)
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            for requirement in map(Requirement, importlib.metadata.requires(package) or ()):
                if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                    dependencies(canonicalize_name(requirement.name), seen)
    return seen


def test_kernels_and_models_need_no_extras():
    base = dependencies("tilewright", set())
    extras = {name for extra in package_metadata.extras() for name in package_metadata.requirements(extra)}
    blocked = {canonicalize_name(name) for name in extras} - base
    assert {"numba", "regex", "tyro", "matplotlib", "safetensors"} <= blocked
    command = [sys.executable, "-c", BASE_ONLY, *(name.replace("-", "_") for name in blocked)]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr


@pytest.mark.long
def test_the_installed_wheel_runs_the_demo_outside_the_checkout(wheel, tmp_path):
    environment = tmp_path / "env"
    venv.create(environment, with_pip=False)
    paths = sysconfig.get_paths(vars={"base": str(environment), "platbase": str(environment)})
    purelib = Path(paths["purelib"])
    # The dependencies of this environment, but not its editable tilewright: .pth files are not read through a .pth file.
    (purelib / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    python = Path(paths["scripts"]) / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel)], check=True
    )  # fmt: skip
    command = [str(Path(paths["scripts"]) / "tilewright"), "demo", "--megabytes", "0.2", "--vocab-size", "400", "--steps", "2"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "validation loss" in shown.stdout
    assert (tmp_path / "runs" / "demo" / "loss.png").is_file()
    where = subprocess.run(
        [str(python), "-c", "import tilewright; print(tilewright.__file__)"], cwd=tmp_path, capture_output=True, text=True
    )
    assert where.stdout.strip().startswith(str(purelib))
