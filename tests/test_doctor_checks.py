"""The doctor's checks of packages, versions, the compiler and the caches, with a mocked environment."""

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
from tilewright.cli import doctor_gpu, entry, package_metadata

ROOT = Path(tilewright.cli.__file__).parents[1]


# Packages and versions


def test_version_ranges_match_packaging():
    versions = ["0.9", "0.9.5", "0.9.5.0", "0.10", "1", "1.25.9", "1.26", "1.26.0", "1.26.1", "2.4.6", "2.11.0+cpu", "10.0"]
    for specifier in ("", ">=1.26", ">=0.9.5", "<2", ">1.26", "<=1.26", "==1.26", "!=1.26", ">=1,<2.4", ">=1.26, !=2.4.6"):
        for version in versions:
            found = package_metadata.in_range(version, specifier)
            assert found == SpecifierSet(specifier).contains(version), (version, specifier)
    # Unlike `packaging`, accept a vendor's pre-release build.
    assert package_metadata.in_range("2.11.0a0+git1234", ">=2.11")
    with pytest.raises(ValueError, match=r"range '~=2\.0' of versions is unknown"):
        package_metadata.in_range("2.0", "~=2.0")


def wanted(variables, extra=""):
    """Return the requirements of the base and an extra, parsed from the metadata with `packaging`."""
    found = {}
    for requirement in map(Requirement, importlib.metadata.requires("tilewright")):
        if requirement.marker is None or requirement.marker.evaluate({**variables, "extra": extra}):
            if requirement.name == "tilewright":
                for part in requirement.extras:
                    found |= wanted(variables, part)
            else:
                found[requirement.name] = requirement.specifier
    return found


def test_requirements_match_pip(monkeypatch):
    for system, name in (("Linux", "linux"), ("Darwin", "darwin")):
        monkeypatch.setattr(checks.platform, "system", lambda system=system: system)
        monkeypatch.setattr(checks.sys, "platform", name)
        variables = {"platform_system": system, "sys_platform": name}
        base = wanted(variables)
        assert {name: SpecifierSet(range) for name, range in package_metadata.requirements().items()} == base
        for extra in package_metadata.extras():
            found = {name: SpecifierSet(range) for name, range in package_metadata.requirements(extra).items()}
            assert found == {name: range for name, range in wanted(variables, extra).items() if name not in base}, extra
        assert ("triton" in package_metadata.requirements()) == (system == "Linux")


def test_markers_are_evaluated_or_rejected():
    assert package_metadata.applies("")
    assert not package_metadata.applies('extra == "dev"')
    assert package_metadata.applies('extra == "dev"', "dev")
    assert not package_metadata.applies("sys_platform == 'beos' and platform_system != 'BeOS'")
    with pytest.raises(ValueError, match=r"marker .* is unknown"):
        package_metadata.applies('python_version < "3.12"')


def test_the_packages_of_this_environment_are_found():
    for name in package_metadata.requirements():
        assert checks.installed(name) == importlib.metadata.version(name)
    assert checks.installed("no-such-package") is None
    finding, extras = checks.packages()
    assert (finding.status, extras.status) == ("ok", "ok")
    assert "train" in extras.text.partition(";")[0]
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
    versions = {"torch": None, "numpy": "1.21.0"}
    monkeypatch.setattr(checks, "installed", lambda name: versions.get(name, "99.0"))
    finding, _ = checks.packages()
    assert finding.status == "FAIL"
    assert finding.text.startswith(
        "missing: torch; numpy is 1.21.0, expected numpy>=1.26: `pip install 'torch>=2.11' 'numpy>=1.26'`;"
    )
    assert "\n" not in finding.text


