"""Takes PTX apart: each kernel's text, parameters and barriers, and the origins of registers."""

import re
from dataclasses import dataclass

# `bar.warp.sync` orders the lanes of one warp; the others order all threads of a block.
BARRIER = re.compile(
    r"^(\s*)(?:@!?%p\d+\s+)?(?:bar|barrier)(?:\.cta)?\.(sync|red|warp\.sync)\b.*;\s*$"
)


@dataclass
class Parameter:
    name: str
    type: str
    bytes: int


@dataclass
class Kernel:
    """One entry point, with everything outside functions that its text mentions."""

    name: str
    text: str
    parameters: list[Parameter]
    max_threads: int

    @property
    def barriers(self) -> list[int]:
        """Indices of the lines that hold a barrier."""
        return [i for i, line in enumerate(self.text.splitlines()) if BARRIER.match(line)]

    def variant(
        self, reductions: list[list[int]], removed: int | None = None, with_race: bool = False
    ) -> str:
        """The kernel's text for the verifier; all lines keep their numbers.

        The verifier knows no reduction over a block (`bar.red`). Its result becomes a test of the
        block's index: true in the blocks that are named for this reduction, false in all others.
        Without the barrier each thread keeps its own value.

        `with_race` puts a race in place of the barrier, which shows whether a launch reaches it.
        """
        blocks = iter(reductions)
        lines = self.text.splitlines()
        for number, index in enumerate(self.barriers):
            reduction = REDUCTION.match(lines[index])
            true_blocks = next(blocks, []) if reduction else []
            if number == removed:
                lines[index] = f"mov.pred {reduction[1]}, {reduction[2]};" if reduction else ""
                lines[index] += RACE if with_race else ""
            elif reduction:
                lines[index] = "bar.sync 0; " + block_test(reduction[1], true_blocks)
        return "\n".join(without_bfi(line) for line in lines) + "\n"


def without_bfi(line: str) -> str:
    """Replaces the insertion of a bit field, which the verifier cannot compute, by four steps."""
    match = BFI.match(line)
    if not match:
        return line
    target, source, base, start, length = match.groups()
    field = (1 << int(length)) - 1
    hole = 0xFFFFFFFF & ~(field << int(start))
    return (
        f"{{ .reg .b32 %field, %kept; and.b32 %field, {source}, {field};"
        f" shl.b32 %field, %field, {start}; and.b32 %kept, {base}, {hole};"
        f" or.b32 {target}, %field, %kept; }}"
    )


BFI = re.compile(r"\s*bfi\.b32\s+(%\w+), (%?\w+), (%?\w+), (\d+), (\d+);\s*$")

# All threads write the same shared word.
RACE = (
    " { .shared .align 4 .u32 raced; .reg .u32 %racer;"
    " mov.u32 %racer, %tid.x; st.shared.u32 [raced], %racer; }"
)


def block_test(predicate: str, blocks: list[int]) -> str:
    tests = "".join(
        f" setp.eq.u32 %one_block, %block, {block}; or.pred {predicate}, {predicate}, %one_block;"
        for block in blocks
    )
    return (
        f"mov.pred {predicate}, 0; {{ .reg .u32 %block; .reg .pred %one_block;"
        f" mov.u32 %block, %ctaid.x;{tests} }}"
    )


