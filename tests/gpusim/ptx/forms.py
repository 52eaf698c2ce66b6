"""The whitelist: every instruction spelling the executor knows, in the manual's own grammar.

A pattern is literal text with ``[.a|.b]`` for an optional and ``(.a|.b)`` for a required
alternative; both nest. A handler is registered for a list of patterns and is called only for an
opcode that one of them matches in full, so a modifier that nobody thought about is an error that
names the instruction instead of a silent mistranslation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

# Shorthands usable in patterns as {name}.
ALIASES = {
    "u": "(.u16|.u32|.u64)",
    "s": "(.s16|.s32|.s64)",
    "int": "(.u16|.u32|.u64|.s16|.s32|.s64)",
    "int32": "(.u32|.s32)",
    "int_any": "(.u8|.u16|.u32|.u64|.s8|.s16|.s32|.s64)",
    "b": "(.b16|.b32|.b64)",
    "half": "(.f16|.bf16)",
    "half2": "(.f16x2|.bf16x2)",
    "round": "(.rn|.rz|.rm|.rp)",
    "int_round": "(.rni|.rzi|.rmi|.rpi)",
    "scope": "(.cta|.cluster|.gpu|.sys)",
    "compare": "(.eq|.ne|.lt|.le|.gt|.ge)",
    "compare_float": "(.eq|.ne|.lt|.le|.gt|.ge|.equ|.neu|.ltu|.leu|.gtu|.geu|.num|.nan)",
    "bool": "(.and|.or|.xor)",
}


@dataclass
class Form:
    """One whitelisted pattern and the function that translates what it matches."""

    pattern: str
    handler: Callable

    @cached_property
    def regex(self) -> re.Pattern:
        return re.compile(_to_regex(self.pattern))

    def spellings(self) -> Iterator[str]:
        """Every concrete opcode this pattern allows, for tests that walk the whitelist."""
        return _expand(self.pattern)


@dataclass
class Registry:
    """Forms by the first word of the opcode."""

    forms: dict[str, list[Form]] = field(default_factory=dict)

    def add(self, *patterns: str) -> Callable[[Callable], Callable]:
        """Decorator: translate the opcodes that `patterns` match with this function."""

        def register(handler: Callable) -> Callable:
            for pattern in patterns:
                pattern = pattern.format(**ALIASES)
                heads = re.match(r"\(([\w|]+)\)|(\w+)", pattern)
                new = Form(pattern, handler)
                for head in (heads.group(1) or heads.group(2)).split("|"):
                    self.forms.setdefault(head, []).append(new)
            return handler

        return register

    def find(self, opcode: str) -> Form | None:
        """The form that allows `opcode`, or None."""
        candidates = self.forms.get(opcode.split(".", 1)[0], ())
        return next((form for form in candidates if form.regex.fullmatch(opcode)), None)

    def __iter__(self) -> Iterator[Form]:
        """Every form once, although "(add|sub)..." is listed under both words."""
        return iter({id(form): form for forms in self.forms.values() for form in forms}.values())


REGISTRY = Registry()
form = REGISTRY.add


def _to_regex(pattern: str) -> str:
    out = []
    for char in pattern:
        out.append(
            {"[": "(?:", "]": ")?", "(": "(?:", ")": ")", "|": "|"}.get(char, re.escape(char))
        )
    return "".join(out)


def _expand(pattern: str) -> Iterator[str]:
    parts = _sequence(pattern, 0)[0]
    return ("".join(choice) for choice in product(*parts))


def _sequence(pattern: str, at: int) -> tuple[list[list[str]], int]:
    """Parses up to a closing bracket or '|'; returns the choices of each part and the position."""
    parts: list[list[str]] = []
    while at < len(pattern) and pattern[at] not in ")]|":
        if pattern[at] in "([":
            optional = pattern[at] == "["
            choices = [""] if optional else []
            while pattern[at] in "([|":
                inner, at = _sequence(pattern, at + 1)
                choices += ["".join(choice) for choice in product(*inner)]
            at += 1
            parts.append(choices)
        else:
            end = at
            while end < len(pattern) and pattern[end] not in "()[]|":
                end += 1
            parts.append([pattern[at:end]])
            at = end
    return parts, at
