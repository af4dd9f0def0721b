"""What a compiled kernel costs, read from its machine code: SASS (from a cubin) or AMD assembly. No GPU needed.

The control flow graph gives the loops: natural loops, so that a block which the compiler moved out of line counts with
the loop it belongs to, and a branch back from cold code is not taken for a loop.
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

TRANSCENDENTAL = re.compile(r"MUFU|v_(exp|log|rcp|rsq|sqrt|sin|cos)_")
SPILL = re.compile(r"(LDL|STL)\b|scratch_(load|store)")
GLOBAL_LOAD = re.compile(r"(LDG|LDGSTS|LD)\b|(global|buffer|flat)_load_")
GLOBAL_STORE = re.compile(r"(STG|ST)\b|(global|buffer|flat)_store_")
AMD_WIDTHS = {"byte": 1, "ubyte": 1, "sbyte": 1, "short": 2, "ushort": 2, "sshort": 2, "dword": 4}


@dataclass(frozen=True)
class Instruction:
    """One instruction. target: label it may jump to. falls_through: whether the next one can follow it.

    guarded: whether a predicate of its own decides if it runs. operands: of AMD instructions.
    """

    opcode: str
    target: str | None = None
    falls_through: bool = True
    guarded: bool = False
    operands: tuple[str, ...] = ()

    def width(self) -> int:
        """Bytes that one thread moves with this load or store."""
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
    """Instructions of a kernel and the label of the instruction each label stands before."""

    instructions: list[Instruction]
    labels: dict[str, int]


@dataclass
class Region:
    """Counts of a part of the code. loads and stores of global memory: width in bytes -> instructions.

    masked: a loop in which not every lane loads or stores in every trip.
    """

    instructions: int = 0
    mufu: int = 0
    spills: int = 0
    loads: dict[int, int] = field(default_factory=dict)
    stores: dict[int, int] = field(default_factory=dict)
    masked: bool = False

    def bytes_loaded(self) -> int:
        """Per thread."""
        return sum(width * count for width, count in self.loads.items())

    def bytes_stored(self) -> int:
        """Per thread."""
        return sum(width * count for width, count in self.stores.items())


def parse_sass(text: str) -> Code:
    """Instructions from `nvdisasm -c`."""
    instructions, labels = [], {}
    for line in text.splitlines():
        if label := re.match(r"^(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"^\s+/\*[0-9a-f]+\*/\s+(@!?U?PT? ?\w* )?\s*([A-Z][A-Z0-9_.]*)(.*?);", line):
            guard, opcode, operands = found.groups()
            # A call may be a jump across a far distance that never returns; one that does returns to what follows it.
            jumps = opcode.startswith(("BRA", "JMP", "CALL"))
            target = re.search(r"\.L_x_\d+", operands) if jumps else None
            # A branch is conditional through its guard, a predicate operand or a form such as BRA.DIV.
            always = not guard and re.fullmatch(r"\s*`?\(?(\.L_x_\d+)?\)?\s*", operands) is not None
            ends = always and (opcode in ("BRA", "EXIT", "JMP") or opcode.startswith("RET"))
            ends = ends or (not guard and opcode.startswith("RET"))
            instructions.append(Instruction(opcode, target[0] if target else None, not ends, bool(guard)))
    return Code(instructions, labels)


def parse_amdgcn(text: str) -> Code:
    """Instructions from AMD assembly text (the compiler's own output, up to the end of the function)."""
    instructions, labels = [], {}
    for line in text.splitlines():
        if label := re.match(r"^(\.LBB\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"^\t((?:s|v|ds|global|buffer|flat|scratch)_\w+)(?:\s+([^;]*))?", line):
            opcode, operands = found[1], found[2] or ""
            target = re.search(r"\.LBB\w+", operands) if "branch" in opcode else None
            ends = opcode in ("s_branch", "s_endpgm", "s_setpc_b64")
            names = tuple(name.strip() for name in operands.split(","))
            instructions.append(Instruction(opcode, target[0] if target else None, not ends, operands=names))
        elif line.startswith(".Lfunc_end"):
            break
    return Code(instructions, labels)


def _blocks(code: Code) -> tuple[list[range], list[list[int]]]:
    """Basic blocks and the successors of each."""
    size = len(code.instructions)
    starts = {0, *(i for i in code.labels.values() if i < size)}
    starts |= {i + 1 for i, x in enumerate(code.instructions) if (x.target or not x.falls_through) and i + 1 < size}
    edges = [*sorted(starts), size]
    blocks = [range(a, b) for a, b in itertools.pairwise(edges)]
    index = {block.start: i for i, block in enumerate(blocks)}
    successors: list[list[int]] = []
    for block in blocks:
        last = code.instructions[block[-1]]
        after = [index[block.stop]] if last.falls_through and block.stop in index else []
        if last.target and code.labels.get(last.target, size) in index:
            after.append(index[code.labels[last.target]])
        successors.append(after)
    return blocks, successors


def _dominators(successors: list[list[int]]) -> dict[int, set[int]]:
    """Dominators of every block that can be reached from the first."""
    reached, stack = {0}, [0]
    while stack:
        for after in successors[stack.pop()]:
            if after not in reached:
                reached.add(after)
                stack.append(after)
    before: dict[int, list[int]] = {b: [] for b in reached}
    for block in reached:
        for after in successors[block]:
            before[after].append(block)
    dominators = {block: set(reached) for block in reached} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for block in sorted(reached - {0}):
            new = {block} | set.intersection(*(dominators[b] for b in before[block]))
            changed |= new != dominators[block]
            dominators[block] = new
    return dominators


def regions(code: Code) -> tuple[list[Region], Region, Region]:
    """(every innermost loop in program order, everything outside them, the longest path outside them).

    Only code that can be reached. The path takes one side of every branch: the most that a program runs besides loops.

    A loop around another one (over rows, say) is not listed; what it holds besides its inner loops counts as outside.
    But a loop inside another one that does not touch global memory but by atomics waits, for a lock or a barrier: it
    counts as part of that one, gone through once.
    """
    blocks, successors = _blocks(code)
    dominators = _dominators(successors)
    before: dict[int, list[int]] = {}
    for block in dominators:
        for after in successors[block]:
            before.setdefault(after, []).append(block)
    loops: dict[int, set[int]] = {}
    always: dict[int, set[int]] = {}  # blocks of a loop that every trip goes through
    for block, above in dominators.items():
        for header in set(successors[block]) & above:
            body, stack = loops.setdefault(header, {header}), [block]
            always[header] = always.get(header, above) & above
            while stack:
                member = stack.pop()
                if member not in body:
                    body.add(member)
                    stack.extend(before.get(member, []))
    for header in [h for h in loops if any(h in body for other, body in loops.items() if other != h)]:
        found_here = count(code.instructions[i] for b in loops[header] for i in blocks[b])
        if not (found_here.loads or found_here.stores):
            del loops[header]
    innermost = sorted(header for header, body in loops.items() if not any(h in body for h in loops if h != header))
    found, outside = [], set(dominators)
    for header in innermost:
        outside -= loops[header]
        body = [code.instructions[i] for b in loops[header] for i in blocks[b]]
        # Masked in SASS by a predicate, on AMD by an offset that is out of range, on both by a branch around.
        selected = {i.operands[0] for i in body if i.opcode.startswith("v_cndmask")}
        certain = [code.instructions[i] for b in loops[header] & always[header] for i in blocks[b]]
        unmasked = count(i for i in certain if not i.guarded and (len(i.operands) < 2 or i.operands[1] not in selected))
        found.append(count(body))
        found[-1].masked = (unmasked.loads, unmasked.stores) != (found[-1].loads, found[-1].stores)
    inside = {b: header for header in innermost for b in loops[header]}
    path = _longest_path(blocks, successors, dominators, inside)
    return found, *(count(code.instructions[i] for b in chosen for i in blocks[b]) for chosen in (outside, path))


def _longest_path(
    blocks: list[range], successors: list[list[int]], dominators: dict[int, set[int]], inside: dict[int, int]
) -> list[int]:
    """Blocks of the path with the most instructions from the start; a loop of `inside` is one point of no length."""
    after: dict[int, set[int]] = {}
    for block, above in dominators.items():
        forward = {inside.get(b, b) for b in successors[block] if b not in above}
        after.setdefault(inside.get(block, block), set()).update(forward - {inside.get(block, block)})
    order: list[int] = []  # depth first, so that a block comes after all that follow it
    stack, seen = [(0, iter(after[0]))], {0}
    while stack:
        block, rest = stack[-1]
        following = next((b for b in rest if b not in seen), None)
        if following is None:
            order.append(stack.pop()[0])
        else:
            seen.add(following)
            stack.append((following, iter(after[following])))
    best: dict[int, tuple[int, list[int]]] = {}
    for block in order:
        length, path = max((best[b] for b in after[block] if b in best), key=lambda found: found[0], default=(0, []))
        own = [] if block in inside else [block]
        best[block] = length + sum(len(blocks[b]) for b in own), own + path
    return best[0][1]


def count(instructions: Iterable[Instruction]) -> Region:
    """Counts over some instructions; no-ops are left out."""
    chosen = [instruction for instruction in instructions if instruction.opcode not in ("NOP", "s_nop")]
    loads, stores = Counter[int](), Counter[int]()
    for instruction in chosen:
        if GLOBAL_LOAD.match(instruction.opcode):
            loads[instruction.width()] += 1
        elif GLOBAL_STORE.match(instruction.opcode):
            stores[instruction.width()] += 1
    return Region(
        instructions=len(chosen),
        mufu=sum(bool(TRANSCENDENTAL.match(x.opcode)) for x in chosen),
        spills=sum(bool(SPILL.match(x.opcode)) for x in chosen),
        loads=dict(loads),
        stores=dict(stores),
    )


def nvidia_tool(name: str, *arguments: str) -> str:
    """Output of a tool that Triton's wheel carries."""
    import triton

    folder = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    return subprocess.run([os.path.join(folder, name), *arguments], capture_output=True, text=True, check=True).stdout


def disassemble_cubin(cubin: bytes) -> tuple[Code, dict[str, int]]:
    """Code, and the REG, STACK, SHARED and LOCAL figures of the resource table."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = nvidia_tool("cuobjdump", "--dump-resource-usage", file.name)
        code = parse_sass(nvidia_tool("nvdisasm", "-c", file.name))
    return code, {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}


def amd_resources(text: str) -> dict[str, int]:
    """Figures of the kernel's metadata: registers, spills, private (scratch) and group (LDS) bytes."""
    keys = "vgpr_count|agpr_count|sgpr_count|vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size"
    return {key: int(value) for key, value in re.findall(rf"^\s+(?:- )?\.({keys}):\s+(\d+)", text, re.M)}
