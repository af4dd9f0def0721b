"""Read the machine code of a compiled kernel: SASS (disassembled from a cubin) or AMD assembly.

Loops are the natural loops of the control flow graph, so that a block which the compiler moved out of line counts with
its loop, and a branch back from cold code does not make a loop.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

SPILL = re.compile(r"(LDL|STL)\b|scratch_(load|store)")
GLOBAL_LOAD = re.compile(r"(LDG|LDGSTS|LD)\b|(global|buffer|flat)_load_")
GLOBAL_STORE = re.compile(r"(STG|ST)\b|(global|buffer|flat)_store_")
LANE_MOVE = re.compile(r"v_(read|write)lane_")
AMD_WIDTHS = {"byte": 1, "ubyte": 1, "sbyte": 1, "short": 2, "ushort": 2, "sshort": 2, "dword": 4}


@dataclass(frozen=True)
class Instruction:
    """One instruction. target: label it may jump to. falls_through: whether the next instruction can follow it."""

    opcode: str
    target: str | None = None
    falls_through: bool = True

    def width(self) -> int:
        """Return the bytes that one thread moves with this load or store."""
        if self.opcode[0].isupper():
            if bits := re.search(r"\.[US]?(8|16|64|128|256)\b", self.opcode):
                return int(bits[1]) // 8
            return 4
        kind = re.sub(r"_(d16|hi)\b", "", re.split(r"_(?:load|store)_", self.opcode)[1]).removesuffix("_d16")
        if bits := re.fullmatch(r"[biu](\d+)", kind):
            return int(bits[1]) // 8
        name, _, times = kind.partition("x")
        return AMD_WIDTHS.get(name, 0) * int(times or 1)


@dataclass(frozen=True)
class Code:
    """Instructions of a kernel, and the index of the instruction that follows each label."""

    instructions: list[Instruction]
    labels: dict[str, int]


@dataclass(frozen=True)
class Accesses:
    """What a part of the code moves.

    loads, stores: of global memory, width in bytes -> number of instructions. spills: instructions that spill.
    lane_moves: instructions that move a scalar to or from a lane of a vector register (AMD).
    """

    loads: dict[int, int] = field(default_factory=dict)
    stores: dict[int, int] = field(default_factory=dict)
    spills: int = 0
    lane_moves: int = 0


def parse_sass(text: str) -> Code:
    """Parse the output of `nvdisasm -c`."""
    instructions, labels = [], {}
    for line in text.splitlines():
        if label := re.match(r"^(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif parts := re.match(r"^\s+/\*[0-9a-f]+\*/\s+(@!?U?PT? ?\w* )?\s*([A-Z][A-Z0-9_.]*)(.*?);", line):
            guard, opcode, operands = parts.groups()
            # A call may be a far jump that never returns; a call that returns continues at the next instruction.
            jumps = opcode.startswith(("BRA", "JMP", "CALL"))
            target = re.search(r"\.L_x_\d+", operands) if jumps else None
            # A branch is conditional through its guard, a predicate operand or a form such as BRA.DIV.
            always = not guard and re.fullmatch(r"\s*`?\(?(\.L_x_\d+)?\)?\s*", operands) is not None
            ends = always and (opcode in ("BRA", "EXIT", "JMP") or opcode.startswith("RET"))
            ends = ends or (not guard and opcode.startswith("RET"))
            instructions.append(Instruction(opcode, target[0] if target else None, not ends))
    return Code(instructions, labels)


def parse_amdgcn(text: str) -> Code:
    """Parse the compiler's AMD assembly, up to the end of the function."""
    instructions, labels = [], {}
    for line in text.splitlines():
        if label := re.match(r"^(\.LBB\w+):", line):
            labels[label[1]] = len(instructions)
        elif parts := re.match(r"^\t((?:s|v|ds|global|buffer|flat|scratch)_\w+)(?:\s+([^;]*))?", line):
            opcode, operands = parts[1], parts[2] or ""
            target = re.search(r"\.LBB\w+", operands) if "branch" in opcode else None
            ends = opcode in ("s_branch", "s_endpgm", "s_setpc_b64")
            instructions.append(Instruction(opcode, target[0] if target else None, not ends))
        elif line.startswith(".Lfunc_end"):
            break
    return Code(instructions, labels)


