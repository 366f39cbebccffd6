import threading
from types import SimpleNamespace

import pytest
import torch

from tilewright.bench import machine
from tilewright.bench.machine import describe, gpu_state, other_processes, parse_fields, parse_reasons, state_row

GPU = torch.device("cuda", 0)
STATE = "570.86.15, 1980, 1980, 3201, 31, 121.33, 700.00, 4, 143771"


@pytest.fixture
def smi(monkeypatch):
    """Emulate nvidia-smi; answers are looked up by the first requested field."""
    answers = {"driver_version": STATE, "clocks_event_reasons.active": "0x0000000000000001"}

    def answer(device, *fields):
        return parse_fields(answers[fields[0]]) if fields[0] in answers else None

    monkeypatch.setattr(machine, "_query", answer)
    return answers


def test_unreported_fields_are_none():
    assert parse_fields("1980, [N/A], [Insufficient Permissions], N/A, 4\n") == ["1980", None, None, None, "4"]


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ("0x0000000000000000", "none"),
        ("0x0000000000000001", "none"),
        ("0x0000000000000004", "power limit"),
        ("0x0000000000000048", "hardware slowdown, hardware thermal slowdown"),
        (None, None),
    ],
)
def test_reasons_for_low_clocks(mask, words):
    assert parse_reasons(mask) == words


def test_the_state_of_a_gpu(smi):
    state = gpu_state(GPU)
    assert state["driver"] == "570.86.15"
    assert (state["sm_mhz"], state["power_limit_w"], state["used_mib"]) == (1980, 700, 4)
    assert state["throttled_by"] == "none"
    assert "suspicious" not in state_row(GPU, "before")


def test_only_thermal_throttling_is_marked(smi):
    smi["clocks_event_reasons.active"] = "0x0000000000000040"
    assert state_row(GPU, "after kernels")["suspicious"] == "throttled: hardware thermal slowdown"
    smi["clocks_event_reasons.active"] = "0x0000000000000004"
    row = state_row(GPU, "after kernels")
    assert (row["case"], row["throttled_by"], row.get("suspicious")) == ("GPU after kernels", "power limit", None)


@pytest.mark.parametrize("answer", [None, "", "1980", "No devices were found"])
def test_invalid_answers_give_no_state(monkeypatch, answer):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="0"))
    monkeypatch.setattr(machine, "_output", lambda *command: answer)
    assert gpu_state(GPU) == {}
    assert state_row(GPU, "before")["not_measured"] == "nvidia-smi does not answer"


def test_invalid_fields_are_none(smi):
    smi["driver_version"] = STATE.replace("31", "ERR!")
    smi["clocks_event_reasons.active"] = "Unknown Error"
    state = gpu_state(GPU)
    assert (state["temperature_c"], state["sm_mhz"], state["throttled_by"]) == (None, 1980, None)
    assert "suspicious" not in state_row(GPU, "before")


def test_older_drivers_use_another_field_name(smi):
    smi["clocks_throttle_reasons.active"] = smi.pop("clocks_event_reasons.active").replace("1", "8")
    assert gpu_state(GPU)["throttled_by"] == "hardware slowdown"
    del smi["clocks_throttle_reasons.active"]
    assert gpu_state(GPU)["throttled_by"] is None


def test_without_nvidia_smi_the_state_is_empty(smi):
    smi.clear()
    assert gpu_state(GPU) == {}
    assert state_row(GPU, "before") == {"case": "GPU before", "not_measured": "nvidia-smi does not answer"}


def test_the_state_is_read_under_load(monkeypatch):
    # Run on a CPU in place of the GPU.
    seen = []
    monkeypatch.setattr(machine, "LOAD", 8)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: seen.append("product"))
    monkeypatch.setattr(machine, "gpu_state", lambda device: {"throttled_by": "none", "products": len(seen)})
    threads = threading.active_count()
    assert state_row(torch.device("cpu"), "before")["products"] > 0
    assert threading.active_count() == threads
    # A lack of memory for the load is ignored.
    monkeypatch.setattr(machine, "LOAD", -1)
    assert state_row(torch.device("cpu"), "before")["case"] == "GPU before"


def test_other_processes():
    text = "101, python, 512 MiB\n202, /usr/bin/other, 1024 MiB\n\n"
    assert other_processes(text, own=101) == [("/usr/bin/other", "1024 MiB")]
    assert other_processes("", own=101) == []


def test_the_machine_is_described():
    found = describe(torch.device("cpu"))
    assert {"date", "commit", "device", "driver", "cpu", "python", "torch", "triton", "cuda"} <= found.keys()
    assert found["torch"] == torch.__version__


@pytest.mark.gpu
def test_a_gpu_is_described():
    rows = list(machine.machine_rows(torch.device("cuda")))
    assert rows[0]["case"] == "GPU before"
    assert rows[0].get("sm_mhz", 1) > 0
