"""Machine code of a Hopper kernel: its instructions with their control bits, and its innermost loops.

NVIDIA does not document the control bits; Jia et al. (2018, arXiv:1804.06826, section 2.1) describe their layout.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..kernels.inspect import tool

# Pipes of a multiprocessor's sub-partition, and their instructions; all other instructions run on the ALU pipe.
_PIPES = {
    "fma": "FFMA FMUL FADD FFMA2 FMUL2 FADD2 HFMA2 HADD2 HMUL2",
    "imad": "IMAD",
    "mufu": "MUFU I2F F2I I2FP POPC FRND",
    "lsu": "SHFL LDS STS LDSM STSM LDG STG LD ST LDL STL ATOM RED ATOMS LDC LDGSTS",
    "control": "BRA BSSY BSYNC NOP WARPSYNC WARPGROUP BAR SYNCS DEPBAR MEMBAR FENCE EXIT CCTL ERRBAR UTMALDG HGMMA QGMMA "
    "IGMMA BGMMA HMMA",
}
PIPE_OF = {name: pipe for pipe, names in _PIPES.items() for name in names.split()}
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
NO_SCOREBOARD = 7


@dataclass(frozen=True)
class Instruction:
    """One instruction of one warp."""

    text: str
    opcode: str
    pipe: str
    stall: int
    """Cycles until the warp can issue its next instruction."""
    write: int
    """Scoreboard, of 6, that signals the result; `NO_SCOREBOARD` without one."""
    read: int
    """Scoreboard that signals that the operands have been read."""
    wait: int
    """Bit mask of the scoreboards to wait for."""
    columns: int = 0
    """Columns of a product of 64 rows and 32 bytes of channels (one HGMMA); 0 for other instructions."""
    from_shared: int = 0
    """Rows of the operands that the product reads from shared memory."""
    ends_group: bool = False
    """Whether it ends a group of products, as counted by `warpgroup.wait`."""

    @property
    def base(self) -> str:
        """Name of the instruction without its modifiers."""
        return self.opcode.split(".")[0]

    @property
    def outstanding(self) -> int | None:
        """Groups of products that can stay in flight after this wait; None for other instructions."""
        if not self.opcode.startswith("WARPGROUP.DEPBAR"):
            return None
        found = re.search(r"0x([0-9a-f]+)", self.text)
        return int(found[1], 16) if found else 0

    @property
    def barrier_threads(self) -> int | None:
        """Number of threads at a barrier, 0 for all of the program; None for other instructions."""
        if not self.opcode.startswith("BAR.SYNC"):
            return None
        # Operands: the barrier and optionally its number of threads. A number in a register is fewer than all threads.
        operands = self.text.split(None, 1)[1].split(",")
        return int(operands[1], 16) if len(operands) > 1 and "0x" in operands[1] else len(operands) - 1

    @property
    def bytes(self) -> int:
        """Bytes of global memory that it moves per thread."""
        if self.base not in ("LDG", "STG", "LDGSTS"):
            return 0
        return next((_WIDTHS[part] for part in self.opcode.split(".") if part in _WIDTHS), 4)


Item = Instruction | str
"""An instruction, or a label."""


def _pipe(opcode: str) -> str:
    base = opcode.split(".")[0]
    uniform = base.startswith("U") or base in ("R2UR", "S2UR", "VOTEU")
    return PIPE_OF.get(base, "uniform" if uniform else "alu")


def _instruction(text: str, control: int) -> Instruction:
    opcode = re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]
    bits = (control >> 41 & 15, control >> 46 & 7, control >> 49 & 7, control >> 52 & 63)
    # A product reads 32 bytes of channels for every dtype.
    product = re.match(r"[A-Z]GMMA\.(\d+)x(\d+)x\d+", opcode)
    if product is None:
        return Instruction(text, opcode, _pipe(opcode), *bits)
    rows, columns = map(int, product.groups())
    left = text.split(None, 1)[1].split(",")[1]
    held = re.match(r"\s*R\d", left) is not None
    return Instruction(text, opcode, _pipe(opcode), *bits, columns, columns + (0 if held else rows), "gsb0" in text)


def disassemble(cubin: bytes) -> list[Item]:
    """Return the instructions and labels of a kernel in order."""
    items: list[Item] = []
    lines = tool("nvdisasm", cubin, "-c", "-hex").splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        label = re.match(r"^(\.L_?x?_?\w+):", line)
        found = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*/\* 0x[0-9a-f]{16} \*/", line)
        if label:
            items.append(label[1])
        elif found:
            # The next line has the upper 64 of 128 bits, which contain the control bits.
            control = re.search(r"0x([0-9a-f]{16})", following)
            assert control is not None
            items.append(_instruction(found[1].rstrip("; "), int(control[1], 16)))
    return items


def loops(items: list[Item]) -> list[list[Instruction]]:
    """Return the innermost loops in order of address, each as its instructions in a straight line."""
    labels = {item: i for i, item in enumerate(items) if isinstance(item, str)}
    spans = []
    for i, item in enumerate(items):
        # The back edge of a loop is conditional; unconditional backward branches return from the slow path of a wait.
        if isinstance(item, str) or item.opcode != "BRA" or not item.text.startswith("@"):
            continue
        target = re.search(r"\((\.L\w+)\)", item.text)
        if target and labels.get(target[1], i) < i:
            spans.append((labels[target[1]], i))
    inner = [s for s in spans if not any(t != s and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
    return [[x for x in items[begin : end + 1] if not isinstance(x, str)] for begin, end in inner]


def multiplies(body: Iterable[Instruction]) -> bool:
    """Return whether the instructions contain products of warp groups."""
    return any(x.columns for x in body)
