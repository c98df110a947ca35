"""Names of exit reasons, as the running kernel's own tracepoints give them.

The print format of a tracepoint (``events/kvm/kvm_exit/format`` in tracefs) holds a table for each instruction set
(VMX, SVM) that KVM runs on. A table that is copied from a header goes stale: exit 7 of VMX was PENDING_INTERRUPT until
Linux commit 9dadc2f918df ("KVM: VMX: Rename INTERRUPT_PENDING to INTERRUPT_WINDOW") (in v5.6).
"""

from __future__ import annotations

import ast
import errno
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum

#: The tracepoints whose formats name exit reasons: exits from the guest to the kernel, and on to user space.
GUEST_EXIT, USER_EXIT = "kvm_exit", "kvm_userspace_exit"
EVENTS = (GUEST_EXIT, USER_EXIT)
#: A reason that could not be read: no kernel uses this number, and no table names it.
UNREADABLE = 0xFFFF_FFF0


class Kind(IntEnum):
    """Which way a vCPU left."""

    GUEST = 1  # from the guest to the kernel: kvm_exit until kvm_entry
    USER = 2  # from the kernel to user space: kvm_userspace_exit until the next KVM_RUN


# One table: the instruction set that it is for, if it depends on it, and what masks the value.
_TABLE = re.compile(r"(?:REC->isa == (\d+)\)? \? )?__print_(symbolic|flags)\(\s*REC->\w+(?:\s*&\s*(~?\w+))?,")
# One entry: { VALUE, "NAME" }; the value is an expression, the name may be pieces that C joins.
_ENTRY = re.compile(r'\s*(?:"[^"]*"\s*,\s*)?\{\s*([^"{}]+?)\s*,\s*((?:"[^"]*"\s*)+)\}\s*,?')
_MASK = 0xFFFF_FFFF

_OPERATORS: Mapping[type[ast.AST], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.BitOr: operator.or_,
    ast.LShift: operator.lshift,
}


def _number(text: str) -> int | None:
    # What the kernel could not resolve (the name of an enumerator) has no number here.
    def value(node: ast.AST) -> int:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Invert)):
            operand = value(node.operand)
            return -operand if isinstance(node.op, ast.USub) else ~operand
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](value(node.left), value(node.right))
        raise ValueError(text)

    try:
        return value(ast.parse(re.sub(r"\b(0x[0-9a-fA-F]+|\d+)[uUlL]+\b", r"\1", text), mode="eval").body) & _MASK
    except (ValueError, SyntaxError):
        return None


@dataclass(frozen=True)
class Table:
    """What one table of a print format says; ``mask`` is what it looks at of a value."""

    names: Mapping[int, str]
    mask: int = _MASK


@dataclass(frozen=True)
class Names:
    """Names of a field's values by instruction set; None is the table for every other one."""

    tables: Mapping[int | None, Table] = field(default_factory=dict)
    flags: Mapping[int | None, Table] = field(default_factory=dict)

    def name(self, value: int, isa: int | None = None) -> str:
        """Return the kernel's name of a value; one that it does not name is a number, as the kernel prints it.

        >>> parse('__print_symbolic(REC->reason, { 2, "KVM_EXIT_" "IO" })').name(2)
        'KVM_EXIT_IO'
        """
        value &= _MASK
        if value == UNREADABLE:
            return "?"
        table = self.tables.get(isa) or self.tables.get(None) or Table({})
        known = table.names.get(value & table.mask, f"{value & table.mask:#x}")
        flags = self.flags.get(isa)
        if flags is None:
            return known
        return " ".join([known, *(name for bit, name in flags.names.items() if value & flags.mask & bit)])


def parse(print_format: str) -> Names:
    """Return the names in a tracepoint's print format, or in the whole of its ``format`` file."""
    found: dict[str, dict[int | None, Table]] = {"symbolic": {}, "flags": {}}
    for table in _TABLE.finditer(print_format):
        isa = int(table[1]) if table[1] else None
        mask = _number(table[3]) if table[3] else _MASK
        names: dict[int, str] = {}
        place = table.end()
        while entry := _ENTRY.match(print_format, place):
            value = _number(entry[1])
            if value is not None:
                names.setdefault(value, "".join(re.findall(r'"([^"]*)"', entry[2])))
            place = entry.end()
        found[table[2]].setdefault(isa, Table(names, _MASK if mask is None else mask))
    return Names(found["symbolic"], found["flags"])


def reason(names: Mapping[str, Names], kind: Kind, number: int, variant: int) -> str:
    """Return what to call an exit, given the names of :data:`EVENTS`.

    ``variant`` is the instruction set, or the error that KVM_RUN returned instead of a reason.

    >>> reason({USER_EXIT: parse('__print_symbolic(REC->reason, { 2, "KVM_EXIT_IO" })')}, Kind.USER, 2, -4)
    'EINTR'
    """
    if kind is Kind.GUEST:
        return names[GUEST_EXIT].name(number, variant)
    return names[USER_EXIT].name(number) if variant >= 0 else errno.errorcode.get(-variant, f"errno {-variant}")
