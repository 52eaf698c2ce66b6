"""Reads PTX text into modules, kernels and instructions. No instruction is interpreted here."""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass, field

from . import types


class PtxError(ValueError):
    """The PTX text does not have the shape this parser knows."""


@dataclass
class Param:
    name: str
    type: str
    size: int
    offset: int


@dataclass
class Variable:
    """A .shared, .global, .const or .local variable."""

    space: str
    name: str
    type: str
    align: int
    count: int | None  # None: dynamic shared memory, "extern .shared x[]"
    init: str = ""
    line: int = 0

    @property
    def size(self) -> int:
        return types.size(self.type) * (self.count or 0)


@dataclass
class Instruction:
    line: int
    opcode: str
    args: list[str]
    guard: str | None = None
    negated: bool = False

    @property
    def mods(self) -> list[str]:
        """The dotted parts after the first word."""
        return self.opcode.split(".")[1:]

    @property
    def type(self) -> str:
        return self.mods[-1]

    def has(self, *modifiers: str) -> bool:
        """Whether any of `modifiers` is present."""
        return not set(modifiers).isdisjoint(self.mods)

    def pick(self, *modifiers: str) -> str | None:
        """The first modifier of the instruction that is one of `modifiers`."""
        return next((m for m in self.mods if m in modifiers), None)


@dataclass
class Label:
    line: int
    name: str


@dataclass
class Entry:
    """A kernel."""

    name: str
    params: dict[str, Param]
    directives: str
    line: int
    registers: dict[str, str] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    body: list[Instruction | Label] = field(default_factory=list)
    branch_targets: dict[str, list[str]] = field(default_factory=dict)
    locations: list[tuple[int, int, int]] = field(default_factory=list)  # PTX line, file, line

    @property
    def param_bytes(self) -> int:
        return max((p.offset + p.size for p in self.params.values()), default=0)

    @property
    def max_threads(self) -> int:
        """Block size limit from __launch_bounds__ (.maxntid) or .reqntid; 0 when there is none."""
        match = re.search(r"\.(?:maxntid|reqntid)\s+([\d, ]+)", self.directives)
        return math.prod(int(x) for x in match.group(1).split(",") if x.strip()) if match else 0


@dataclass
class Module:
    entries: dict[str, Entry]
    variables: list[Variable]
    files: dict[int, str]
    key: str  # names the module's variables in the runtime


_DECLARATION = re.compile(
    r"(?:\.(?:visible|weak|common|extern)\s+)*\.(shared|global|const|local)\s+"
    r"(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)\s*(\[\s*(\d*)\s*\])?\s*(?:=\s*(.*))?$",
    re.S,
)
_IDENTIFIER = re.compile(r"[\w$]+")
_INSTRUCTION = re.compile(r"(?:@(!?)(%?[\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.S)


def strip_comments(text: str) -> str:
    """Removes comments but keeps line numbers and quoted strings."""

    def keep(match: re.Match) -> str:
        return match.group() if match.group()[0] == '"' else "\n" * match.group().count("\n")

    return re.sub(r'"[^"\n]*"|/\*.*?\*/|//[^\n]*', keep, text, flags=re.S)


def split_operands(text: str) -> list[str]:
    """Splits at commas outside brackets."""
    parts, depth, current = [], 0, ""
    for char in text:
        depth += (char in "{[(") - (char in "}])")
        if char == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += char
    if current.strip():
        parts.append(current.strip())
    return parts


def parse(text: str) -> Module:
    """Parses a PTX module."""
    text = strip_comments(text)
    files = {int(n): name for n, name in re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text)}
    text = _blank(text, r"\.section\s+[\w.]+\s*\{[^}]*\}")
    text = _blank(text, r"^\s*\.(?:version|target|address_size|file)\b[^\n]*$")
    entries: dict[str, Entry] = {}
    bodies: list[tuple[int, int]] = []
    for head in re.finditer(r"\.entry\s+([\w$]+)\s*(?:\((.*?)\))?([^{;]*)\{", text, re.S):
        end = _closing_brace(text, head.end())
        line = text.count("\n", 0, head.end()) + 1
        entry = Entry(head.group(1), _params(head.group(2) or ""), head.group(3), line)
        _parse_body(entry, text[head.end() : end - 1])
        entries[entry.name] = entry
        bodies.append((head.start(), end))
    rest, at = "", 0
    for start, end in bodies:
        rest += text[at:start]
        at = end
    rest += text[at:]
    key = hashlib.sha256(rest.encode()).hexdigest()[:12]
    return Module(entries, _module_variables(rest), files, key)


def opcodes(text: str) -> set[str]:
    """The distinct opcodes of all kernels in a PTX text."""
    entries = parse(text).entries.values()
    return {s.opcode for e in entries for s in e.body if isinstance(s, Instruction)}


def _blank(text: str, pattern: str) -> str:
    return re.sub(pattern, lambda m: "\n" * m.group().count("\n"), text, flags=re.S | re.M)


def _closing_brace(text: str, at: int) -> int:
    depth = 1
    for brace in re.compile(r"[{}]").finditer(text, at):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return brace.end()
    raise PtxError("unbalanced braces")


