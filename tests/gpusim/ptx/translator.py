"""Translates one PTX kernel to one C++ translation unit: a statement per instruction."""

from __future__ import annotations

import re

# Importing the families fills the registry of instruction forms.
from . import (  # noqa: F401
    arithmetic,
    asynchronous,
    bitwise,
    compare,
    control,
    convert,
    memory,
    packed,
    tensor,
    types,
    warp,
)
from .emitter import Emitter, UnsupportedOperand
from .forms import REGISTRY
from .parser import Entry, Instruction, Label, Module


class UnsupportedInstruction(Exception):
    """The kernel uses something outside the whitelist; the message lists every such thing."""


def translate(module: Module, entry: Entry) -> str:
    """C++ source of a kernel; raises UnsupportedInstruction."""
    emitter = Emitter(module, entry)
    statements, unsupported, seen = [], [], {}
    _reject_clusters(entry, unsupported)
    for item in entry.body:
        if isinstance(item, Label):
            seen[item.name] = item.line
            statements.append(f"L_{emitter.identifier(item.name)}:;")
            continue
        try:
            statements.append(_statement(emitter, item, seen))
        except UnsupportedOperand as error:
            unsupported.append(f"{item.opcode}: {error} (PTX line {item.line})")
    if unsupported:
        listing = "; ".join(dict.fromkeys(unsupported))
        raise UnsupportedInstruction(f"unsupported instruction: {listing} in kernel {entry.name}")
    return _source(emitter, statements)


def _reject_clusters(entry: Entry, unsupported: list[str]) -> None:
    match = re.search(r"\.reqnctapercluster\s+([\d, ]+)", entry.directives)
    if match and any(int(n) != 1 for n in match.group(1).split(",")):
        unsupported.append(f"thread block clusters (.reqnctapercluster {match.group(1).strip()})")


def _statement(emitter: Emitter, instruction: Instruction, seen: dict[str, int]) -> str:
    form = REGISTRY.find(instruction.opcode)
    if form is None:
        raise UnsupportedOperand("form not on the whitelist")
    code = form.handler(emitter, instruction)
    backward = instruction.opcode.startswith("bra") and instruction.args[0] in seen
    if backward:  # a loop: look at the clock now and then, so that it cannot hang the session
        code = f"{{ if (!(++ticks & 0xfffff)) sim::check_time({instruction.line}u); {code} }}"
    if instruction.guard:
        guard = "!" * instruction.negated + emitter.register(instruction.guard)
        return f"if ({guard}) {{ {code} }}"
    return code


def _declarations(entry: Entry, emitter: Emitter) -> list[str]:
    by_type: dict[str, list[str]] = {}
    for name, ptx_type in entry.registers.items():
        by_type.setdefault(types.storage(ptx_type), []).append(f"{emitter.register(name)} = 0")
    lines = [f"{ctype} {', '.join(names)};" for ctype, names in by_type.items()]
    for variable in emitter.locals.values():
        name = f"l_{emitter.identifier(variable.name)}"
        lines.append(f"alignas({max(variable.align, 16)}) char {name}[{variable.size}];")
        lines.append(f"sim::local_memory({name}, sizeof {name});")
    return lines


def _granule(entry: Entry, space: str) -> int:
    """Smallest access of the kernel in a space: the checker's shadow memory is that fine."""
    sizes = []
    for item in entry.body:
        if isinstance(item, Label) or item.opcode.split(".")[0] not in _ACCESSING:
            continue
        generic = not item.has("global", "shared", "local", "param", "const")
        names = {m.split("::")[0] for m in item.mods}
        if generic or space in names:
            try:
                sizes.append(types.size(item.type))
            except KeyError:
                sizes.append(2)
    return min([4, *sizes])


_ACCESSING = {"ld", "st", "atom", "red", "ldmatrix", "stmatrix", "wmma"}


def _source(emitter: Emitter, statements: list[str]) -> str:
    entry, module = emitter.entry, emitter.module
    body = "\n  ".join(_declarations(entry, emitter) + statements)
    variables = "".join(
        f"static const uint64_t g_{emitter.identifier(name)} = "
        f'sim_variable("{name}@{module.key}");\n'
        for name in emitter.globals
        if any(name in arg for item in entry.body for arg in getattr(item, "args", ()))
    )
    files = sorted(module.files)
    locations = [
        f"{{{line}, {files.index(file)}, {source_line}}}"
        for line, file, source_line in _changes(entry.locations)
        if file in module.files
    ]
    names = ", ".join(f'"{module.files[f]}"' for f in files) or '""'
    params = ", ".join(f"{{{p.offset}, {p.size}}}" for p in entry.params.values())
    return f"""#include "kernel.h"
using namespace ptx;
{variables}constexpr uint32_t DYNAMIC_SHARED = {emitter.dynamic_offset};
static void body() {{
  uint32_t carry = 0, ticks = 0;
  (void)carry, (void)ticks;
  {body}
}}
static const sim::Param params[] = {{{params or "{0, 0}"}}};
static const sim::Location locations[] = {{{", ".join(locations) or "{0, 0, 0}"}}};
static const char* const files[] = {{{names}}};
extern "C" const sim::Kernel gpusim_kernel = {{
    "{entry.name}", body, {emitter.dynamic_offset if emitter.dynamic else emitter.static_shared},
    {entry.param_bytes}, {len(entry.params)}, params, {len(locations)}, locations, files,
    {entry.max_threads}, {_granule(entry, "global")}, {_granule(entry, "shared")}}};
"""


def _changes(locations: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    kept: list[tuple[int, int, int]] = []
    for location in locations:
        if not kept or kept[-1][1:] != location[1:]:
            kept.append(location)
    return kept
