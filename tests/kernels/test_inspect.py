"""Compile the shipped launch configurations for GPU architectures, in a subprocess where Triton does not interpret."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tilewright.kernels import inspect as inspection
from tilewright.kernels.attention import launches
from tilewright.kernels.attention.choice import FORMS, use_attention_kernel
from tilewright.kernels.attention.fused import FUSED_KERNELS
from tilewright.kernels.dispatch import HAS_TRITON
from tilewright.kernels.inspect import ARCHITECTURES, _load_bytes, programs_per_sm
from tilewright.kernels.op import ALL

SCRIPT = """
import dataclasses, json, re, sys
from tilewright.kernels.inspect import all_cases, inspect
for case in all_cases(sys.argv[1]):
    if re.match(sys.argv[2], case.name):
        print(json.dumps(dataclasses.asdict(inspect(case, sys.argv[1]))), flush=True)
"""
# The first measured call of each op.
FIRST = """
import dataclasses, json, sys, torch
from tilewright.kernels import use_attention_kernel
from tilewright.kernels.inspect import inspect, launches
from tilewright.kernels.op import ALL
cases = [case for op in ALL.values() for case in launches(op, {**op.shapes[0], "dtype": torch.bfloat16}, sys.argv[1])]
for form, sizes in zip(("gluon", "fused"), ALL["attention"].shapes):
    with use_attention_kernel(form):
        cases += launches(ALL["attention"], {**sizes, "dtype": torch.bfloat16}, sys.argv[1])
for case in cases:
    print(json.dumps(dataclasses.asdict(inspect(case, sys.argv[1]))), flush=True)
"""
# sm_86 has the instructions of sm_80 and less shared memory, which matters only for the widest tiles. Compiling all kernels
# for it takes minutes more; `tilewright bench inspect` does that.
CHOSEN = {"sm_80": "", "sm_86": r"attention_(forward|backward_\w+) .* K(128|256) ", "sm_90": "", "sm_100": ""}
PORTABLE = {portable.__name__ for portable, _, _ in launches.KERNELS.values()}
IN_GLUON = {in_gluon.__name__ for _, in_gluon, _ in launches.KERNELS.values()} | {"attention_backward_hopper"}
FOR_HOPPER = IN_GLUON | {kernel.__name__ for kernel in FUSED_KERNELS}
KERNELS = {kernel.__name__ for op in ALL.values() for kernel in op.kernels}
# Matrix instructions that attention kernels use in half precision.
MATRIX_INSTRUCTIONS = {"sm_80": {"mma"}, "sm_86": {"mma"}, "sm_90": {"wgmma"}, "sm_100": {"tcgen05", "mma"}}


def compile_kernels(*arguments):
    """Run a script and return the reports that it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", *arguments]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr[-2000:]
    return [json.loads(line) for line in process.stdout.splitlines()]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot be imported")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_kernels_fit_without_spills(architecture):
    reports = compile_kernels(SCRIPT, architecture, CHOSEN[architecture])
    kernels = PORTABLE if CHOSEN[architecture] else KERNELS if architecture == "sm_90" else KERNELS - FOR_HOPPER
    capability = ARCHITECTURES[architecture].capability
    too_new = {kernel.__name__ for op in ALL.values() for kernel in op.kernels if op.capability > capability}
    assert {report["name"].split()[0] for report in reports} == kernels - too_new
    assert_fits(reports, architecture)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot be imported")
def test_first_call_of_each_op_compiles_without_spills():
    reports = compile_kernels(FIRST, "sm_90")
    only_in_later_shapes = {"attention_decode", "attention_combine", "fp8_linear_rows"}
    assert {report["name"].split()[0] for report in reports} == KERNELS - only_in_later_shapes
    assert_fits(reports, "sm_90")