def _blocks(code: Code) -> tuple[list[range], list[list[int]]]:
    """Return the basic blocks and the successors of each."""
    size = len(code.instructions)
    starts = {0, *(i for i in code.labels.values() if i < size)}
    starts |= {i + 1 for i, x in enumerate(code.instructions) if (x.target or not x.falls_through) and i + 1 < size}
    blocks = [range(a, b) for a, b in itertools.pairwise([*sorted(starts), size])]
    index = {block.start: i for i, block in enumerate(blocks)}
    successors: list[list[int]] = []
    for block in blocks:
        last = code.instructions[block[-1]]
        after = [index[block.stop]] if last.falls_through and block.stop in index else []
        if last.target and code.labels.get(last.target, size) in index:
            after.append(index[code.labels[last.target]])
        successors.append(after)
    return blocks, successors


def _predecessors(successors: list[list[int]]) -> dict[int, list[int]]:
    """Return the predecessors of every block that can be reached from the first one."""
    before: dict[int, list[int]] = {0: []}
    stack = [0]
    while stack:
        block = stack.pop()
        for after in successors[block]:
            if after not in before:
                before[after] = []
                stack.append(after)
            before[after].append(block)
    return before


def _dominators(before: dict[int, list[int]]) -> dict[int, set[int]]:
    """Return the dominators of every block that can be reached."""
    dominators = {block: set(before) for block in before} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for block in sorted(before.keys() - {0}):
            new = {block} | set.intersection(*(dominators[b] for b in before[block]))
            changed |= new != dominators[block]
            dominators[block] = new
    return dominators


def accesses(code: Code) -> tuple[Accesses, Accesses]:
    """Count the accesses inside innermost loops and those outside, over all code that can be reached.

    What a loop around another one (over rows, say) holds besides the inner loop counts as outside.
    """
    blocks, successors = _blocks(code)
    before = _predecessors(successors)
    loops: dict[int, set[int]] = {}
    for block, above in _dominators(before).items():
        for header in set(successors[block]) & above:
            body, stack = loops.setdefault(header, {header}), [block]
            while stack:
                member = stack.pop()
                if member not in body:
                    body.add(member)
                    stack.extend(before[member])
    innermost = [body for header, body in loops.items() if not any(h in body for h in loops if h != header)]
    inside = set().union(*innermost)

    def of(chosen: Iterable[int]) -> Accesses:
        return count(code.instructions[i] for b in chosen for i in blocks[b])

    return of(inside), of(before.keys() - inside)


def count(instructions: Iterable[Instruction]) -> Accesses:
    """Count loads and stores of global memory by width, spills and lane moves."""
    loads, stores, spills, lane_moves = Counter[int](), Counter[int](), 0, 0
    for instruction in instructions:
        spills += bool(SPILL.match(instruction.opcode))
        lane_moves += bool(LANE_MOVE.match(instruction.opcode))
        if GLOBAL_LOAD.match(instruction.opcode):
            loads[instruction.width()] += 1
        elif GLOBAL_STORE.match(instruction.opcode):
            stores[instruction.width()] += 1
    return Accesses(dict(loads), dict(stores), spills, lane_moves)


def nvidia_tool(name: str, *arguments: str) -> str:
    """Return the output of a tool that Triton's wheel carries."""
    import triton

    folder = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    return subprocess.run([os.path.join(folder, name), *arguments], capture_output=True, text=True, check=True).stdout


def disassemble_cubin(cubin: bytes) -> tuple[Code, dict[str, int]]:
    """Return the code, and REG, STACK, SHARED and LOCAL of the resource table."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = nvidia_tool("cuobjdump", "--dump-resource-usage", file.name)
        code = parse_sass(nvidia_tool("nvdisasm", "-c", file.name))
    return code, {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}


def amd_resources(text: str) -> dict[str, int]:
    """Return registers, spilled registers and private (scratch) bytes from the metadata of an AMD kernel."""
    keys = "vgpr_count|vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size"
    return {key: int(value) for key, value in re.findall(rf"^\s+(?:- )?\.({keys}):\s+(\d+)", text, re.M)}
