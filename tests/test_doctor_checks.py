"""What the doctor finds of packages, versions, the compiler and the caches, with what it looks at replaced."""

import importlib.metadata
import importlib.util
import re
import tomllib
from collections import namedtuple
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import tilewright.cli
from tilewright.cli import doctor_checks as checks
from tilewright.cli import doctor_gpu, entry

ROOT = Path(tilewright.cli.__file__).parents[1]


# Packages and versions


def test_ranges_are_those_of_packaging():
    versions = ["0.9", "0.9.5", "0.9.5.0", "0.10", "1", "1.25.9", "1.26", "1.26.0", "1.26.1", "2.4.6", "2.11.0+cpu", "10.0"]
    for specifier in ("", ">=1.26", ">=0.9.5", "<2", ">1.26", "<=1.26", "==1.26", "!=1.26", ">=1,<2.4", ">=1.26, !=2.4.6"):
        for version in versions:
            assert checks.in_range(version, specifier) == SpecifierSet(specifier).contains(version), (version, specifier)
    # Where it differs: a vendor's own build.
    assert checks.in_range("2.11.0a0+git1234", ">=2.11")
    with pytest.raises(ValueError, match=r"range '~=2\.0' of versions is unknown"):
        checks.in_range("2.0", "~=2.0")


def test_what_is_needed_is_what_pip_would_install(monkeypatch):
    for system, name in (("Linux", "linux"), ("Darwin", "darwin")):
        monkeypatch.setattr(checks.platform, "system", lambda system=system: system)
        monkeypatch.setattr(checks.sys, "platform", name)
        variables = {"platform_system": system, "sys_platform": name, "extra": ""}
        wanted = [Requirement(line) for line in importlib.metadata.requires("tilewright")]
        wanted = [each for each in wanted if each.marker is None or each.marker.evaluate(variables)]
        assert {name: SpecifierSet(range) for name, range in checks.requirements().items()} == {
            each.name: each.specifier for each in wanted
        }
        assert ("triton" in checks.requirements()) == (system == "Linux")


def test_markers_are_read_or_refused():
    assert checks.applies("")
    assert not checks.applies('extra == "dev"')
    assert not checks.applies("sys_platform == 'beos' and platform_system != 'BeOS'")
    with pytest.raises(ValueError, match=r"marker .* is unknown"):
        checks.applies('python_version < "3.12"')


def test_the_packages_of_this_environment_are_found():
    for name in checks.requirements():
        assert checks.installed(name) == importlib.metadata.version(name)
    assert checks.installed("no-such-package") is None
    [finding] = checks.packages()
    assert finding.status == "ok"
    assert f"torch {importlib.metadata.version('torch')}" in finding.text


def test_a_package_may_be_installed_under_another_name(monkeypatch):
    def version(name):
        if name != "pytorch-triton":
            raise importlib.metadata.PackageNotFoundError(name)
        return "3.7.0"

    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: name != "numba")
    monkeypatch.setattr(checks.importlib.metadata, "version", version)
    monkeypatch.setattr(checks.importlib.metadata, "packages_distributions", lambda: {"triton": ["pytorch-triton"]})
    assert [checks.installed(name) for name in ("triton", "regex", "numba")] == ["3.7.0", None, None]


def test_missing_and_old_packages_are_one_line(monkeypatch):
    versions = {"regex": None, "tyro": None, "numpy": "1.21.0", "numba": "0.70"}
    monkeypatch.setattr(checks, "installed", lambda name: versions.get(name, "99.0"))
    [finding] = checks.packages()
    assert finding.status == "FAIL"
    assert finding.text.startswith(
        "missing: regex, tyro; numpy is 1.21.0, numpy>=1.26 is needed: `pip install regex 'tyro>=0.9.5' 'numpy>=1.26'`;"
    )
    assert "\n" not in finding.text


