import pytest
import torch

from tilewright.bench import ceilings
from tilewright.bench.ceilings import Ceilings, Device
from tilewright.datasheet import find_gpu
from tilewright.kernels.op import ALL, Cost

H200 = find_gpu("h200")


def test_shares_of_the_ceiling_and_of_the_datasheet():
    on = Ceilings(copy=4e12, matmul=8e14, gpu=H200)
    assert on.shares(Cost(bytes=4_000_000, flops=0), 2e-6) == {
        "share_of_roofline": pytest.approx(0.5), "share_of_datasheet": pytest.approx(4e6 / 4.8e12 / 2e-6),
    }  # fmt: skip
    assert on.shares(Cost(bytes=0, flops=8_000_000), 2e-8)["share_of_roofline"] == pytest.approx(0.5)
    assert Ceilings(4e12, 8e14).shares(Cost(1, 1), 1.0)["share_of_datasheet"] is None


def test_values_above_a_ceiling_are_marked():
    on = Ceilings(copy=4e12, matmul=8e14, gpu=H200)
    cost = Cost(bytes=4_400_000, flops=0)
    assert on.shares(cost, 1e-6)["suspicious"] == "above the ceiling"
    assert on.shares(cost, 0.9e-6)["suspicious"] == "above the datasheet: a measuring error"
    assert "suspicious" not in on.shares(cost, 1.2e-6)


def test_products_in_fp8_have_a_ceiling_of_their_own():
    on = Ceilings(copy=4e12, matmul=8e14, gpu=H200, fp8=1.4e15)
    # 1.2 PFLOP/s exceed the peak in bfloat16.
    cost, seconds = Cost(bytes=0, flops=1_200_000_000), 1e-6
    assert on.shares(cost, seconds)["suspicious"] == "above the datasheet: a measuring error"
    assert on.of("bf16") == on
    assert on.of("fp8").shares(cost, seconds) == {
        "share_of_roofline": pytest.approx(1.2 / 1.4), "share_of_datasheet": pytest.approx(1200 / 1978.9, rel=1e-3),
    }  # fmt: skip
    assert Ceilings(4e12, 8e14).of("fp8").matmul == 1.6e15
    assert [op.name for op in ALL.values() if op.products == "fp8"] == ["fp8_linear"]


@pytest.mark.parametrize(("capability", "fp8"), [((9, 0), "above the datasheet: a measuring error"), ((8, 0), None)])
def test_ceiling_rows_include_the_datasheet(monkeypatch, capability, fp8):
    device = Device(torch.device("cpu"))
    device.gpu = H200
    monkeypatch.setattr(ceilings, "copy_bandwidth", lambda device: 4.32e12)
    monkeypatch.setattr(ceilings, "matmul_speed", lambda device: 790e12)
    monkeypatch.setattr(ceilings, "fp8_matmul_speed", lambda device: 2000e12)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    copy, product, last = device.ceiling_rows()
    assert copy == {
        "case": "ceiling", "variant": "copy of 1 GiB", "gb_per_s": 4320, "datasheet_gb_per_s": 4800,
        "share_of_datasheet": pytest.approx(0.9),
    }  # fmt: skip
    assert product["tflop_per_s"] == 790
    assert product["share_of_datasheet"] == pytest.approx(790 / 989.4)
    assert last.get("suspicious") == fp8
    assert ("not_measured" in last) == (fp8 is None)
    # The ceilings are measured once, however often they are used.
    monkeypatch.setattr(ceilings, "copy_bandwidth", lambda device: pytest.fail("measured again"))
    assert device.ceilings.copy == 4.32e12
    assert device.ceilings.fp8 == (2000e12 if fp8 else None)


def test_ceilings_are_measured():
    cpu = torch.device("cpu")
    assert ceilings.copy_bandwidth(cpu, 2**16) > 0
    assert ceilings.matmul_speed(cpu, 32) > 0


@pytest.mark.gpu
def test_ceilings_are_measured_on_a_gpu():
    rows = list(Device(torch.device("cuda")).ceiling_rows())
    assert [row["variant"] for row in rows] == ["copy of 1 GiB", "bfloat16 product 8192^3", "fp8 product 8192^3"]
    # Other processes may run tests on this GPU meanwhile.
    assert all(0.02 < row["share_of_datasheet"] <= 1 for row in rows if row.get("share_of_datasheet") is not None), rows
