"""Turns PTX operands into C++ expressions.

A PTX register is a C++ variable that holds bits (uint32_t, uint64_t, ...). An instruction reads an
operand either raw, as those bits, or as a value of the instruction's type, and writes bits back.
"""

from __future__ import annotations

import re

from . import types
from .parser import Entry, Instruction, Module, Variable, split_operands


class UnsupportedOperand(Exception):
    """An operand form that the executor does not model; the message names it."""


_THREAD_REGISTERS = {"tid": "thread", "ntid": "block_dim", "ctaid": "block", "nctaid": "grid"}
_SPECIAL_REGISTERS = {
    "%laneid": "sim::lane()",
    "%warpid": "(sim::thread_number() / 32)",
    "%nwarpid": "sim::warp_count()",
    "%lanemask_eq": "(1u << sim::lane())",
    "%lanemask_lt": "((1u << sim::lane()) - 1)",
    "%lanemask_le": "((2u << sim::lane()) - 1)",
    "%lanemask_gt": "~((2u << sim::lane()) - 1)",
    "%lanemask_ge": "~((1u << sim::lane()) - 1)",
    "%dynamic_smem_size": "sim::dynamic_shared_bytes()",
    "%total_smem_size": "sim::total_shared_bytes()",
    "%smid": "0u",
    "%gridid": "0u",
    # A clock that moves, so that code which waits for time to pass ends.
    "%clock": "(uint32_t)sim::clock()",
    "%clock64": "sim::clock()",
    "%globaltimer": "sim::clock()",
    "WARP_SZ": "32u",
    # Without clusters every block is a cluster of its own.
    "%cluster_ctarank": "0u",
    "%cluster_nctarank": "1u",
    "%is_explicit_cluster": "false",
}
_CLUSTER_VECTORS = {"cluster_ctaid": "0u", "cluster_nctaid": "1u"}