def test_it_says_when_tilewright_itself_is_not_installed(monkeypatch):
    def requires(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(checks.importlib.metadata, "requires", requires)
    [finding] = checks.packages()
    assert finding.status == "FAIL"
    assert "pip install -e ." in finding.text
    # Then nothing says what it needs: all but its own modules may be missing.
    assert entry._is_needed("tyro")
    assert not entry._is_needed("tilewright.no_such_module")


def test_what_is_tested_is_what_the_project_declares():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pythons = [tuple(map(int, found.split("."))) for found in re.findall(r"Python :: (\d+\.\d+)", str(project["classifiers"]))]
    assert checks.TESTED["python"] == (min(pythons), max(pythons))
    assert project["requires-python"] == ">=3.11"
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for name in ("torch", "triton"):
        oldest, newest = checks.TESTED[name]
        [declared] = [line for line in project["dependencies"] if line.startswith(name)]
        assert declared.startswith(f"{name}>={'.'.join(map(str, oldest))}")
        assert oldest <= checks.numbers(pinned[name])[:2] <= newest


@pytest.mark.parametrize(
    ("name", "version", "status"),
    [
        ("python", "3.10.14", "FAIL"),
        ("python", "3.11.0", "ok"),
        ("python", "3.13.9", "ok"),
        ("python", "3.14.0rc1", "warning"),
        ("torch", "2.10.2+cu128", "FAIL"),
        ("torch", "2.11.0a0+git12", "ok"),
        ("torch", "2.13.1", "ok"),
        ("torch", "2.14.0", "warning"),
        ("torch", "3.0", "warning"),
        ("triton", "3.5.1", "FAIL"),
        ("triton", "3.7.1", "ok"),
        ("triton", "4.0.0", "warning"),
    ],
)
def test_versions_outside_the_tested_range(monkeypatch, name, version, status):
    found = {"python": "3.12.1", "torch": "2.12.0", "triton": "3.7.0", "numpy": "2.0", name: version}
    monkeypatch.setattr(checks, "installed", found.get)
    monkeypatch.setattr(checks.platform, "python_version", lambda: found["python"])
    assert [(each.check, each.status) for each in checks.versions()] == [
        (each, status if each == name else "ok") for each in ("python", "torch", "triton")
    ]
    [text] = [each.text for each in checks.versions() if each.check == name]
    word = {"ok": version, "warning": "is untested: ", "FAIL": "is too old: "}[status]
    assert word in text


@pytest.mark.parametrize(
    ("triton", "numpy", "warned"), [("3.6.0", "2.4.0", True), ("3.6.0", "2.3.5", False), ("3.7.0", "2.4.0", False)]
)
def test_the_interpreter_of_an_old_triton_does_not_know_new_arrays(monkeypatch, triton, numpy, warned):
    monkeypatch.setattr(checks, "installed", {"triton": triton, "numpy": numpy}.get)
    findings = [each for each in checks.versions() if each.check == "numpy"]
    assert [each.status for each in findings] == ["warning"] * warned
    assert all("TRITON_INTERPRET=1" in each.text and "numpy<2.4" in each.text for each in findings)


# The compiler and the caches


@pytest.fixture
def tools(monkeypatch, tmp_path):
    """A machine on which Triton can compile."""
    (tmp_path / "Python.h").touch()
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(checks.platform, "system", lambda: "Linux")
    monkeypatch.setattr(checks.shutil, "which", lambda name: f"/bin/{name}" if name in ("gcc", "clang") else None)
    monkeypatch.setattr(checks, "output", lambda *command: "12.8.0")
    monkeypatch.setattr(checks.sysconfig, "get_path", lambda *_: str(tmp_path))
    monkeypatch.setattr(checks, "_ptxas", lambda: "12.8")
    return tmp_path


def test_a_whole_compiler(tools, monkeypatch):
    [finding] = checks.compiler(True)
    assert finding == checks.Finding("ok", "compiler", f"/bin/gcc 12.8.0, {tools}/Python.h, ptxas 12.8")
    monkeypatch.setattr(checks.shutil, "which", lambda name: "/bin/clang" if name == "clang" else None)
    assert checks.compiler(True)[0].text.startswith("/bin/clang 12.8.0")


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        ("compiler", "no gcc and no clang: `apt install gcc`"),
        ("CC", "CC is 'ccache gcc', which is no command"),
        ("headers", "Python.h: `apt install python3-dev`"),
        ("ptxas", "no ptxas"),
    ],
)
def test_what_the_compiler_lacks_fails_where_there_is_a_gpu(tools, monkeypatch, broken, text):
    if broken == "compiler":
        monkeypatch.setattr(checks.shutil, "which", lambda name: None)
    elif broken == "CC":
        monkeypatch.setenv("CC", "ccache gcc")
    elif broken == "headers":
        (tools / "Python.h").unlink()
    else:
        monkeypatch.setattr(checks, "_ptxas", lambda: None)
    for has_gpu, status in ((True, "FAIL"), (False, "warning")):
        [finding] = checks.compiler(has_gpu)
        assert finding.status == status
        assert text in finding.text