def assert_fits(reports, architecture):
    for report in reports:
        assert report["spilled_bytes"] == 0, report
        assert report["shared_bytes"] <= ARCHITECTURES[architecture].shared_bytes_per_program, report
        assert report["registers"] <= 255, report
        assert report["occupancy"] > 0, report
        kernel, *_, dtype = report["name"].split()
        if kernel in PORTABLE | IN_GLUON and dtype == "bf16":
            assert report["matrix_instruction"] in MATRIX_INSTRUCTIONS[architecture], report


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("op", ALL.values(), ids=lambda op: op.name)
def test_launches_find_the_inspected_kernels_in_the_cache(op, form, tmp_path, monkeypatch):
    """`bench tune` compiles its candidates in parallel this way, before it launches them one by one."""
    import triton

    architecture = "sm_{}{}".format(*torch.cuda.get_device_capability())
    if architecture not in ARCHITECTURES or (form != "portable" and op.name != "attention"):
        pytest.skip(f"not one of the kernels of {architecture}")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    sizes = {"dtype": torch.bfloat16, **op.compiled[0]}
    compiled = []
    with use_attention_kernel(form):
        cases = list(inspection.launches(op, sizes, architecture))
        for case in cases:
            case.kernel.device_caches.clear()
            inspection.inspect(case, architecture)
        # Listeners hear of each compilation, and of each kernel that was in the cache.
        monkeypatch.setattr(
            triton.knobs.compilation, "listener", lambda src, cache_hit, **_: compiled.append((src.name, cache_hit))
        )
        arguments = op.arguments(torch.device("cuda"), sizes.pop("dtype"), **sizes)
        outputs = op.function(*arguments.positional, **arguments.options)
        outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y is not None and y.requires_grad]
        if outputs:
            torch.autograd.backward(outputs, [torch.randn_like(y) for y in outputs])
    assert {name for name, _ in compiled} == {case.kernel.__name__ for case in cases}
    assert all(hit for _, hit in compiled), compiled


def test_programs_per_sm_by_hand():
    sm_90 = ARCHITECTURES["sm_90"]
    # 64 registers of 128 threads: 8 programs of 8,192 registers fill the file.
    assert programs_per_sm(sm_90, 64, 0, 4) == 8
    assert programs_per_sm(sm_90, 32, 0, 4) == 16
    assert programs_per_sm(sm_90, 255, 0, 8) == 1
    # 100 KB of shared memory: two programs.
    assert programs_per_sm(sm_90, 32, 100 * 1024, 4) == 2


@pytest.mark.parametrize(
    ("ptx", "width"),
    [
        ("@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];", 16),
        ("ld.global.L1::evict_last.v2.b32 { %r1, %r2 }, [ %rd1 ];", 8),
        ("ld.global.b16 { %rs1 }, [ %rd1 ];", 2),
        ("ld.shared.v4.b32 { %r1, %r2, %r3, %r4 }, [ %r9 ];", 0),
    ],
)
def test_load_width_from_ptx(ptx, width):
    assert _load_bytes(ptx) == width


TYPES = """
import torch
from tilewright.kernels.inspect import kernel_case, launches
from tilewright.kernels.launch import Launch
from tilewright.kernels.op import ALL
from tilewright.kernels.swiglu import swiglu_forward
x, odd = torch.empty(4, 32, dtype=torch.bfloat16, device="meta"), torch.empty(33, device="meta")[1:]
launch = Launch(swiglu_forward, 1, (x, odd, x, 32, 2**31, 7, 1, 32, 3), {"BLOCK_ROWS": 4, "BLOCK_WIDTH": 32, "num_warps": 2})
case = kernel_case(launch, "name")
assert dict(case.types)["gate_ptr"] == "*bf16" and dict(case.types)["up_ptr"] == "*fp32", case
assert dict(case.types)["gate_row_stride"] == "i32" and dict(case.types)["up_row_stride"] == "i64", case
assert {"gate_ptr", "gate_row_stride"} <= set(case.aligned) and "y_row_stride" not in case.aligned, case
assert case.num_warps == 2 and dict(case.constants)["BLOCK_ROWS"] == 4, case
sizes = {"rows": 64, "width": 2048, "dtype": torch.bfloat16}
names = [case.kernel.__name__ for case in launches(ALL["swiglu"], sizes, "sm_90")]
assert names == ["swiglu_forward", "swiglu_backward"], names
"""


@pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot be imported")
def test_cases_match_the_launches_of_a_call():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run([sys.executable, "-c", TYPES], capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr[-2000:]