class Emitter:
    """Operand access for the instruction handlers of one kernel."""

    def __init__(self, module: Module, entry: Entry):
        self.module = module
        self.entry = entry
        self.shared: dict[str, int] = {}
        self.static_shared = 0
        self.dynamic: dict[str, Variable] = {}  # all names of the one dynamic block
        self.globals = {v.name: v for v in module.variables if v.space in ("global", "const")}
        self.locals = {v.name: v for v in entry.variables if v.space == "local"}
        for variable in [*module.variables, *entry.variables]:
            if variable.space == "shared":
                self._place_shared(variable)

    def _place_shared(self, variable: Variable) -> None:
        if variable.count is None:
            self.dynamic[variable.name] = variable
            return
        start = -(-self.static_shared // variable.align) * variable.align
        self.shared[variable.name] = start
        self.static_shared = start + variable.size

    @property
    def dynamic_offset(self) -> int:
        """Where dynamic shared memory starts: after the static variables, aligned as declared."""
        align = max([16, *(variable.align for variable in self.dynamic.values())])
        return -(-self.static_shared // align) * align

    @staticmethod
    def identifier(name: str) -> str:
        return re.sub(r"\W", "_", name)

    def register(self, name: str) -> str:
        """The C++ variable of a declared register."""
        if name not in self.entry.registers:
            raise UnsupportedOperand(f"operand {name}")
        return "v_" + self.identifier(name)

    def is_predicate(self, operand: str) -> bool:
        return self.entry.registers.get(operand.lstrip("!")) == "pred"

    def raw(self, operand: str) -> str:
        """An operand as bits: register, immediate, special register or address of a variable."""
        operand = operand.strip()
        if operand in self.entry.registers:
            return self.register(operand)
        if operand.startswith("!"):
            return "!" + self.raw(operand[1:])
        if operand in _SPECIAL_REGISTERS:
            return _SPECIAL_REGISTERS[operand]
        if match := re.fullmatch(r"%(\w+)\.([xyz])", operand):
            return self._vector_register(operand, *match.groups())
        if match := re.fullmatch(r"([\w$]+)\s*\+\s*(\d+)", operand):
            return f"({self.raw(match.group(1))} + {match.group(2)})"
        immediate = self._immediate(operand)
        return immediate if immediate is not None else self._symbol(operand)

    def _vector_register(self, operand: str, name: str, axis: str) -> str:
        if name in _THREAD_REGISTERS:
            return f"sim::context->{_THREAD_REGISTERS[name]}.{axis}"
        if name in ("clusterid", "nclusterid"):
            return f"sim::context->{'block' if name == 'clusterid' else 'grid'}.{axis}"
        if name in _CLUSTER_VECTORS:
            return _CLUSTER_VECTORS[name]
        raise UnsupportedOperand(f"operand {operand}")

    @staticmethod
    def _immediate(operand: str) -> str | None:
        if operand in ("true", "false"):
            return operand
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", operand):
            return f"0x{operand[2:]}u"
        if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", operand):
            return f"0x{operand[2:]}ull"
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", operand):
            number = int(operand.rstrip("U"), 0 if "x" in operand.lower() else 10)
            return (
                f"{number % 2**64}ull" if number >= 2**63 or number == -(2**63) else f"({number}ll)"
            )
        return None

    def _symbol(self, name: str) -> str:
        if name in self.shared:
            return f"{self.shared[name]}u"
        if name in self.dynamic:
            return "DYNAMIC_SHARED"
        if name in self.globals:
            return f"g_{self.identifier(name)}"
        if name in self.locals:
            return f"(uint64_t)l_{self.identifier(name)}"
        if name in self.entry.params:
            return f"{self.entry.params[name].offset}ull"
        raise UnsupportedOperand(f"operand {name}")

    def value(self, operand: str, ptx_type: str) -> str:
        """An operand as a value of the instruction's type."""
        raw = self.raw(operand)
        if ptx_type == "pred":
            return raw
        if types.is_float(ptx_type):
            return f"from_bits<{types.value(ptx_type)}>(({types.storage(ptx_type)}){raw})"
        return f"({types.value(ptx_type)}){raw}"

    def values(self, operands: list[str], ptx_type: str) -> str:
        """Operands as a C++ argument list."""
        return ", ".join(self.value(operand, ptx_type) for operand in operands)

    def raws(self, operands: list[str]) -> str:
        return ", ".join(self.raw(operand) for operand in operands)

    def assign(self, dest: str, ptx_type: str, expression: str) -> str:
        """Writes a value of `ptx_type` to a register, or nowhere for the sink operand "_"."""
        if dest == "_":
            return f"(void)({expression});"
        if types.is_float(ptx_type):
            expression = f"to_bits(({types.value(ptx_type)})({expression}))"
        return f"{self.register(dest)} = {expression};"

    @staticmethod
    def vector(operand: str) -> list[str]:
        """The registers of "{a, b}", or of a lone register."""
        operand = operand.strip()
        return split_operands(operand[1:-1]) if operand.startswith("{") else [operand]

    def address(self, operand: str) -> str:
        """The address in "[base+offset]", in the numbering of its own state space."""
        match = re.fullmatch(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand.strip())
        if not match:
            raise UnsupportedOperand(f"address {operand}")
        base, offset = match.groups()
        raw = self.raw(base)
        return f"(uint64_t){raw} + ({int(offset, 0)}ll)" if offset else f"(uint64_t){raw}"

    def shared_address(self, operand: str) -> str:
        return f"(uint32_t)({self.address(operand)})"

    def array(self, ctype: str, name: str, operands: list[str]) -> str:
        """Declares a C++ array with the bits of `operands`."""
        items = ", ".join(f"({ctype}){self.raw(operand)}" for operand in operands)
        return f"{ctype} {name}[] = {{{items}}};"

    def scatter(self, name: str, registers: list[str]) -> str:
        """Assigns array elements to registers."""
        return " ".join(
            f"{self.register(register)} = {name}[{i}];"
            for i, register in enumerate(registers)
            if register != "_"
        )


def line_of(instruction: Instruction) -> str:
    """The PTX line as a C++ argument, which findings report."""
    return f"{instruction.line}u"