def test_a_compiler_of_which_all_is_missing_is_one_command(tools, monkeypatch):
    monkeypatch.setattr(checks.shutil, "which", lambda name: None)
    (tools / "Python.h").unlink()
    assert checks.compiler(True)[0].text.endswith("`apt install gcc python3-dev`)")
    monkeypatch.setattr(checks.platform, "system", lambda: "Darwin")
    assert checks.compiler(False)[0].status == "ok"


@pytest.mark.skipif(not doctor_gpu.HAS_TRITON, reason="Triton cannot be imported")
def test_the_assembler_is_the_one_that_triton_takes(monkeypatch):
    import triton.knobs

    assert checks._ptxas() == f"{triton.knobs.nvidia.ptxas.version} ({triton.knobs.nvidia.ptxas.path})"
    # Triton, too, falls back to its own.
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/no/such/ptxas")
    assert checks._ptxas() == f"{triton.knobs.nvidia.ptxas.version} ({triton.knobs.nvidia.ptxas.path})"


@pytest.fixture
def folders(monkeypatch, tmp_path):
    for name in ("TRITON_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "NUMBA_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name / "deep"))
    return tmp_path


def test_caches_are_found_and_not_made(folders):
    findings = checks.caches(True)
    assert [each.status for each in findings] == ["ok"] * 3
    assert [each.text.split(":")[0] for each in findings] == ["Triton", "Inductor", "Numba"]
    assert f"Triton: {folders}/TRITON_CACHE_DIR/deep, " in findings[0].text
    assert not [*folders.iterdir()]


def test_a_cache_that_cannot_be_written_fails_where_there_is_a_gpu(folders, monkeypatch):
    # No folder: what stops root, too.
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "NUMBA_CACHE_DIR"):
        (folders / name).touch()
    assert [each.status for each in checks.caches(True)] == ["FAIL", "FAIL", "ok"], "Numba takes the next"
    assert str(ROOT / "tokenizer" / "compiled" / "__pycache__") in checks.caches(True)[2].text
    monkeypatch.setattr(checks, "_trouble", lambda folder: f"{folder}: Read-only file system")
    assert [each.status for each in checks.caches(True)] == ["FAIL", "FAIL", "warning"]
    assert [each.status for each in checks.caches(False)] == ["warning"] * 3
    for finding, name in zip(checks.caches(True), ("TRITON", "TORCHINDUCTOR", "NUMBA"), strict=True):
        assert "Read-only file system" in finding.text
        assert f"{name}_CACHE_DIR" in finding.text.split(": ")[-1]


def test_a_full_disk_is_told_of(folders, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda folder: usage(10**12, 10**12 - 10**8, 10**8))
    assert [each.status for each in checks.caches(True)] == ["warning"] * 3
    assert "0.1 GB free: make room" in checks.caches(True)[0].text


def test_the_caches_are_those_of_the_libraries(folders, monkeypatch):
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    from tilewright.tokenizer.compiled import store

    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "NUMBA_CACHE_DIR"):
        monkeypatch.delenv(name)
    found = checks.cache_folders()
    assert found["Inductor"] == [Path(default_cache_dir())]
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(folders))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folders / "user"))
    assert checks.cache_folders()["Numba"] == [folder.parent for folder in store._folders()]
    place = store.place()
    assert place is not None
    assert place.parent == folders == checks.cache_folders()["Numba"][0]
    if doctor_gpu.HAS_TRITON:
        import triton.knobs

        assert found["Triton"] == [Path(triton.knobs.cache.dir)]
        monkeypatch.setenv("TRITON_HOME", str(folders))
        assert checks.cache_folders()["Triton"] == [Path(triton.knobs.cache.get_triton_dir("cache"))]


def test_the_machine(monkeypatch):
    [finding] = checks.system()
    assert finding.text.startswith(f"tilewright {tilewright.__version__}, commit ")
    assert re.search(r"\d of \d+ CPUs, [\d.,]+ GB RAM", finding.text)
    monkeypatch.setattr(checks, "output", lambda *command, folder: None)
    assert "commit unknown" in checks.system()[0].text
