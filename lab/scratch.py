"""A VM that is there to be seen: it is made, shuts down once, and is gone within milliseconds.

It has no memory and never runs an instruction: KVM services its request, which is to shut down, before it enters the
guest (vcpu_enter_guest() in arch/x86/kvm/x86.c). So any thread may play it, and nothing has to be ended by force.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from lab.kvm import Exit, Ioctl, Kvm, KvmX86Mce, LabError, Vcpu

#: The vcpu_id of the scratch vCPU. KVM takes up to 1,023 of them on every kernel, and a VMM counts them from 0.
UNUSUAL_ID = 997

# IA32_MCi_STATUS: VAL, UC, EN, S and AR; IA32_MCG_STATUS: RIPV and MCIP (Intel SDM volume 3, "Machine-Check
# Architecture").
MCE_BANK = 9
_UNCORRECTED = 1 << 63 | 1 << 61 | 1 << 60 | 1 << 56 | 1 << 55
_IN_PROGRESS = 1 << 2 | 1 << 0
#: Three pages that no guest here uses, for Intel hosts.
TSS_GPA = 0xFFFB_D000


def raise_by_mce(vcpu: Vcpu) -> None:
    """Raise a triple fault: an uncorrected machine check shuts down a guest whose CR4.MCE is 0.

    kvm_vcpu_ioctl_x86_set_mce() in arch/x86/kvm/x86.c does so on every kernel since 5.10 at the latest.
    """
    vcpu.setup_mce(MCE_BANK + 1)
    vcpu.set_mce(KvmX86Mce(status=_UNCORRECTED, mcg_status=_IN_PROGRESS, bank=MCE_BANK))


@contextlib.contextmanager
def vcpu() -> Iterator[Vcpu]:
    """Make a VM without memory, and yield its vCPU. On leaving, both are gone."""
    with Kvm(kicks=False) as kvm, kvm.create_vm() as vm:
        vm.set_tss_addr(TSS_GPA)
        with vm.create_vcpu(UNUSUAL_ID) as one:
            yield one


def life() -> None:
    """Make a VM, have it shut down (raise a triple fault, and let KVM deliver it), and take it away."""
    with vcpu() as one:
        raise_by_mce(one)
        one.ioctl(Ioctl.KVM_RUN)
        reason = one.kvm_run.exit_reason
        if reason != Exit.KVM_EXIT_SHUTDOWN:
            raise LabError(f"a scratch VM with a triple fault left KVM_RUN with exit reason {reason}")
