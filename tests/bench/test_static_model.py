"""The static model: parsed machine code, loops counted by hand, and the costs of loops."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tilewright.bench import sass, static_model
from tilewright.bench.bandwidth_model import BYTES_IN_FLIGHT, bandwidth_of, first_batch
from tilewright.bench.loop_model import CYCLES, TENSOR_LATENCY, calibrated, simulate, tensor_cycles
from tilewright.bench.static_model import ARCHITECTURE, block_counts, causal_tiles, makespan, modelled
from tilewright.cli import main
from tilewright.kernels.attention.choice import FORMS, use_attention_kernel
from tilewright.kernels.dispatch import HAS_TRITON
from tilewright.kernels.inspect import launches
from tilewright.kernels.op import ALL

CYCLES_OF_LOOPS = Path(__file__).parent / "loop_cycles.json"


def instruction(text, stall=1, write=7, read=7, wait=0):
    return sass._instruction(text, stall << 41 | write << 46 | read << 49 | wait << 52)


# Two instructions and a branch back to a label, as nvdisasm prints them: the lower half of each encoding, then the upper.
LISTING = """\
.L_x_1:
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;  /* 0x0000000402047981 */
                                                                     /* 0x000ea8000c1e1d00 */
        /*0010*/                   FADD R8, R4, R5 ;                 /* 0x0000000504087221 */
                                                                     /* 0x004fc80000000000 */
        /*0020*/              @!P0 BRA `(.L_x_1) ;                   /* 0xfffffffffffc0947 */
                                                                     /* 0x000fea000383ffff */
"""


def test_disassembly_reads_control_bits_labels_and_loops(monkeypatch):
    monkeypatch.setattr(sass, "tool", lambda *_: LISTING)
    items = sass.disassemble(b"")
    assert items[0] == ".L_x_1"
    load, add, branch = (x for x in items if not isinstance(x, str))
    assert (load.base, load.pipe, load.bytes, load.write, load.stall) == ("LDG", "lsu", 16, 2, 4)
    assert (add.pipe, add.wait) == ("fma", 1 << 2)
    assert branch.pipe == "control"
    assert sass.loops(items) == [[load, add, branch]]


@pytest.mark.parametrize(
    ("text", "columns", "from_shared", "cycles", "ends"),
    [
        ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR44], RZ, !UPT", 128, 192, 64, False),
        ("HGMMA.64x128x16.F32.BF16 R88, R152, gdesc[UR20].tnspB, R88, gsb0", 128, 128, 64, True),
        ("QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR44], RZ, !UPT", 128, 192, 64, False),
        # With so few columns the operands arrive too slowly.
        ("HGMMA.64x16x16.F32.BF16 R24, gdesc[UR44], R24", 16, 80, 20, False),
    ],
)
def test_products(text, columns, from_shared, cycles, ends):
    x = instruction(text)
    assert (x.columns, x.from_shared, x.ends_group) == (columns, from_shared, ends)
    assert tensor_cycles(x) == cycles


def test_barriers_and_waits():
    assert instruction("BAR.SYNC.DEFER_BLOCKING 0x0").barrier_threads == 0
    assert instruction("BAR.SYNC.DEFER_BLOCKING 0x2, 0x80").barrier_threads == 128
    assert instruction("BAR.SYNC.DEFER_BLOCKING R5, R6").barrier_threads != 0
    assert instruction("WARPGROUP.DEPBAR.LE gsb0, 0x1").outstanding == 1
    assert instruction("WARPGROUP.DEPBAR.LE gsb0").outstanding == 0
    assert instruction("FADD R0, R1, R2").barrier_threads is None


PRODUCT = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR44], RZ, !UPT, gsb0"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"


def test_waiting_for_a_product_idles_the_tensor_core():
    alone = simulate([instruction(PRODUCT), instruction(WAIT)], groups=1, programs=1)
    assert alone.tensor == 64
    assert 64 + TENSOR_LATENCY <= alone.cycles <= 64 + TENSOR_LATENCY + 4
    assert alone.limiter == "tensor"
    assert max(alone.waits, key=lambda reason: alone.waits[reason]) == "products"
    # A second group fills the gap, unless a barrier of the whole program keeps both in step.
    both = simulate([instruction(PRODUCT), instruction(WAIT)], groups=2, programs=1)
    assert 0.98 < both.share < 1.02
    in_step = simulate([instruction(PRODUCT), instruction(WAIT), instruction("BAR.SYNC.DEFER_BLOCKING 0x0")], 2, 1)
    assert in_step.cycles > 2 * 64 + TENSOR_LATENCY
    assert in_step.waits["barrier"] > 0


def test_waiting_for_operands_keeps_the_tensor_core_busy():
    narrow = instruction("HGMMA.64x16x16.F32.BF16 R24, gdesc[UR44], R24, gsb0")
    report = simulate([narrow] * 64 + [instruction(WAIT)], groups=2, programs=1)
    assert report.limiter == "tensor"
    assert report.tensor / report.cycles > 0.95
    assert report.share == pytest.approx(0.4, rel=0.05)


@pytest.mark.parametrize(
    ("text", "pipe"), [("MUFU.EX2 R0, R1", "mufu"), ("LOP3.LUT R0, R1, R2", "alu"), ("FFMA R0, R1", "fma")]
)
def test_the_busiest_pipe_is_the_limiter(text, pipe):
    report = simulate([instruction(text)] * 32, groups=1, programs=1)
    assert report.limiter == pipe if CYCLES[pipe] > 1 else report.limiter in (pipe, "issue")
    assert report.cycles == pytest.approx(32 * CYCLES[pipe], rel=0.1)


def test_calibrated_predictions_stay_below_the_measured_limit():
    assert calibrated(0.6, "portable") == pytest.approx(481, rel=0.01)
    assert calibrated(1.0, "gluon") == calibrated(1.0, "portable") == pytest.approx(653, rel=0.01)
    assert calibrated(1.0, "fused") == pytest.approx(561, rel=0.01)


def test_bytes_in_flight_and_limiter():
    load = [instruction(f"LDG.E.128 R{4 * i}, desc[UR4][R2.64]", write=0) for i in range(4)]
    use = instruction("FADD R0, R4, R5", wait=1)
    assert first_batch([*load, use]) == 64
    assert first_batch([load[0], use, *load[:2], use]) == 32
    busy = bandwidth_of([*load, use], num_warps=8, num_stages=1, programs=4)
    assert busy is not None
    assert busy.bytes_in_flight == 64 * 32 * 8 * 4
    assert (busy.limiter("H100"), busy.share("H100")) == ("memory", 1.0)
    few = bandwidth_of([*load, use], num_warps=4, num_stages=1, programs=2)
    assert few is not None
    assert few.share("H100") == 64 * 32 * 8 / BYTES_IN_FLIGHT["H100"]
    assert few.limiter("H100") == "bytes in flight"
    long = bandwidth_of([*load, use, *[instruction("MUFU.EX2 R0, R1")] * 200], num_warps=8, num_stages=1, programs=8)
    assert long is not None
    assert long.limiter("H200") == "mufu"
    assert long.share("H200") < long.share("H100") < 1
    assert bandwidth_of([use], 4, 1, 1) is None


@pytest.mark.parametrize(("num_tokens", "kept", "looped"), [(512, 128, 128), (512, 128, 64), (768, 192, 128), (512, 64, 128)])
@pytest.mark.parametrize("of_keys", [False, True])
def test_tiles_of_a_causal_mask_are_counted(num_tokens, kept, looped, of_keys):
    full = masked = 0
    for start in range(0, num_tokens, kept):
        mine = range(start, start + kept)
        for other in range(0, num_tokens, looped):
            theirs = range(other, other + looped)
            queries, keys = (theirs, mine) if of_keys else (mine, theirs)
            if keys[-1] <= queries[0]:
                full += 1
            elif keys[0] <= queries[-1]:
                masked += 1
    assert causal_tiles(num_tokens, kept, looped, of_keys) == (-(-num_tokens // kept), full, masked)


def test_makespan_of_programs_in_order(monkeypatch):
    monkeypatch.setattr(static_model, "NUM_SMS", 2)
    # The second starts with the first, the third when the second ends, the fourth when the first ends.
    assert makespan([5, 2, 4, 3]) == 8
    assert list(block_counts(3, num_rows=3, rows_at_once=2)) == [1, 1, 2, 2, 3, 3, 1, 2, 3]


@pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot be imported")
def test_every_kernel_is_modelled(monkeypatch):
    # Interpreted kernels have no types to compile with.
    monkeypatch.setattr("tilewright.kernels.inspect.kernel_case", lambda launch, name: launch)
    found = set()
    for form in FORMS:
        with use_attention_kernel(form):
            for _, op, sizes in modelled():
                cases = launches(op, {**sizes, "dtype": torch.bfloat16}, ARCHITECTURE)
                found |= {case.kernel.__name__ for case in cases}
    assert found == {kernel.__name__ for op in ALL.values() for kernel in op.kernels}


def test_the_model_flag_needs_inspect(capsys):
    assert main(["bench", "memory", "--model"]) == 2
    assert "--model needs the stage inspect: the stages are memory" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot be imported")
def test_attention_loops_have_not_become_slower():
    import triton

    committed = json.loads(CYCLES_OF_LOOPS.read_text())
    if triton.__version__ != committed["triton"]:
        pytest.skip(f"the committed figures are from Triton {committed['triton']}, and this is {triton.__version__}")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    shown = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "loop_cycles.py")], capture_output=True, text=True, env=environment
    )
    assert shown.returncode == 0, shown.stderr[-2000:]
    found = json.loads(shown.stdout)["cycles"]
    slower = {
        name: (cycles, found.get(name))
        for name, cycles in committed["cycles"].items()
        # Normalize by the cycles of multiplying, the first figure, in case the tile shape has changed.
        if name not in found
        or any(now / found[name][0] > 1.02 * before / cycles[0] for now, before in zip(found[name], cycles, strict=True))
    }
    assert not slower, f"cycles of multiplying, of an unmasked and of a masked tile: {slower}, committed and found"
