// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Detail full: what other threads do to a vCPU, in interrupts, too. Follows functions.c.
 *
 * Nothing here touches what is kept of a vCPU: that is for its own thread. What the ring has no room for is counted
 * apart, since no verdict hangs on it.
 */

#define IN_GUEST_MODE		1	/* vcpu->mode (include/linux/kvm_host.h) */
#define EXITING_GUEST_MODE	2
#define REQUEST_NUMBER		0xff	/* of a request, KVM's flags are above it (include/linux/kvm_host.h) */
#define REQUEST_WAIT		(1 << 9)
#define REQUEST_NO_ACTION	(1 << 10)	/* it sets no bit: KVM_REQ_OUTSIDE_GUEST_MODE, which only has vCPUs leave */
#define SLOTS			64	/* vCPUs of a VM that are kept; so many bits has a mask */
#define MAX_REQUESTERS		4096

/* A thread that raises a request of several vCPUs. */
struct requester {
	u64 began_ns;
	u64 kvm;
	u64 mask;
	u32 request;
	u32 depth;		/* which function: one calls those with a greater number, and they tell nothing more */
	u32 vm;
	u32 pid;
};

/* The vCPUs of a VM that have run, by index. */
struct slots {
	u64 vcpu[SLOTS];
};

BPF_HASH(requesters, u64, struct requester, MAX_REQUESTERS);
BPF_HASH(slots_of, u64, struct slots, MAX_VMS);
BPF_PERCPU_ARRAY(no_slots, struct slots, 1);	/* never written: too large for the stack */

static inline void forget_vcpus_of(u64 kvm)
{
	slots_of.delete(&kvm);
}

static inline void forget_requester(u64 thread)
{
	requesters.delete(&thread);
}

/* KVM gives a vCPU its index after it has created it, and before it can run. */
static inline void keep_vcpu(u64 kvm, u64 vcpu)
{
#ifdef OFFSET_VCPU_IDX
	u32 zero = 0, slot = read_u32(vcpu + OFFSET_VCPU_IDX);
	struct slots *slots = slots_of.lookup(&kvm), *none;

	if (!slots) {
		none = no_slots.lookup(&zero);
		slots = none ? slots_of.lookup_or_try_init(&kvm, none) : NULL;
	}
	if (slots && slot < SLOTS)
		slots->vcpu[slot] = vcpu;
	else
		count(COUNT_FAR);	/* the plan says what that leaves unseen */
#endif
}

/* A vCPU as another thread sees it. */
struct seen {
	u64 word;
	u32 mode;
};

static inline void look_at(u64 vcpu, struct seen *seen)
{
#if !defined(OFFSET_MODE)
	seen->word = read_u64(vcpu + OFFSET_REQUESTS);
#elif OFFSET_MODE + 4 == OFFSET_REQUESTS || OFFSET_MODE + 8 == OFFSET_REQUESTS
	u64 both[2] = {};		/* neighbours: one call reads them */

	bpf_probe_read_kernel(both, sizeof(both), (void *)(vcpu + OFFSET_REQUESTS - 8));
	seen->word = both[1];
	seen->mode = OFFSET_MODE + 4 == OFFSET_REQUESTS ? both[0] >> 32 : both[0];
#else
	seen->word = read_u64(vcpu + OFFSET_REQUESTS);
	seen->mode = read_u32(vcpu + OFFSET_MODE);
#endif
}

/* Put one event into the ring that no vCPU has in its numbering. */
static inline void put_apart(u32 vcpu, u32 pid, u64 now, u64 since, u64 word, u32 kind, u64 arg, u32 detail, u8 flags)
{
	struct subject subject = { .vcpu = vcpu, .pid = pid };
	struct reading reading = { .now = now, .since = since, .word = word, .before = word };

	count(COUNT_PRODUCED);
	if (!put_event(&subject, &reading, kind, arg, detail, flags))
		count(COUNT_KICKS);
}

/* void kvm_vcpu_kick(struct kvm_vcpu *vcpu), void __kvm_vcpu_kick(struct kvm_vcpu *vcpu, bool wait) */
PROGRAM on_kick(CONTEXT *ctx)
{
	u64 vcpu = ARGUMENT(1);
	struct vcpu_state *state = vcpus.lookup(&vcpu);
	struct seen seen = {};

	if (!state)
		return 0;		/* of a process that the user did not ask for, or never seen to do anything */
	if (!state->announced) {
		count(COUNT_PRODUCED);
		count(COUNT_KICKS);	/* nobody would know which vCPU that is */
		return 0;
	}
	look_at(vcpu, &seen);
	put_apart(state->number, state->pid, bpf_ktime_get_ns(), 0, seen.word, KIND_KICK, 0, seen.mode, state->seen);
	return 0;
}

