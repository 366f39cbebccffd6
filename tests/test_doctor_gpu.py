"""The doctor's subprocess that checks GPUs, and its findings with mocked GPUs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tilewright.cli import doctor, doctor_gpu
from tilewright.cli import doctor_checks as checks

# The subprocess


def child(script):
    begin = 'import json, os, signal, subprocess, sys, time\nprint(json.dumps({"begin": "kernel"}), flush=True)\n'
    return [sys.executable, "-c", begin + script]


SOUND = 'print(\'{"status": "ok", "check": "gpu", "text": "sound"}\', flush=True)\n'


def test_only_findings_in_the_output_count():
    noise = 'print("a library talks"); print("[1]"); print(\'{"status": 1}\'); print("3")\n'
    assert doctor.run_checks(child(noise + SOUND + 'print(\'{"stat\', end="")'), 60) == [checks.Finding("ok", "gpu", "sound")]


def test_a_crash_is_a_failure():
    segfault = doctor.run_checks(child(SOUND + "os.kill(os.getpid(), signal.SIGSEGV)"), 60)
    assert segfault == [
        checks.Finding("ok", "gpu", "sound"),
        checks.Finding("FAIL", "kernel", "its process was killed by signal 11 (Segmentation fault): no output on stderr"),
    ]
    failed = doctor.run_checks(child("raise ImportError('libcudart.so.13: cannot open shared object file')"), 60)
    assert [(each.status, each.check) for each in failed] == [("FAIL", "kernel")]
    assert failed[0].text == "its process ended with status 1: ImportError: libcudart.so.13: cannot open shared object file"
    assert doctor.run_checks([sys.executable, "-c", "import sys; sys.exit(3)"], 60)[0].check == "torch"


class Patient(subprocess.Popen):
    """A process whose timeout expires as soon as it has written its process ids."""

    file: Path

    def wait(self, timeout=None):
        while timeout == 77 and not self.file.exists():
            time.sleep(0.01)
        return super().wait(0 if timeout == 77 else timeout)


def test_a_process_that_hangs_is_killed_with_its_children(monkeypatch, tmp_path):
    monkeypatch.setattr(Patient, "file", tmp_path / "pids", raising=False)
    monkeypatch.setattr(doctor.subprocess, "Popen", Patient)
    hang = f"""
other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
signal.signal(signal.SIGTERM, signal.SIG_IGN)
with open({str(tmp_path / "new")!r}, "w") as file:
    file.write(f"{{os.getpid()}} {{other.pid}}")
