"""A tiny KVM VMM, and scenarios on it whose outcome for a pending triple fault is known.

Needs the standard library and /dev/kvm, nothing else: it also runs in test VMs, under Python 3.9 and later.
"""