def test_a_checkout_that_is_not_installed_is_a_failure(monkeypatch):
    def requires(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(checks.importlib.metadata, "requires", requires)
    [finding] = checks.packages()
    assert finding.status == "FAIL"
    assert "pip install -e ." in finding.text
    # The requirements are unknown then, so any missing package gets a remedy, but not a module of the project.
    assert entry._remedy("tyro", "train") is not None
    assert entry._remedy("tilewright.no_such_module", "train") is None


def test_extras_lists_complete_and_incomplete_extras(monkeypatch):
    def version(name):
        if name in ("numba", "uvicorn"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.1" if name == "matplotlib" else "99.0"

    monkeypatch.setattr(checks.importlib.metadata, "version", version)
    extras = checks._extras()
    assert extras.status == "warning", "matplotlib is too old"
    complete, incomplete = extras.text.split("; incomplete: ")
    assert "hub" in complete
    assert "train" not in complete
    for text in ("tokenizer (numba is missing)", "serve (uvicorn is missing)", "plot (matplotlib is 0.1, expected >=3.8)"):
        assert text in incomplete


@pytest.mark.parametrize(
    ("package", "command", "extra"),
    [
        ("numba", "tokenizer", "tokenizer"),
        ("tyro", "train", "train"),
        ("safetensors.torch", "tokenizer", "train"),
        ("matplotlib", "account", "plot"),
        ("huggingface_hub", "corpus", "hub"),
        ("no_such_package", "train", None),
    ],
)
def test_a_missing_package_names_its_extra(package, command, extra):
    assert package_metadata.extra_of(package, command) == extra


def test_the_extra_all_excludes_development_packages():
    assert {"torch", "triton", "numpy"} >= package_metadata.requirements().keys()
    others = {"all", "bench", "dev", "docs", "wandb"}
    user = {name for extra in package_metadata.extras() if extra not in others for name in package_metadata.requirements(extra)}
    assert package_metadata.requirements("all").keys() == user
    assert user < package_metadata.requirements("dev").keys()


def test_tested_versions_match_the_project_metadata():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pythons = [tuple(map(int, found.split("."))) for found in re.findall(r"Python :: (\d+\.\d+)", str(project["classifiers"]))]
    assert checks.TESTED["python"] == (min(pythons), max(pythons))
    assert project["requires-python"] == ">=3.11"
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for name in ("torch", "triton"):
        oldest, newest = checks.TESTED[name]
        [declared] = [line for line in project["dependencies"] if line.startswith(name)]
        assert declared.startswith(f"{name}>={'.'.join(map(str, oldest))}")
        assert oldest <= package_metadata.numbers(pinned[name])[:2] <= newest


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
def test_old_triton_with_new_numpy_is_a_warning(monkeypatch, triton, numpy, warned):
    monkeypatch.setattr(checks, "installed", {"triton": triton, "numpy": numpy}.get)
    findings = [each for each in checks.versions() if each.check == "numpy"]
    assert [each.status for each in findings] == ["warning"] * warned
    assert all("TRITON_INTERPRET=1" in each.text and "numpy<2.4" in each.text for each in findings)


# The compiler and the caches


@pytest.fixture
def tools(monkeypatch, tmp_path):
    """Mock an environment in which Triton can compile."""
    (tmp_path / "Python.h").touch()
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(checks.platform, "system", lambda: "Linux")
    monkeypatch.setattr(checks.shutil, "which", lambda name: f"/bin/{name}" if name in ("gcc", "clang") else None)
    monkeypatch.setattr(checks, "output", lambda *command: "12.8.0")
    monkeypatch.setattr(checks.sysconfig, "get_path", lambda *_: str(tmp_path))
    monkeypatch.setattr(checks, "_ptxas", lambda: "12.8")
    return tmp_path


def test_a_complete_compiler(tools, monkeypatch):
    [finding] = checks.compiler(True)
    assert finding == checks.Finding("ok", "compiler", f"/bin/gcc 12.8.0, {tools}/Python.h, ptxas 12.8")
    monkeypatch.setattr(checks.shutil, "which", lambda name: "/bin/clang" if name == "clang" else None)
    assert checks.compiler(True)[0].text.startswith("/bin/clang 12.8.0")


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        ("compiler", "no gcc and no clang: `apt install gcc`"),
        ("CC", "CC is 'ccache gcc', which is not a command"),
        ("headers", "Python.h: `apt install python3-dev`"),
        ("ptxas", "no ptxas"),
    ],
)
def test_an_incomplete_compiler_fails_only_with_a_gpu(tools, monkeypatch, broken, text):
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