def _params(text: str) -> dict[str, Param]:
    params: dict[str, Param] = {}
    offset = 0
    for item in split_operands(text):
        match = re.match(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\b", item)
        name = re.search(r"([\w$]+)\s*(?:\[(\d+)\])?$", item)
        if not match or not name:
            raise PtxError(f"parameter: {item}")
        item_size = types.size(match.group(2)) * int(name.group(2) or 1)
        align = int(match.group(1) or types.size(match.group(2)))
        offset = (offset + align - 1) // align * align
        params[name.group(1)] = Param(name.group(1), match.group(2), item_size, offset)
        offset += item_size
    return params


def _module_variables(text: str) -> list[Variable]:
    variables = []
    for statement in text.split(";"):
        statement = statement.strip()
        if re.match(r"(?:\.\w+\s+)*\.(shared|global|const)\b", statement):
            variables.append(_variable(statement, 0))
    return variables


def _variable(statement: str, line: int) -> Variable:
    match = _DECLARATION.match(statement)
    if not match:
        raise PtxError(f"declaration: {statement[:100]}")
    space, align, ptx_type, name, array, count, init = match.groups()
    number = int(count) if count else None if array else 1
    if number is None and init:
        number = len(split_operands(init.strip("{} \n")))
    width = int(align or types.size(ptx_type))
    return Variable(space, name, ptx_type, width, number, init or "", line)


def _parse_body(entry: Entry, text: str) -> None:
    statements = _resolve_scopes(_statements(entry, text))
    for line, statement in statements:
        if statement.endswith(":"):
            entry.body.append(Label(line, statement[:-1]))
        elif statement.startswith(".reg"):
            _parse_registers(entry, statement)
        elif re.match(r"\.(shared|local)\b", statement):
            entry.variables.append(_variable(statement, line))
        elif statement.startswith(".pragma"):
            continue
        elif match := re.match(r"([\w$]+)\s*:\s*\.branchtargets\s+(.*)", statement, re.S):
            entry.branch_targets[match.group(1)] = split_operands(match.group(2))
        else:
            entry.body.append(_instruction(line, statement))


def _instruction(line: int, statement: str) -> Instruction:
    match = _INSTRUCTION.match(statement)
    if not match:
        return Instruction(line, statement.split()[0], [])
    negated, guard, opcode, args = match.groups()
    return Instruction(line, opcode, split_operands(args), guard, bool(negated))


def _parse_registers(entry: Entry, statement: str) -> None:
    match = re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.S)
    if not match:
        raise PtxError(f"register declaration: {statement[:100]}")
    ptx_type, names = match.groups()
    for name in split_operands(names):
        many = re.fullmatch(r"(%?[\w$]+)<(\d+)>", name)
        expanded = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]
        entry.registers.update((register, ptx_type) for register in expanded)


def _statements(entry: Entry, text: str) -> list[tuple[int, str]]:
    """Splits a body at ';', labels and scope braces; collects .loc lines on the way."""
    out: list[tuple[int, str]] = []
    current, start = "", entry.line
    for line, content in enumerate(text.split("\n"), entry.line):
        content = content.strip()
        if match := re.match(r"\.loc\s+(\d+)\s+(\d+)\s+\d+", content):
            # An inlined function's .loc carries its call site: that is the kernel's own line.
            site = re.search(r"inlined_at\s+(\d+)\s+(\d+)", content) or match
            if int(site.group(2)):
                entry.locations.append((line, int(site.group(1)), int(site.group(2))))
            continue
        for at, char in enumerate(content + " "):
            if not current.strip():
                start = line
                if char in "{}":
                    out.append((line, char))
                    continue
            is_label = char == ":" and _IDENTIFIER.fullmatch(current.strip())
            if is_label and not re.match(r":|\s*\.branchtargets", content[at + 1 :]):
                out.append((start, current.strip() + ":"))
                current = ""
            elif char == ";":
                if current.strip():
                    out.append((start, current.strip()))
                current = ""
            else:
                current += char
    if current.strip():
        raise PtxError(f"statement without ';': {current.strip()[:100]}")
    return out


def _resolve_scopes(statements: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """Renames what is declared inside { } so that the whole kernel has one flat name space."""
    parent: dict[int, int | None] = {0: None}
    declared: dict[int, set[str]] = {0: set()}
    scope, scoped = 0, []
    for line, statement in statements:
        if statement == "{":
            parent[len(parent)] = scope
            scope = len(parent) - 1
            declared[scope] = set()
        elif statement == "}":
            scope = parent[scope] or 0
        else:
            scoped.append((line, statement, scope))
            if statement.endswith(":"):
                declared[scope].add(statement[:-1])
            elif scope and (match := re.match(r"\.reg\s+\.\w+\s+(.*)", statement, re.S)):
                names = split_operands(match.group(1))
                if any("<" in name for name in names):
                    raise PtxError(f"register range inside a scope: {statement[:100]}")
                declared[scope].update(names)

    def rename(statement: str, scope: int) -> str:
        def replace(match: re.Match) -> str:
            inner: int | None = scope
            while inner:
                if match.group() in declared[inner]:
                    return f"{match.group()}__scope{inner}"
                inner = parent[inner]
            return match.group()

        return re.sub(r"%?[A-Za-z_$][\w$]*", replace, statement) if scope else statement

    return [(line, rename(statement, scope)) for line, statement, scope in scoped]