static inline void request_begins(u64 kvm, u32 request, u64 mask, u32 depth)
{
	u64 thread = this_thread();
	struct requester *known = requesters.lookup(&thread), new = {
		.began_ns = bpf_ktime_get_ns(), .kvm = kvm, .mask = mask, .request = request, .depth = depth,
	};
	struct vm_state *vm = vms.lookup(&kvm);
	u32 zero = 0, *full = vms_full.lookup(&zero);

	if (!vm) {
		if (full && *full) {
			count(COUNT_PRODUCED);
			count(COUNT_KICKS);
		}
		return;			/* none of its vCPUs is traced, or there was no room to note it */
	}
	if (known) {
		if (known->kvm == kvm && known->request == request && known->depth < depth)
			return;		/* told already: that function calls this one */
		count(COUNT_PRODUCED);
		count(COUNT_KICKS);	/* its end was not seen */
	}
	new.vm = vm->number;
	new.pid = vm->pid;
	if (requesters.update(&thread, &new)) {
		count(COUNT_PRODUCED);
		count(COUNT_KICKS);	/* its end will find nothing to tell */
	}
	put_apart(0, new.pid, new.began_ns, 0, mask, KIND_REQUEST_ALL, request, new.vm, 0);
}

/* KVM has waited for every vCPU to leave guest mode: tell those that have not, and have the request still, if any can. */
static inline void tell_those_in_guest(struct requester *by, u64 now)
{
	struct slots *slots = slots_of.lookup(&by->kvm);
	struct vcpu_state *state;
	u64 vcpu;

	if (!slots)
		return;
#pragma clang loop unroll(disable)
	for (u32 slot = 0; slot < SLOTS; slot++) {
		struct seen seen = {};

		vcpu = slots->vcpu[slot];
		if (!vcpu || !(by->mask >> slot & 1))
			continue;
		look_at(vcpu, &seen);
		if (seen.mode != IN_GUEST_MODE && seen.mode != EXITING_GUEST_MODE)
			continue;
		if (!(by->request & REQUEST_NO_ACTION) && !(seen.word >> (by->request & REQUEST_NUMBER & 63) & 1))
			continue;
		state = vcpus.lookup(&vcpu);
		if (!state || state->kvm != by->kvm || !state->announced)
			continue;	/* it has ended, or nobody would know which vCPU that is */
		put_apart(state->number, state->pid, now, by->began_ns, seen.word, KIND_IN_GUEST_STILL, by->request,
			  seen.mode, state->seen);
	}
}

static inline void request_ends(u32 depth)
{
	u64 thread = this_thread(), now;
	struct requester *known = requesters.lookup(&thread), by;

	if (!known || known->depth != depth)
		return;			/* the function that called this one tells, or its begin was not told either */
	now = bpf_ktime_get_ns();
	by = *known;
	requesters.delete(&thread);
	put_apart(0, by.pid, now, by.began_ns, by.mask, KIND_REQUEST_ALL_END, by.request, by.vm, 0);
	if (by.request & REQUEST_WAIT)
		tell_those_in_guest(&by, now);
}

/* bool kvm_make_all_cpus_request(struct kvm *kvm, unsigned int req) */
PROGRAM on_kvm_make_all_cpus_request(CONTEXT *ctx)
{
	request_begins(ARGUMENT(1), ARGUMENT(2), ~0ULL, 1);
	return 0;
}

PROGRAM after_kvm_make_all_cpus_request(CONTEXT *ctx)
{
	request_ends(1);
	return 0;
}

/* bool kvm_make_all_cpus_request_except(struct kvm *kvm, unsigned int req, struct kvm_vcpu *except) */
PROGRAM on_kvm_make_all_cpus_request_except(CONTEXT *ctx)
{
	u64 mask = ~0ULL;
#ifdef OFFSET_VCPU_IDX
	u64 except = ARGUMENT(3);
	u32 slot = except ? read_u32(except + OFFSET_VCPU_IDX) : SLOTS;

	if (slot < SLOTS)
		mask &= ~(1ULL << slot);
#endif
	request_begins(ARGUMENT(1), ARGUMENT(2), mask, 2);
	return 0;
}

PROGRAM after_kvm_make_all_cpus_request_except(CONTEXT *ctx)
{
	request_ends(2);
	return 0;
}

/*
 * bool kvm_make_vcpus_request_mask(struct kvm *kvm, unsigned int req, unsigned long *vcpu_bitmap), and on older kernels
 * (struct kvm *kvm, unsigned int req, struct kvm_vcpu *except, unsigned long *vcpu_bitmap, cpumask_var_t tmp), where
 * those that give an exception are the functions above, and no bitmap means all.
 */
PROGRAM on_kvm_make_vcpus_request_mask(CONTEXT *ctx)
{
#if !defined(MASK_ARGUMENTS)
	/* No BTF tells: the older ones give no exception. The verifier wants both read before one is chosen. */
	u64 bitmap = ARGUMENT(3), other = ARGUMENT(4);

	asm volatile("" : "+r"(bitmap), "+r"(other));
	if (!bitmap)
		bitmap = other;
#elif MASK_ARGUMENTS == 3
	u64 bitmap = ARGUMENT(3);
#else
	u64 bitmap = ARGUMENT(4);
#endif

	request_begins(ARGUMENT(1), ARGUMENT(2), bitmap ? read_u64(bitmap) : ~0ULL, 3);
	return 0;
}

PROGRAM after_kvm_make_vcpus_request_mask(CONTEXT *ctx)
{
	request_ends(3);
	return 0;
}
