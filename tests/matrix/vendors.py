"""Which functions of KVM's vendor modules a kernel package has, by its files: what QEMU cannot run, such as VMX.

A function can be hooked by kprobe if the module's symbol table has it, and by fentry if the module's BTF names it too.
"""

from __future__ import annotations

import lzma
import struct
from collections.abc import Mapping
from pathlib import Path

from probes.plan import KPROBE, Hook
from tests.matrix import MatrixError
from tests.matrix.kernels import Kernel

BOTH, SYMBOL_ONLY, ABSENT = "symbol and BTF", "symbol", "-"

# Elf64_Ehdr, Elf64_Shdr, Elf64_Sym (elf.h), as far as they are read.
_SHT_SYMTAB = 2
_STT_FUNC = 2


def of_vendor(module: str) -> list[Hook]:
    """Return the hooks of the plan that only this module's flavour of KVM has."""
    return [hook for hook in KPROBE if hook.vendor == module]


def functions(kernel: Kernel, module: str) -> dict[str, str]:
    """Return of each function that the plan hooks in a vendor module what its package has of it."""
    image = _image(kernel, module)
    sections = _sections(image)
    symbols = _symbols(image, sections)
    # Names stand in BTF's string table between NUL bytes.
    types = image[slice(*sections[".BTF"][0])] if ".BTF" in sections else b""
    found = {}
    for hook in of_vendor(module):
        name = hook.target.encode()
        in_types = b"\0" + name + b"\0" in types
        found[hook.target] = (BOTH if in_types else SYMBOL_ONLY) if name in symbols else ABSENT
    return found


def _image(kernel: Kernel, module: str) -> bytes:
    folder = kernel.modules / "kernel/arch/x86/kvm"
    name = module.replace("_", "-")
    for suffix, read in ((".ko", bytes), (".ko.xz", lzma.decompress)):
        path: Path = folder / f"{name}{suffix}"
        if path.exists():
            return read(path.read_bytes())
    raise MatrixError(f"{kernel.release} has no {name}.ko that can be read in {folder}")


Section = tuple[tuple[int, int], int, int]  # where it is (begin, end), its type, its link


def _sections(image: bytes) -> Mapping[str, Section]:
    if image[:5] != b"\x7fELF\x02":
        raise MatrixError("a kernel module is no 64-bit ELF file")
    table, size, number, names = struct.unpack_from("<Q", image, 40)[0], *struct.unpack_from("<HHH", image, 58)
    raw = [struct.unpack_from("<IIQQQQII", image, table + size * index) for index in range(number)]
    strings = raw[names][4]
    return {
        _string(image, strings + name): ((offset, offset + length), kind, link)
        for name, kind, _flags, _address, offset, length, link, _info in raw
    }


def _string(image: bytes, at: int) -> str:
    return image[at : image.index(b"\0", at)].decode()


def _symbols(image: bytes, sections: Mapping[str, Section]) -> set[bytes]:
    begin, end = next(place for place, kind, _ in sections.values() if kind == _SHT_SYMTAB)
    strings = sections[".strtab"][0][0]
    found = set()
    for name, info in ((entry[0], entry[1]) for entry in struct.iter_unpack("<IBBHQQ", image[begin:end])):
        if info & 0xF == _STT_FUNC:
            at = strings + name
            found.add(image[at : image.index(b"\0", at)])
    return found
