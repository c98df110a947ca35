"""What ``kvmreq stat --help`` says of its numbers and its JSON. Imports nothing: it is read at every start."""

SCHEMA = "kvmreq.stat/1"

HELP = f"""\
times: from kvm_exit to kvm_entry, and from kvm_userspace_exit to the next KVM_RUN.
  An exit that goes on to user space is in both. share is of all time of that kind.
  p50 and p99 come from histograms: at most 6.25% from the truth. max is exact where
  it is the longest since the start, else at most 12.5% too long.
requests: vcpu->requests is read at every kvm_exit, kvm_entry, return to user space
  and begin of KVM_RUN. A bit that is newly set counts as raised, one that is gone as
  serviced; what is raised and serviced between two readings is not seen.
JSON: one object a line for each interval, "schema": "{SCHEMA}", with
  begin_ns, end_ns (CLOCK_MONOTONIC), end_utc, seconds, host, kernel, engine,
  vms [vm, pid, name, vmm, vcpus],
  guest_exits [reason, number, isa, count, timed, time_ns, share, p50_ns, p99_ns,
  max_ns], user_exits [the same, errno instead of isa],
  requests [request, bit, raised, serviced], loss {{ring_full, map_full, missed}},
  unseen [what the tables cannot show, and why]
  count: exits that began; timed: those that ended, whose times are told"""
