"""A tiny KVM VMM, and scenarios on it of which the requests that KVM raises, and their ends, are known.

Needs the standard library and /dev/kvm, nothing else: it also runs in test VMs, under Python 3.9 and later.
"""
