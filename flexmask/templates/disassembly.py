"""What a disassembly of a compiled kernel (SASS, as `nvdisasm -c` prints it) shows: its loops, what they hide, and its mistakes."""

from __future__ import annotations

import re
from collections import Counter

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9]+)", re.MULTILINE)
_LABEL = re.compile(r"^\s*(\.L_x_\d+):")
# loops end in a conditional jump; others come back from code that waits out of line
_JUMP = re.compile(r"@!?U?P\d+\s+BRA\b.*`\((\.L_x_\d+)\)")
_WAIT_FOR_ALL = re.compile(r"WARPGROUP\.DEPBAR\.LE\s+gsb0,\s*0x0")

_STATEMENT = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(@!?U?P[\dT]+\s+)?([A-Z]\S*)\s*(.*)$")
_PLACE = re.compile(r"\.L_x_\d+")
_UNIFORM = re.compile(r"\bUR(\d+)\b")
_DESCRIPTORS = re.compile(r"gdesc\[UR(\d+)\]")
# what writes no register, though its first operand may be one
_WRITES_NOTHING = re.compile(r"BAR|SYNCS|ST|RED|UTMA|UBLK|WARPSYNC|WARPGROUP|DEPBAR|CALL|RET|EXIT|BRA|BRX|BSSY|BSYNC|CCTL|USETMAXREG")
_ALL = (1 << 63) - 1

# (jumps or falls to, uniform registers written, read, the text) of an instruction; registers are bits of a number
_Node = tuple[list[int], int, int, str]


def opcodes_of(text: str) -> Counter[str]:
    """How often each kind of instruction occurs."""
    return Counter(_INSTRUCTION.findall(text))


def loops_of(text: str) -> list[str]:
    """The loops of a disassembly that multiply matrices and hold no such loop themselves."""
    lines = text.split("\n")
    labels = {found[1]: i for i, line in enumerate(lines) if (found := _LABEL.match(line))}
    jumps = [(labels.get(found[1], i), i) for i, line in enumerate(lines) if (found := _JUMP.search(line))]
    counts = {(a, b): opcodes_of("\n".join(lines[a:b])) for a, b in jumps if a < b}
    loops = [span for span, count in counts.items() if count["HGMMA"] + count["HMMA"] + count["FFMA"] > 1]
    inner = [s for s in loops if not any(s != other and s[0] <= other[0] and other[1] <= s[1] for other in loops)]
    return ["\n".join(lines[a:b]) for a, b in inner]


def exposed_of(loop: str) -> int:
    """How many exponentials of a loop stand behind a wait for all products, and before the next one."""
    flying, found = False, 0
    for line in loop.split("\n"):
        if "HGMMA" in line:
            flying = True
        elif _WAIT_FOR_ALL.search(line):
            flying = False
        elif "MUFU.EX2" in line:
            found += not flying
    return found


def undefined_of(text: str) -> tuple[str, ...]:
    """Instructions that may read a uniform register before anything has written it, in the order of the text.

    The assembler of CUDA 12.8 merges equal expressions in front of two loops into the first of them, and jumps past it where that loop has
    nothing to do: descriptors of products are garbage then. A conditional write counts as one; what is moved is as good as what it was.
    """
    nodes = _flow(text)
    unwritten: list[int | None] = [None] * len(nodes)
    todo = [0][: len(nodes)]
    unwritten[:1] = [_ALL][: len(nodes)]
    while todo:
        i = todo.pop()
        after, writes, reads, text = nodes[i]
        before = unwritten[i] or 0
        left = before | writes if _copies(text) and before & reads else before & ~writes
        for j in after:
            known = unwritten[j]
            merged = left if known is None else known | left
            if merged != known:
                unwritten[j] = merged
                todo.append(j)
    found = ((text, reads & bits) for (_, _, reads, text), bits in zip(nodes, unwritten, strict=True) if bits)
    return tuple(text for text, wrong in found if wrong and not _copies(text))


def _copies(text: str) -> bool:
    """Whether an instruction moves a register to another: a value that nobody has written is moved at times, and not looked at."""
    return "UMOV " in text


def _flow(text: str) -> list[_Node]:
    """The instructions of a disassembly and where each may go on."""
    statements: list[tuple[str, str, str, str]] = []
    labels: dict[str, int] = {}
    for line in text.split("\n"):
        if found := _LABEL.match(line):
            labels[found[1]] = len(statements)
        elif found := _STATEMENT.match(line):
            statements.append((found[1] or "", found[2], found[3], " ".join(line.split("*/", 1)[1].split())))
    nodes, end = [], len(statements)
    for i, (condition, opcode, operands, shown) in enumerate(statements):
        after = [labels.get(name, end) for name in _PLACE.findall(operands)] if opcode.startswith(("BRA", "BRX")) else []
        ends = opcode.startswith(("BRA", "BRX", "EXIT", "RET")) and not condition and not re.match(r"!?U?P\d", operands)
        after += [] if ends else [i + 1]
        nodes.append(([j for j in after if j < end], *_registers(opcode, operands), shown))
    return nodes


def _registers(opcode: str, operands: str) -> tuple[int, int]:
    """(the uniform registers an instruction writes, those it reads), as bits."""
    if opcode.startswith("HGMMA"):  # two registers are the descriptor of A, which are not looked at if A is in registers, two that of B
        read = 0b1100 if re.match(r"R\d+, R\d+", operands) else 0b1111
        return 0, sum(read << int(at) for at in _DESCRIPTORS.findall(operands))
    first, _, rest = re.sub(r"^U?P\d, ", "", operands).partition(",")  # R2UR may tell whether all threads agree
    target = re.fullmatch(r"\s*UR(\d+)\s*", first)
    if target is None or _WRITES_NOTHING.match(opcode):
        return 0, sum(1 << at for at in set(map(int, _UNIFORM.findall(operands))))
    wide = 4 if ".128" in opcode else 2 if ".64" in opcode or ".WIDE" in opcode else 1
    return ((1 << wide) - 1) << int(target[1]), sum(1 << at for at in set(map(int, _UNIFORM.findall(rest))))
