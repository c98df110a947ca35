"""Whether programs can be called through trampolines (fentry, fexit) on this host: by asking for one.

A kernel may lack BTF for KVM, refuse the program type, or refuse to patch the function; BCC may be too old to look into
modules. Each says so here in its own words.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from probes.btf import BTF_DIRECTORY, Btf, MissingField
from tracer import host

FUNCTION = "kvm_vcpu_ioctl"  # what every plan needs

# enum bpf_cmd, bpf_prog_type and bpf_attach_type (uapi linux/bpf.h), stable ABI.
_PROG_LOAD, _RAW_TRACEPOINT_OPEN, _BTF_GET_FD_BY_ID, _BTF_GET_NEXT_ID = 5, 17, 19, 23
_TYPE_TRACING, _TRACE_FENTRY = 26, 24
# r0 = 0; exit
_NOTHING = bytes.fromhex("b700000000000000 9500000000000000")


class _Load(ctypes.Structure):
    # union bpf_attr (uapi linux/bpf.h) of BPF_PROG_LOAD, as far as attach_btf_obj_fd.
    _fields_ = (
        ("prog_type", ctypes.c_uint32),
        ("insn_cnt", ctypes.c_uint32),
        ("insns", ctypes.c_uint64),
        ("license", ctypes.c_uint64),
        ("log", ctypes.c_uint32 * 4),
        ("kern_version", ctypes.c_uint32),
        ("prog_flags", ctypes.c_uint32),
        ("prog_name", ctypes.c_char * 16),
        ("prog_ifindex", ctypes.c_uint32),
        ("expected_attach_type", ctypes.c_uint32),
        ("prog_btf", ctypes.c_uint64 * 4),
        ("line_info_cnt", ctypes.c_uint32),
        ("attach_btf_id", ctypes.c_uint32),
        ("attach_btf_obj_fd", ctypes.c_uint32),
    )


class _Numbers(ctypes.Structure):
    # union bpf_attr of BPF_BTF_GET_NEXT_ID (start_id, next_id) and BPF_BTF_GET_FD_BY_ID (btf_id).
    _fields_ = (("one", ctypes.c_uint32), ("two", ctypes.c_uint32), ("flags", ctypes.c_uint32))


class _BtfInfo(ctypes.Structure):
    # struct bpf_btf_info (uapi linux/bpf.h).
    _fields_ = (
        ("btf", ctypes.c_uint64),
        ("btf_size", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("name", ctypes.c_uint64),
        ("name_len", ctypes.c_uint32),
        ("kernel_btf", ctypes.c_uint32),
    )


class _Open(ctypes.Structure):
    # union bpf_attr of BPF_RAW_TRACEPOINT_OPEN.
    _fields_ = (("name", ctypes.c_uint64), ("prog_fd", ctypes.c_uint32), ("unused", ctypes.c_uint32))


def no_module_btf(module: str) -> str | None:
    """Say why functions of a module cannot be found in BTF, if they cannot."""
    if module != "vmlinux" and not (BTF_DIRECTORY / module).exists():
        return f"the module {module} has no BTF (CONFIG_DEBUG_INFO_BTF_MODULES, which came with Linux 5.11)"
    return None


def bcc_too_old(module: str) -> str | None:
    """Say why BCC cannot reach functions of a module, if it cannot.

    The helpers that BCC compiles programs with are part of its library; those for modules came with BCC 0.28.
    """
    if module == "vmlinux":
        return None
    try:
        import bcc
    except ImportError:
        return "Python cannot import bcc: install the package python3-bpfcc"
    if not _knows_modules():
        return f"this BCC ({getattr(bcc, '__version__', 'of unknown version')}) reaches no modules: that came with 0.28"
    return None


def modules(functions: Iterable[str]) -> dict[str, str]:
    """Return the module of each of these functions, as BCC wants it in the name of a program.

    One that knows no modules takes the name of one, vmlinux too, for a part of the function's.
    """
    found = host.modules(functions)
    import bcc  # noqa: F401 - so that its library is there to be looked at

    return found if _knows_modules() else dict.fromkeys(found, "")


def _knows_modules() -> bool:
    library = _mapped("libbcc.so")
    return library is None or b"MODULE_KFUNC_PROBE" in library


def _mapped(name: str) -> bytes | None:
    # The library that this process uses, as the file that it was mapped from.
    maps = Path("/proc/self/maps").read_text().splitlines()
    path = next((line.split(maxsplit=5)[5] for line in maps if f"/{name}" in line), None)
    try:
        return Path(path).read_bytes() if path else None
    except OSError:
        return None


def no_fentry() -> str | None:
    """Say why no program can be called through a trampoline at KVM's functions, if none can.

    Loads a program that does nothing, puts it on :data:`FUNCTION` and takes it away again.
    """
    module = host.modules((FUNCTION,)).get(FUNCTION)
    if module is None:
        return f"this kernel has no function {FUNCTION}: is KVM loaded?"
    reason = no_module_btf(module) or bcc_too_old(module)
    if reason is not None:
        return reason
    try:
        with Btf(module if module != "vmlinux" else None) as btf:
            number = btf.function(FUNCTION)
    except MissingField as error:
        return str(error)
    with ExitStack() as stack:
        types = 0
        if module != "vmlinux":
            types = _module_btf(module)
            if types < 0:
                return f"the BTF of the module {module} cannot be opened: {os.strerror(-types)}"
            stack.callback(os.close, types)
        program = ctypes.create_string_buffer(_NOTHING, len(_NOTHING))
        licence = ctypes.create_string_buffer(b"GPL")
        load = _Load(
            prog_type=_TYPE_TRACING,
            insn_cnt=len(_NOTHING) // 8,
            insns=ctypes.addressof(program),
            license=ctypes.addressof(licence),
            expected_attach_type=_TRACE_FENTRY,
            attach_btf_id=number,
            attach_btf_obj_fd=types,
        )
        loaded = host.bpf_syscall(_PROG_LOAD, load)
        if loaded < 0:
            return f"the kernel refuses programs of type BPF_PROG_TYPE_TRACING: {os.strerror(-loaded)}"
        stack.callback(os.close, loaded)
        attached = host.bpf_syscall(_RAW_TRACEPOINT_OPEN, _Open(prog_fd=loaded))
        if attached < 0:
            return f"the kernel refuses a trampoline on {FUNCTION}: {os.strerror(-attached)}"
        os.close(attached)
    return None


def _module_btf(module: str) -> int:
    # A descriptor of a module's BTF, or the negative errno.
    position = _Numbers()
    name = ctypes.create_string_buffer(64)
    while (result := host.bpf_syscall(_BTF_GET_NEXT_ID, position)) >= 0:
        position.one = position.two
        found = host.bpf_syscall(_BTF_GET_FD_BY_ID, _Numbers(one=position.two))
        if found < 0:
            continue  # unloaded meanwhile
        info = _BtfInfo(name=ctypes.addressof(name), name_len=len(name))
        if host.bpf_info(found, info) and info.kernel_btf and name.value.decode(errors="replace") == module:
            return found
        os.close(found)
    return result
