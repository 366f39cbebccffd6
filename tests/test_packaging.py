"""The wheel as a user gets it: installed away from the checkout, with every room and without the tests."""

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

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


def test_the_wheel_holds_the_rooms_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {"tilewright/py.typed", "tilewright/train/data/stories.txt"} <= set(names)
    for room in ("kernels", "model", "tokenizer", "train", "bench"):
        assert f"tilewright/{room}/__init__.py" in names
    assert not [name for name in names if "test" in name.lower()]
    assert {name.split("/")[0] for name in names} == {"tilewright", next(n.split("/")[0] for n in names if "dist-info" in n)}


@pytest.mark.slow
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
