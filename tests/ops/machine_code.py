"""What can be read from a kernel's machine code (SASS): spills, loops, and how many programs a
multiprocessor holds."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import triton

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# bytes of a multiprocessor, 1 KiB of which goes with each program
SHARED = {80: 164 * 1024, 90: 228 * 1024}
REGISTERS, WARPS, PROGRAMS = 65536, 64, 32  # of a multiprocessor, sm_80 and sm_90 alike

# address, instruction
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([^;]*?)\s*;", re.MULTILINE)
_BACK = re.compile(r"BRA\S*\s+(?:!?U?P\w+,\s*)?0x([0-9a-f]+)")


def read(cubin: bytes, shared: int, warps: int, architecture: int) -> dict:
    """Of one kernel that takes `shared` bytes and `warps` warps a program:

    registers and bytes of stack a thread; spills; programs that a multiprocessor holds;
    instructions, barriers, global loads and, of those and of stores, the ones of 16 bytes: of the
    whole, and under "loop" of the longest loop that has no other in it, None without one.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [CUOBJDUMP, "-res-usage", "-sass", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    code = [(int(address, 16), instruction) for address, instruction in _LINE.findall(text)]
    registers, stack = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))
    fit = (
        REGISTERS // (-(-registers // 8) * 8 * 32 * warps),
        WARPS // warps,
        PROGRAMS,
        SHARED[architecture] // (shared + 1024),
    )
    loops = [count([x for at, x in code if begin <= at <= end]) for begin, end in _loops(code)]
    return {
        "registers": registers,
        "stack": stack,
        "spills": sum(x.startswith(("STL", "LDL")) for _, x in code),
        "programs": min(fit),
        **count([x for _, x in code]),
        "loop": max(loops, key=lambda loop: loop["instructions"], default=None),
    }


def count(instructions: list[str]) -> dict[str, int]:
    patterns = {
        "barriers": r"BAR\.SYNC",
        "loads": r"LDG",
        "loads_16": r"LDG\S*\.128\b",
        "stores_16": r"STG\S*\.128\b",
    }
    return {
        "instructions": len(instructions),
        **{
            name: sum(bool(re.match(pattern, x)) for x in instructions)
            for name, pattern in patterns.items()
        },
    }


def _loops(code: list[tuple[int, str]]) -> list[tuple[int, int]]:
    """First and last address of the innermost loops: a branch backwards ends one."""
    back = [(int(match[1], 16), at) for at, x in code if (match := _BACK.match(x))]
    loops = [(begin, end) for begin, end in back if begin < end]
    return [
        (begin, end)
        for begin, end in loops
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in loops)
    ]
