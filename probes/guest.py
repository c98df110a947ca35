"""Entries and exits of the guest: which program reads a tracepoint of KVM on the running kernel, and the exit reason.

What a raw tracepoint hands over is the kernel's own, and changes with it: its prototype in BTF decides.
"""

from __future__ import annotations

from collections.abc import Sequence

from probes.btf import Btf, MissingField

_VCPU = "kvm_vcpu *"
# Programs of probes/programs/guest.c and full.c.
_EXIT_WITH_REASON, _EXIT, _ENTRY, _WAKEUP = "on_guest_exit_with_reason", "on_guest_exit", "on_guest_entry", "on_wakeup"
#: Raw tracepoints that are read by the order of their arguments.
TRACEPOINTS = ("kvm_entry", "kvm_exit", "kvm_vcpu_wakeup")


def programs(tracepoint: str, arguments: Sequence[str] | None) -> tuple[str, ...]:
    """Return the programs to try on one of :data:`TRACEPOINTS`, given the types of its arguments; None: no BTF tells.

    The kernel refuses a program that reads beyond a raw tracepoint's last argument, so that without BTF the one that
    reads three of kvm_exit is tried first. Linux commit c4f6699dfcb8 ("bpf: introduce BPF_RAW_TRACEPOINT") (in v4.17).
    """
    if arguments is None:
        return {"kvm_entry": (_ENTRY,), "kvm_exit": (_EXIT_WITH_REASON, _EXIT), "kvm_vcpu_wakeup": (_WAKEUP,)}[
            tracepoint
        ]
    given = tuple(arguments)
    if tracepoint == "kvm_entry":
        return (_ENTRY,) if given[:1] == (_VCPU,) else ()
    if tracepoint == "kvm_vcpu_wakeup":
        return (_WAKEUP,) if given[:2] == ("__u64", "bool") else ()
    if given[:1] == (_VCPU,) and len(given) > 1:
        return (_EXIT,)
    if given[1:2] == (_VCPU,) and len(given) > 2:
        return (_EXIT_WITH_REASON,)
    return ()


def arguments(btf: Btf, tracepoint: str) -> tuple[str, ...] | None:
    """Return the types of a tracepoint's arguments, or None where the kernel's BTF does not have them."""
    try:
        return btf.arguments(tracepoint)
    except MissingField:
        return None


def reason_offsets(btf: Btf) -> dict[str, int]:
    """Return where a vCPU holds the reason of its last exit, as far as the BTF of KVM's flavour tells.

    Linux commit 0a62a0319abb ("KVM: x86: Get exit_reason as part of kvm_x86_ops.get_exit_info") (in v5.16) took it
    out of the tracepoint's arguments.
    """
    found: dict[str, int] = {}
    # Linux commit 7172c753c26a ("KVM: VMX: Move common fields of struct vcpu_{vmx,tdx} to a struct") (in v6.16).
    for path in ("vcpu_vmx.exit_reason", "vcpu_vmx.vt.exit_reason"):
        if btf.has(path):
            found["OFFSET_VMX_REASON"] = btf.offset(path) - btf.offset("vcpu_vmx.vcpu")
    if btf.has("vcpu_svm.vmcb") and btf.has("vmcb.control.exit_code"):
        found["OFFSET_SVM_VMCB"] = btf.offset("vcpu_svm.vmcb") - btf.offset("vcpu_svm.vcpu")
        found["OFFSET_SVM_REASON"] = btf.offset("vmcb.control.exit_code")
    return found


def mask_arguments(btf: Btf) -> dict[str, int]:
    """Return how many arguments kvm_make_vcpus_request_mask has, where BTF tells: which one is the bitmap."""
    try:
        return {"MASK_ARGUMENTS": len(btf.parameters("kvm_make_vcpus_request_mask"))}
    except MissingField:
        return {}
