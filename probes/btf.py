"""What the running kernel says of its own types: offsets and prototypes, from BTF through libbpf.

libbpf is the one that BCC brings along. Nothing here knows a kernel version: a field is there or it is not.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import struct
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

BTF_DIRECTORY = Path("/sys/kernel/btf")


# enum of BTF_KIND_* (uapi linux/btf.h), stable ABI.
_INT, _PTR, _ARRAY, _STRUCT, _UNION = 1, 2, 3, 4, 5
_TYPEDEF, _VOLATILE, _CONST, _RESTRICT, _FUNC, _FUNC_PROTO, _TYPE_TAG = 8, 9, 10, 11, 12, 13, 18
_ENUM, _FWD, _VAR, _DATASEC, _FLOAT, _DECL_TAG, _ENUM64 = 6, 7, 14, 15, 16, 17, 19
_TRANSPARENT = {_TYPEDEF, _VOLATILE, _CONST, _RESTRICT, _TYPE_TAG}


# What follows a struct btf_type (uapi linux/btf.h), in words of 4 bytes: once, and for each of its members.
_TAILS = {_INT: (1, 0), _ARRAY: (3, 0), _VAR: (1, 0), _DECL_TAG: (1, 0)}
_TAILS |= {_ENUM: (0, 2), _FUNC_PROTO: (0, 2)} | dict.fromkeys((_STRUCT, _UNION, _DATASEC, _ENUM64), (0, 3))
# A libbpf refuses all of a kernel's BTF for one kind that it does not know; each of these came later than those that
# have the same shape in memory, and nothing here looks at any of them.
_OLDER = {_FLOAT: _FWD, _DECL_TAG: _VAR, _TYPE_TAG: _CONST, _ENUM64: _STRUCT}
_MAGIC = 0xEB9F
_HEADER = struct.Struct("<HBBIIIII")  # struct btf_header: magic, version, flags, hdr_len, type_off, type_len, ...


def older(data: bytes) -> bytes:
    """Return BTF with kinds that every libbpf knows: an ENUM64, which came with libbpf 1.0, is a struct then."""
    magic, _, _, length, offset, size, _, _ = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        return data
    changed = bytearray(data)
    words = memoryview(changed)[length + offset : length + offset + size].cast("I")
    at = 0
    while at + 2 < len(words):
        info = words[at + 1]
        kind = info >> 24 & 0x1F
        if kind in _OLDER:
            words[at + 1] = info & ~(0x1F << 24) | _OLDER[kind] << 24
        once, each = _TAILS.get(kind, (0, 0))
        at += 3 + once + each * (info & 0xFFFF)
    return bytes(changed)


class MissingField(LookupError):
    """The kernel has no such type or field, or no BTF at all."""


class _Type(ctypes.Structure):
    # struct btf_type (uapi linux/btf.h); its members follow it in memory.
    _fields_ = (("name_off", ctypes.c_uint32), ("info", ctypes.c_uint32), ("size", ctypes.c_uint32))

    @property
    def kind(self) -> int:
        return int(self.info >> 24) & 0x1F

    @property
    def count(self) -> int:
        return int(self.info) & 0xFFFF

    @property
    def bitfields(self) -> bool:
        return bool(self.info >> 31)


class _Triple(ctypes.Structure):
    # struct btf_member (name, type, offset), and struct btf_param in its first two fields (uapi linux/btf.h).
    _fields_ = (("name_off", ctypes.c_uint32), ("type", ctypes.c_uint32), ("offset", ctypes.c_uint32))


class _Pair(ctypes.Structure):
    _fields_ = (("name_off", ctypes.c_uint32), ("type", ctypes.c_uint32))


class _Member(NamedTuple):
    name: str
    type: int
    offset: int  # bits


def _libbpf() -> ctypes.CDLL:
    name = ctypes.util.find_library("bpf") or "libbpf.so.1"
    try:
        library = ctypes.CDLL(name, use_errno=True)
    except OSError as error:
        raise MissingField(f"libbpf cannot be loaded: {error}") from error
    library.btf__parse.restype = ctypes.c_void_p
    library.btf__parse.argtypes = (ctypes.c_char_p, ctypes.c_void_p)
    library.btf__parse_split.restype = ctypes.c_void_p
    library.btf__parse_split.argtypes = (ctypes.c_char_p, ctypes.c_void_p)
    library.libbpf_get_error.restype = ctypes.c_long
    library.libbpf_get_error.argtypes = (ctypes.c_void_p,)
    library.btf__find_by_name_kind.restype = ctypes.c_int32
    library.btf__find_by_name_kind.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint32)
    library.btf__type_by_id.restype = ctypes.POINTER(_Type)
    library.btf__type_by_id.argtypes = (ctypes.c_void_p, ctypes.c_uint32)
    library.btf__name_by_offset.restype = ctypes.c_char_p
    library.btf__name_by_offset.argtypes = (ctypes.c_void_p, ctypes.c_uint32)
    library.btf__free.argtypes = (ctypes.c_void_p,)
    return library


class Btf:
    """The types of the kernel, and of one of its modules if there is one.

    ``Btf("kvm")`` reads ``vmlinux`` and, where kvm is a module that has BTF, the module's types on top of it: then both
    are found by name.
    """

    def __init__(self, module: str | None = None, directory: Path = BTF_DIRECTORY) -> None:
        self._lib = _libbpf()
        self._base = self._parse(directory / "vmlinux", None)
        path = directory / module if module else None
        #: Whether the module has BTF of its own (built-in code is part of vmlinux).
        self.has_module = path is not None and path.exists()
        self._top = self._parse(path, self._base) if path and self.has_module else self._base

    def _parse(self, path: Path, base: int | None) -> int:
        if not path.exists():
            raise MissingField(f"{path} is missing: this kernel was built without BTF (CONFIG_DEBUG_INFO_BTF)")
        handle = self._read(path, base)
        if handle is None:
            with os.fdopen(os.memfd_create("btf"), "w+b", buffering=0) as copy:
                copy.write(older(path.read_bytes()))
                handle = self._read(Path(f"/proc/self/fd/{copy.fileno()}"), base)
        if handle is None:
            raise MissingField(f"{path} cannot be read as BTF")
        return handle

    def _read(self, path: Path, base: int | None) -> int | None:
        raw = str(path).encode()
        handle = self._lib.btf__parse_split(raw, base) if base else self._lib.btf__parse(raw, None)
        return None if not handle or self._lib.libbpf_get_error(handle) else int(handle)

    def close(self) -> None:
        """Free what libbpf holds: tens of megabytes."""
        if self._top != self._base:
            self._lib.btf__free(self._top)
        self._lib.btf__free(self._base)
        self._top = self._base = 0

    def __enter__(self) -> Btf:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def offset(self, path: str) -> int:
        """Return the offset in bytes of a field, such as ``kvm_vcpu.arch.cr0``.

        Raises :class:`MissingField` when the kernel has no such type or field.
        """
        return self._locate(path)[0]

    def offsets(self, fields: Iterable[tuple[str, str, bool]]) -> dict[str, int]:
        """Return the offsets of fields by names of one's own; each is (name, field, whether it may be missing).

        Raises :class:`MissingField` for one that may not.
        """
        found = {}
        for name, path, optional in fields:
            try:
                found[name] = self.offset(path)
            except MissingField:
                if not optional:
                    raise
        return found

    def size(self, path: str) -> int:
        """Return the size in bytes of a type, or of a field such as ``kvm_vcpu.requests``."""
        return self._size(self._locate(path)[1])

    def has(self, path: str) -> bool:
        """Tell whether the kernel has such a field."""
        try:
            self._locate(path)
        except MissingField:
            return False
        return True

    def function(self, name: str) -> int:
        """Return the number that the kernel's BTF gives to a function.

        Raises :class:`MissingField` when it has none of that name.
        """
        return self._find(name, _FUNC)

    def arguments(self, tracepoint: str) -> tuple[str, ...]:
        """Return the names of the types of a raw tracepoint's arguments: ``("kvm_vcpu *", "bool")``.

        A tracepoint's prototype is ``typedef void (*btf_trace_NAME)(void *, ...)``; the leading ``void *`` is left out.
        Linux commit 441420a1f0b3 ("bpf: Reliably preserve btf_trace_xxx types") (in v5.7).
        """
        pointer = self._find(f"btf_trace_{tracepoint}", _TYPEDEF)
        prototype = self._type(self._type(self._type(pointer).size).size)
        if prototype.kind != _FUNC_PROTO:
            raise MissingField(f"btf_trace_{tracepoint} is no pointer to a function")
        return self._parameters(prototype)[1:]

    def parameters(self, function: str) -> tuple[str, ...]:
        """Return the names of the types of a function's arguments.

        Raises :class:`MissingField` when the kernel's BTF has no such function.
        """
        return self._parameters(self._type(self._type(self.function(function)).size))

    def _parameters(self, prototype: _Type) -> tuple[str, ...]:
        first = ctypes.addressof(prototype) + ctypes.sizeof(_Type)
        pairs = (_Pair * prototype.count).from_address(first)
        return tuple(self._spelled(pair.type) for pair in pairs)

    def _spelled(self, number: int) -> str:
        if number == 0:
            return "void"
        btf_type = self._type(number)
        if btf_type.kind == _PTR:
            return f"{self._spelled(btf_type.size)} *"
        if btf_type.kind in _TRANSPARENT - {_TYPEDEF}:
            return self._spelled(btf_type.size)
        return self._name(btf_type.name_off)

    def _find(self, name: str, *kinds: int) -> int:
        for kind in kinds:
            number = self._lib.btf__find_by_name_kind(self._top, name.encode(), kind)
            if number >= 0:
                return int(number)
        raise MissingField(f"the kernel's BTF has no {name}")

    def _type(self, number: int) -> _Type:
        pointer = self._lib.btf__type_by_id(self._top, number)
        if not pointer:
            raise MissingField(f"the kernel's BTF has no type {number}")
        contents: _Type = pointer.contents
        return contents

    def _name(self, offset: int) -> str:
        name: bytes = self._lib.btf__name_by_offset(self._top, offset)
        return name.decode()

    def _members(self, number: int) -> Iterator[_Member]:
        btf_type = self._type(number)
        first = ctypes.addressof(btf_type) + ctypes.sizeof(_Type)
        mask = 0xFFFFFF if btf_type.bitfields else 0xFFFFFFFF
        for member in (_Triple * btf_type.count).from_address(first):
            yield _Member(self._name(member.name_off), member.type, member.offset & mask)

    def _resolved(self, number: int) -> int:
        while number and self._type(number).kind in _TRANSPARENT:
            number = self._type(number).size
        return number

    def _size(self, number: int) -> int:
        number = self._resolved(number)
        btf_type = self._type(number)
        if btf_type.kind == _PTR:
            return ctypes.sizeof(ctypes.c_void_p)
        if btf_type.kind == _ARRAY:
            # struct btf_array (uapi linux/btf.h): type, index_type, nelems.
            array = _Triple.from_address(ctypes.addressof(btf_type) + ctypes.sizeof(_Type))
            return self._size(array.name_off) * int(array.offset)
        return int(btf_type.size)

    def _locate(self, path: str) -> tuple[int, int]:
        if path in self._located:
            return self._located[path]
        parent, _, name = path.rpartition(".")
        if not parent:
            place = 0, self._find(name, _STRUCT, _UNION)
        else:
            offset, number = self._locate(parent)
            found = self._member(self._resolved(number), name)
            if found is None:
                raise MissingField(f"the kernel's struct {parent} has no field {name}")
            place = offset + found.offset // 8, found.type
        self._located[path] = place
        return place

    @cached_property
    def _located(self) -> dict[str, tuple[int, int]]:
        return {}

    def _member(self, number: int, name: str) -> _Member | None:
        if self._type(number).kind not in (_STRUCT, _UNION):
            return None
        nested = []
        for member in self._members(number):
            if member.name == name:
                return member
            if not member.name:
                nested.append(member)
        for anonymous in nested:
            found = self._member(self._resolved(anonymous.type), name)
            if found is not None:
                return found._replace(offset=anonymous.offset + found.offset)
        return None