os.rename({str(tmp_path / "new")!r}, {str(tmp_path / "pids")!r})
time.sleep(600)
"""
    findings = doctor.run_checks(child(SOUND + hang), 77)
    assert findings[0] == checks.Finding("ok", "gpu", "sound"), "earlier findings are kept"
    assert (findings[1].status, findings[1].check) == ("FAIL", "kernel")
    assert findings[1].text.startswith("no answer in 77 s: ")
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        while Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] != "Z":
            time.sleep(0.01)


def test_the_time_limit_ends_the_process():
    findings = doctor.run_checks([sys.executable, "-c", "import time; time.sleep(600)"], 0.2)
    assert [(each.status, each.check) for each in findings] == [("FAIL", "torch")]
    assert findings[0].text.startswith("no answer in 0.2 s")


def test_a_process_that_cannot_be_killed_does_not_block(monkeypatch):
    killed = []

    class Stuck:
        pid = 12345

        def __init__(self, *_, **__):
            pass

        def wait(self, timeout=None):
            assert timeout is not None
            raise subprocess.TimeoutExpired("stuck", timeout)

    monkeypatch.setattr(doctor.subprocess, "Popen", Stuck)
    monkeypatch.setattr(doctor.os, "killpg", lambda *which: killed.append(which))
    assert doctor.run_checks(["stuck"], 1)[0].status == "FAIL"
    assert killed == [(12345, signal.SIGKILL)]


def test_an_interruption_ends_the_subprocess(monkeypatch):
    killed = []

    class Interrupted(subprocess.Popen):
        def wait(self, timeout=None):
            if not killed:
                killed.append(self.pid)
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr(doctor.subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        doctor.run_checks([sys.executable, "-c", "import time; time.sleep(600)"], 60)
    with pytest.raises(ProcessLookupError):
        os.kill(killed[0], 0)


def test_a_signal_to_the_doctor_ends_the_subprocess(monkeypatch):
    started = []

    class Signalled(subprocess.Popen):
        def wait(self, timeout=None):
            if not started:
                started.append(self.pid)
                os.kill(os.getpid(), signal.SIGTERM)
            return super().wait(timeout)

    monkeypatch.setattr(doctor.subprocess, "Popen", Signalled)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        doctor.run_checks([sys.executable, "-c", "import time; time.sleep(600)"], 60)
    assert ended.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(ProcessLookupError):
        os.kill(started[0], 0)


# GPUs and the kernel, mocked


@pytest.fixture
def volta(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (15_500_000_000, 16_900_000_000))
    monkeypatch.setattr(doctor_gpu, "_driver", lambda: "580.1")


def test_a_gpu_that_is_too_old(volta):
    [finding] = doctor_gpu.gpu(1)
    assert finding.status == "FAIL"
    assert "cuda:1, Tesla V100, driver 580.1, " in finding.text
    assert "capability 7.0, 15.5 of 16.9 GB free, datasheet peak unknown" in finding.text
    assert "attention needs capability 8.0" in finding.text


def test_a_supported_gpu(volta, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    [finding] = doctor_gpu.gpu(0)
    assert finding.status == "ok"
    assert finding.text.endswith("datasheet peak known")


def test_reasons_for_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    [finding] = doctor_gpu.no_gpu()
    assert finding.status == "warning"
    assert "is built without CUDA" in finding.text
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(doctor_gpu, "_driver", lambda: None)
    assert "there is no NVIDIA driver" in doctor_gpu.no_gpu()[0].text

    def init():
        raise RuntimeError("The NVIDIA driver on your system is\ntoo old (found version 11040).")

    monkeypatch.setattr(doctor_gpu, "_driver", lambda: "470.1")
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    text = doctor_gpu.no_gpu()[0].text
    assert "driver 470.1, torch for CUDA 12.8: The NVIDIA driver on your system is too old (found version 11040)." in text
    assert "CUDA_VISIBLE_DEVICES is '7'" in text


def test_the_driver_version_has_two_sources(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor_gpu, "output", lambda *_: "580.65.06\n580.65.06")
    assert doctor_gpu._driver() == "580.65.06"
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  575.57.08  Release Build\nGCC 12\n"
    )
    monkeypatch.setattr(doctor_gpu, "output", lambda *_: None)
    monkeypatch.setattr(doctor_gpu, "Path", lambda _: tmp_path / "version")
    assert doctor_gpu._driver() == "575.57.08"
    (tmp_path / "version").unlink()
    assert doctor_gpu._driver() is None


@pytest.mark.skipif(not doctor_gpu.HAS_TRITON, reason="Triton cannot be imported")
def test_the_result_of_the_kernel_is_checked(device, monkeypatch):
    [finding] = doctor_gpu.run_kernel(device)
    assert finding.status == "ok"
    assert "with the correct result" in finding.text

    class Wrong:
        def run(self, x, y, size, **launch):
            y.copy_(2 * x)

    monkeypatch.setattr(doctor_gpu, "_kernel", Wrong())
    [finding] = doctor_gpu.run_kernel(device)
    assert finding.status == "FAIL"
    assert "its result is wrong" in finding.text


def test_a_compile_error_without_a_gpu_is_a_warning(monkeypatch):
    def inspect(case, architecture):
        assert architecture == "sm_90"
        raise RuntimeError("Internal Triton PTX codegen error\n`ptxas` stderr:\nfatal")

    monkeypatch.setattr(doctor_gpu, "inspect", inspect)
    monkeypatch.setattr(doctor_gpu, "kernel_case", lambda launch, name: name)
    [finding] = doctor_gpu.compile_kernel()
    assert finding.status == "warning"
    assert finding.text.endswith("RuntimeError: Internal Triton PTX codegen error `ptxas` stderr: fatal")


@pytest.mark.parametrize("has_triton", [True, False])
@pytest.mark.parametrize("interprets", [True, False])
@pytest.mark.parametrize("num_gpus", [0, 2])
def test_the_list_of_checks(monkeypatch, has_triton, interprets, num_gpus):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setattr(doctor_gpu, "HAS_TRITON", has_triton)
    monkeypatch.setattr(doctor_gpu, "interpreting", lambda: interprets)
    made = [(name, getattr(check, "func", check), getattr(check, "args", ())) for name, check in doctor_gpu.all_checks()]
    gpus = [("gpu", doctor_gpu.gpu, (index,)) for index in range(num_gpus)] or [("gpu", doctor_gpu.no_gpu, ())]
    kernels = [("kernel", doctor_gpu.run_kernel, (torch.device("cuda", index),)) for index in range(num_gpus)]
    kernels = kernels or [("kernel", doctor_gpu.compile_kernel, ())]
    if interprets or not has_triton:
        kernels = [("kernel", doctor_gpu.no_kernel, ())]
        [finding] = doctor_gpu.no_kernel()
        assert finding.status == "warning"
        assert ("TRITON_INTERPRET is set" if interprets else "Triton cannot be imported") in finding.text
    assert made == gpus + kernels


def test_a_cuda_error_is_a_finding_and_the_next_check_runs(monkeypatch, capsys):
    def broken():
        raise RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`")

    sound = checks.Finding("ok", "kernel", "sound")
    monkeypatch.setattr(doctor_gpu, "all_checks", lambda: [("gpu", broken), ("kernel", lambda: [sound])])
    doctor_gpu.main()
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    text = "RuntimeError: CUDA error: out of memory Compile with `TORCH_USE_CUDA_DSA`"
    assert said[1:] == [
        {"begin": "gpu"},
        {"status": "FAIL", "check": "gpu", "text": text},
        {"begin": "kernel"},
        vars(sound),
    ]