class Slices:
    """Says what the registers of one kernel are computed from.

    Names of registers are not unique, because an inner scope may declare a name again. All
    definitions of a name count, so an answer can only name too many origins.
    """

    def __init__(self, text: str, pointers: set[str]):
        self.lines = text.splitlines()
        self.pointers = pointers
        self.addresses: dict[str, bool] = {}
        self.tests: list[int] | None = None
        self.definitions: dict[str, list[int]] = {}
        for index, line in enumerate(self.lines):
            line = re.sub(r"^\s*(@!?%\w+\s+)?", "", line)
            parts = re.match(r"([a-z][\w.:]*)\s+(.*);\s*$", line)
            if not parts or parts[1].startswith(("st.", "bra", "red.", "ret")):
                continue
            target = re.match(r"\{[^}]*\}|[^,]+", parts[2])
            for register in re.findall(r"%\w+", target[0] if target else ""):
                self.definitions.setdefault(register, []).append(index)

    def predicate(self, index: int) -> str | None:
        match = re.match(r"\s*@!?(%\w+)\s", self.lines[index])
        return match[1] if match else None

    def walk(self, register: str) -> set[str]:
        """The origins of a register's value."""
        origins: set[str] = set()
        seen: set[str] = set()
        waiting = [register]
        while waiting:
            register = waiting.pop()
            if register in seen:
                continue
            seen.add(register)
            if origin := SPECIAL.get(register):
                origins.add(origin)
                continue
            if register not in self.definitions:
                origins.add("unknown")
            for index in self.definitions.get(register, []):
                line = re.sub(r"^\s*(@!?%\w+\s+)?", "", self.lines[index])
                opcode, operands = line.split(None, 1)
                if opcode.startswith("ld.param"):
                    name = re.search(r"\[(\w+)", operands)
                    known = name and name[1] not in self.pointers and not name[1].startswith("%")
                    origins.add("scalar" if known else "pointer")
                elif re.match(r"ld(\.volatile)?\.global", opcode) and self.is_uniform(operands):
                    # All threads of a block read the same value from the same address.
                    origins.add("data")
                elif opcode.startswith(("ld", "atom")):
                    origins.add("memory")
                elif opcode.startswith(("shfl", "vote", "bar", "redux", "match", "activemask")):
                    origins.add("shuffle")
                else:
                    sources = operands.split(",", 1)
                    waiting += re.findall(r"%[\w.]+", sources[1] if len(sources) > 1 else "")
        return origins

    def is_uniform(self, operands: str) -> bool:
        """Whether all threads of a block load from the same address."""
        address = re.search(r"\[(%\w+)", operands)
        if not address:
            return False
        if address[1] not in self.addresses:
            # The answer while it is being found, for an address that is loaded from memory itself.
            self.addresses[address[1]] = False
            self.addresses[address[1]] = self.walk(address[1]) <= UNIFORM
        return self.addresses[address[1]]

    def address_tests(self, line: int) -> list[int]:
        """Comparisons of addresses before the branch on a line; both are numbers from 1.

        Such a comparison has one outcome for a whole block, because it depends on nothing else. It
        may decide the branch through other branches, so all that come before are candidates.
        This does not hold if the threads of a block reach the comparison with different values of
        a register through different branches. The kernels compare only whole tensors and rows.
        """
        if self.tests is None:
            self.tests = []
            for index, text in enumerate(self.lines):
                if match := SETP.match(text):
                    origins: set[str] = set()
                    for register in re.findall(r"%[\w.]+", match[2]):
                        origins |= self.walk(register)
                    if "pointer" in origins and origins <= UNIFORM:
                        self.tests.append(index + 1)
        return [test for test in self.tests if test < line]

    def origins(self, line: int) -> set[str]:
        predicate = self.predicate(line - 1)
        return self.walk(predicate) if predicate else {"unknown"}

    @staticmethod
    def decide(text: str, outcomes: dict[int, bool]) -> str:
        """A text with comparisons replaced by their outcomes."""
        lines = text.splitlines()
        for line, outcome in outcomes.items():
            target = SETP.match(lines[line - 1])[1]
            lines[line - 1] = f"\tmov.pred \t{target}, {int(outcome)};"
        return "\n".join(lines) + "\n"


# Values of these origins are the same for all threads of a block.
UNIFORM = {"pointer", "scalar", "block", "data"}

SETP = re.compile(r"\s*setp\.\w+\.\w+\s+(%\w+), (.*);\s*$")
REDUCTION = re.compile(r"\s*bar\.red\.(?:or|and)\.pred\s+(%\w+)\s*,\s*\w+\s*,\s*(%\w+)\s*;\s*$")

# Special registers are the same for a block or differ between its threads.
SPECIAL = {
    f"%{name}.{axis}": origin
    for axis in "xyz"
    for name, origin in (
        ("tid", "thread"),
        ("ctaid", "block"),
        ("ntid", "scalar"),
        ("nctaid", "scalar"),
    )
}
SPECIAL |= {"%laneid": "thread", "%warpid": "thread"}

VARIABLE = re.compile(
    r"\s*\.(?:extern |visible |weak )*\.?(?:shared|global|const)\b"
    r".*?(\w+)(?:\[[^\]]*\])?(?: = .*)?;"
)

SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}


def kernels_of(ptx: str) -> dict[str, Kernel]:
    """Cuts a program into kernels. Fails if a helper with a barrier was not inlined."""
    # Entry points end with a brace in the first column. All other text belongs to all kernels.
    pieces = re.split(r"(?ms)^(\.visible \.entry .*?^\}\n?)", ptx)
    common = [piece for piece in pieces if not piece.startswith(".visible .entry")]
    for piece in common:
        if ".func" in piece and any(BARRIER.match(line) for line in piece.splitlines()):
            raise ValueError(
                "a function with a barrier is not inlined: its barriers belong to no kernel"
            )
    kernels = {}
    for piece in pieces:
        if not piece.startswith(".visible .entry"):
            continue
        name = re.match(r"\.visible \.entry (\w+)\(", piece)[1]
        head = []
        for line in "".join(common).splitlines(keepends=True):
            variable = VARIABLE.match(line)
            if not variable or re.search(rf"\b{re.escape(variable[1])}\b", piece):
                head.append(line)
        parameters = []
        signature = piece[: piece.index(")")]
        for line in signature.splitlines():
            if match := re.match(r"\s*\.param .*?\.([a-z])(\d+) .*?(\w+)(?:\[(\d+)\])?,?$", line):
                type_, size, parameter, count = match.groups()
                parameters.append(Parameter(parameter, type_ + size, SIZES[size] * int(count or 1)))
        threads = re.search(r"\.maxntid (\d+)", piece)
        kernels[name] = Kernel(
            name, "".join(head) + piece, parameters, int(threads[1]) if threads else 1024
        )
    return kernels
