// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Detail full: where the guest is entered and left, and what other threads do to a vCPU.
 *
 * Follows vcpu.c and the file of the engine, which know which vCPU it is; guest.c follows, whose programs call
 * guest_entered() and guest_left(). These are the hottest programs of all, so that each reads no more than it tells.
 */

/*
 * A vCPU enters or leaves the guest for the first time. Where the hooks were set while its thread was inside KVM_RUN,
 * nobody knows yet what that thread is inside of.
 */
static inline struct vcpu_state *runs_first(u64 vcpu)
{
	u64 thread = this_thread();
	struct in_ioctl *in, new = { .vcpu = vcpu, .cmd = KVM_RUN, .last_vcpu = vcpu };
	struct vcpu_state *state;

	if (!vcpus.lookup(&vcpu) && !asked_for(bpf_get_current_pid_tgid() >> 32))
		return NULL;
	state = state_inside(vcpu);
	if (!state)
		return NULL;
	in = threads.lookup(&thread);
	if (!in) {
		if (threads.update(&thread, &new))
			count(COUNT_MAP_FULL);
	} else if (!in->vcpu) {
		in->vcpu = vcpu;
		in->cmd = KVM_RUN;
	}
	state->ran = 1;
#if KICKS
	keep_vcpu(state->kvm, vcpu);
#endif
	return state;
}

static inline struct vcpu_state *runs(u64 vcpu)
{
	struct vcpu_state *state = vcpus.lookup(&vcpu);

	return state && state->ran ? state : runs_first(vcpu);
}

/* The next event of a vCPU, from inside KVM_RUN. */
static inline void tell_inside(struct vcpu_state *state, u64 vcpu, u32 kind, u64 arg, u32 detail)
{
	struct reading reading = {};
	u8 flags;

	take_reading(state, vcpu, &reading);
	flags = live_flags(state, vcpu) | perhaps_cleared(vcpu, &reading);
	if (!state->announced) {
		send(state, &reading, kind, arg, detail, flags);
		return;
	}
	count(COUNT_GUEST);
	put_next(state, &reading, kind, arg, detail, flags);
}

static inline void guest_entered(u64 vcpu)
{
	struct vcpu_state *state = runs(vcpu);

	if (state)
		tell_inside(state, vcpu, KIND_GUEST_ENTRY, 0, 0);
}

static inline void guest_left(u64 vcpu, u32 isa, u32 reason)
{
	struct vcpu_state *state = runs(vcpu);

	if (state)
		tell_inside(state, vcpu, KIND_GUEST_EXIT, reason, isa == ISA_VMX || isa == ISA_SVM ? isa : 0);
}

/* Raw tracepoint kvm:kvm_vcpu_wakeup (u64 ns, bool waited, ...): no vCPU, but its thread is inside KVM_RUN. */
int on_wakeup(struct bpf_raw_tracepoint_args *ctx)
{
	u64 thread = this_thread();
	struct in_ioctl *in = threads.lookup(&thread);
	struct vcpu_state *state;
	u64 vcpu;

	if (!in || !in->vcpu || in->cmd != KVM_RUN)
		return 0;		/* attached while this thread was inside, or not one that is traced */
	vcpu = in->vcpu;
	state = vcpus.lookup(&vcpu);
	if (state)
		tell_inside(state, vcpu, KIND_WAKEUP, WAKEUP_NS(ctx), WAKEUP_WAITED(ctx) != 0);
	return 0;
}
