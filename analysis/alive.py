"""Which vCPUs and VMs are known: how each becomes known, whose vCPU it is, and what is forgotten."""

from __future__ import annotations

from analysis import cases, order_rules
from analysis.compiled import compiled
from analysis.events import NOTHING, Array, Event, signed
from analysis.memory import NONE, VCPU, VM, Memory, Record, drop, give, into, look, out_of, put, take


@compiled
def new_vcpu(memory: Memory, event: Event) -> int:
    """Return the place of a vCPU that becomes known."""
    place = take(memory)
    put(memory, VCPU, event.vcpu, place)
    memory.now.first_vcpu = into(memory, memory.now.first_vcpu, place)
    memory.now.vcpus += 1
    vcpu = memory.rows[place]
    vcpu.number, vcpu.vm, vcpu.pid, vcpu.vcpu = event.vcpu, 0, event.pid, 0
    vcpu.seq = vcpu.gaps = vcpu.last_ns = vcpu.kind = vcpu.slept_ns = 0
    vcpu.word = vcpu.asked = NOTHING
    vcpu.seen = vcpu.cut = vcpu.named = vcpu.staying = vcpu.dead = False
    vcpu.pending = vcpu.kicks = vcpu.cases = vcpu.of_vm = vcpu.next_of_vm = NONE
    vcpu.flagged = vcpu.state = vcpu.pause = vcpu.copies = 0
    vcpu.saved = vcpu.ran = False
    vcpu.fingerprint, vcpu.restored, vcpu.restored_ns = NOTHING, NOTHING, NONE
    vcpu.refused, vcpu.refused_ns = 0, NONE
    vcpu.last_kick_ns[:] = -1
    vcpu.period_ns = vcpu.doing = vcpu.outer = vcpu.inner = 0
    vcpu.why_left = vcpu.exits = vcpu.changes = vcpu.guest_exit = vcpu.user_exit = NONE
    return place


@compiled
def forget_vcpu(memory: Memory, place: int) -> None:
    """Free the place of a vCPU to which nothing belongs any more."""
    drop(memory, VCPU, memory.rows[place].number)
    memory.now.first_vcpu = out_of(memory, memory.now.first_vcpu, place)
    memory.now.vcpus -= 1
    if memory.now.last == place:
        memory.now.last = NONE
    give(memory, place)


@compiled
def vm_of(memory: Memory, event: Event) -> int:
    """Return the place of the VM that an event names."""
    place = look(memory, VM, event.detail)
    if place == NONE:
        place = take(memory)
        put(memory, VM, event.detail, place)
        vm = memory.rows[place]
        vm.next, memory.now.first_vm = memory.now.first_vm, place
        vm.number, vm.pid, vm.members, vm.cap = event.detail, event.pid, NONE, -1
        vm.alive = vm.told = vm.vcpus = vm.first_ns = 0
        vm.dead = False
        vm.last_ask_ns[:] = -1
    return place


@compiled
def tell_vm(memory: Memory, vm: Record, event: Event) -> None:
    """An event names the VM: the first one that does decides where it stands among others."""
    if vm.told == 0:
        memory.now.told += 1
        vm.told, vm.first_ns, vm.pid = memory.now.told, event.time_ns, event.pid


@compiled
def join(wanted: Record, memory: Memory, place: int, event: Event) -> None:
    """A VCPU_NEW tells whose vCPU it is."""
    vcpu, of_vm = memory.rows[place], vm_of(memory, event)
    vcpu.vm, vcpu.vcpu, vcpu.pid = event.detail, signed(event.arg), event.pid
    vm = memory.rows[of_vm]
    if wanted.exposure:
        tell_vm(memory, vm, event)
    if vcpu.of_vm == of_vm:
        return
    if vcpu.of_vm == NONE:
        vm.vcpus += 1
    leave(memory, place)
    vcpu.named, vcpu.of_vm, vcpu.next_of_vm = True, of_vm, vm.members
    vm.members = place
    vm.alive += 1


@compiled
def leave(memory: Memory, place: int) -> None:
    """A vCPU is its VM's no longer."""
    vcpu = memory.rows[place]
    if vcpu.of_vm == NONE:
        return
    vm = memory.rows[vcpu.of_vm]
    if vm.members == place:
        vm.members = vcpu.next_of_vm
    else:
        before = vm.members
        while memory.rows[before].next_of_vm != place:
            before = memory.rows[before].next_of_vm
        memory.rows[before].next_of_vm = vcpu.next_of_vm
    vcpu.of_vm = NONE
    vm.alive -= 1


@compiled
def sweep(memory: Memory) -> None:
    """Forget what only other threads told of, or nobody tells of any more, and what is old."""
    old = memory.now.top_ns - 2 * cases.LATE_NS
    place = memory.now.first_vcpu
    while place != NONE:
        vcpu, after = memory.rows[place], memory.rows[place].after
        if not vcpu.seen and _newest(vcpu.last_kick_ns) <= old:
            forget_vcpu(memory, place)
        place = after
    order_rules.forget_requesters(memory, memory.now.top_ns - cases.GONE_NS)
    place, kept = memory.now.first_vm, NONE
    while place != NONE:
        vm, after = memory.rows[place], memory.rows[place].next
        if vm.alive == 0 and vm.told == 0 and _newest(vm.last_ask_ns) <= old:
            drop(memory, VM, vm.number)
            give(memory, place)
        else:
            vm.next, kept = kept, place
        place = after
    memory.now.first_vm = kept


@compiled
def _newest(times_ns: Array) -> int:
    newest: int = times_ns[0]
    for time_ns in times_ns:
        newest = max(newest, time_ns)
    return newest