def test_a_missing_compiler_is_one_install_command(tools, monkeypatch):
    monkeypatch.setattr(checks.shutil, "which", lambda name: None)
    (tools / "Python.h").unlink()
    assert checks.compiler(True)[0].text.endswith("`apt install gcc python3-dev`)")
    monkeypatch.setattr(checks.platform, "system", lambda: "Darwin")
    assert checks.compiler(False)[0].status == "ok"


@pytest.mark.skipif(not doctor_gpu.HAS_TRITON, reason="Triton cannot be imported")
def test_ptxas_is_found_as_triton_finds_it(monkeypatch):
    import triton.knobs

    assert checks._ptxas() == f"{triton.knobs.nvidia.ptxas.version} ({triton.knobs.nvidia.ptxas.path})"
    # Triton also falls back to its bundled ptxas.
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/no/such/ptxas")
    assert checks._ptxas() == f"{triton.knobs.nvidia.ptxas.version} ({triton.knobs.nvidia.ptxas.path})"


@pytest.fixture
def folders(monkeypatch, tmp_path):
    for name in ("TRITON_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "NUMBA_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name / "deep"))
    return tmp_path


def test_caches_are_found_and_not_created(folders):
    findings = checks.caches(True)
    assert [each.status for each in findings] == ["ok"] * 3
    assert [each.text.split(":")[0] for each in findings] == ["Triton", "Inductor", "Numba"]
    assert f"Triton: {folders}/TRITON_CACHE_DIR/deep, " in findings[0].text
    assert not [*folders.iterdir()]


def test_an_unwritable_cache_fails_only_with_a_gpu(folders, monkeypatch):
    # A file in place of the folder also stops root.
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "NUMBA_CACHE_DIR"):
        (folders / name).touch()
    assert [each.status for each in checks.caches(True)] == ["FAIL", "FAIL", "ok"], "Numba uses the next folder"
    assert str(ROOT / "tokenizer" / "compiled" / "__pycache__") in checks.caches(True)[2].text
    monkeypatch.setattr(checks, "_unwritable", lambda folder: f"{folder}: Read-only file system")
    assert [each.status for each in checks.caches(True)] == ["FAIL", "FAIL", "warning"]
    assert [each.status for each in checks.caches(False)] == ["warning"] * 3
    for finding, name in zip(checks.caches(True), ("TRITON", "TORCHINDUCTOR", "NUMBA"), strict=True):
        assert "Read-only file system" in finding.text
        assert f"{name}_CACHE_DIR" in finding.text.split(": ")[-1]


def test_a_full_disk_is_a_warning(folders, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda folder: usage(10**12, 10**12 - 10**8, 10**8))
    assert [each.status for each in checks.caches(True)] == ["warning"] * 3
    assert "0.1 GB free: free some space" in checks.caches(True)[0].text


def test_cache_folders_match_the_libraries(folders, monkeypatch):
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    from tilewright.tokenizer.compiled import store

    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "NUMBA_CACHE_DIR"):
        monkeypatch.delenv(name)
    found = checks.cache_folders()
    assert found["Inductor"] == [Path(default_cache_dir())]
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(folders))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folders / "user"))
    assert checks.cache_folders()["Numba"] == [folder.parent for folder in store._folders()]
    place = store.writable_folder()
    assert place is not None
    assert place.parent == folders == checks.cache_folders()["Numba"][0]
    if doctor_gpu.HAS_TRITON:
        import triton.knobs

        assert found["Triton"] == [Path(triton.knobs.cache.dir)]
        monkeypatch.setenv("TRITON_HOME", str(folders))
        assert checks.cache_folders()["Triton"] == [Path(triton.knobs.cache.get_triton_dir("cache"))]


def test_system(monkeypatch):
    [finding] = checks.system()
    assert finding.text.startswith(f"tilewright {tilewright.__version__}, commit ")
    assert re.search(r"\d of \d+ CPUs, [\d.,]+ GB RAM", finding.text)
    monkeypatch.setattr(checks, "output", lambda *command, folder: None)
    assert "commit unknown" in checks.system()[0].text
