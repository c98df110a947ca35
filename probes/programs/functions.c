// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The engines kprobe and fentry: programs on KVM's own functions, which are given the vCPU.
 *
 * A kretprobe can miss returns of a function that blocks, and BPF is not told, so none is set on KVM_RUN: its end is the
 * tracepoint kvm_userspace_exit. kvm_arch_vcpu_ioctl can block, too (it copies from user space), and the end of an ioctl
 * is then dated late; what was saved and restored is told by functions inside it that do not.
 *
 * FENTRY: the programs are called through trampolines, which hand over an array of the arguments and, at the end of a
 * function, what it returned behind them. Each is then called by a program that BCC finds by its name.
 */

#if FENTRY
#define PROGRAM		static inline int
#define CONTEXT		u64
#define ARGUMENT(n)	ctx[(n) - 1]
#define RESULT(after)	ctx[after]	/* that function has so many arguments */
#else
#define PROGRAM		int
#define CONTEXT		struct pt_regs
#define ARGUMENT(n)	PT_REGS_PARM##n(ctx)
#define RESULT(after)	PT_REGS_RC(ctx)
#endif

static inline int end_unseen(struct in_ioctl *in)
{
	return in->events || in->saved;	/* a kretprobe of KVM_{GET,SET}_VCPU_EVENTS, or of the ioctl itself, did not run */
}

static inline u32 vmm_pid(u64 kvm)
{
	return owner_of(kvm);
}

static inline struct vcpu_state *state_of(u64 vcpu)
{
	struct vcpu_state *state = vcpus.lookup(&vcpu);

	return state ? state : begin_vcpu(vcpu, 0);
}

#if FULL
static inline void forget_requester(u64 thread);		/* probes/programs/kicks.c */

/* The state of a vCPU that the current thread is inside KVM_RUN of. */
static inline struct vcpu_state *state_inside(u64 vcpu)
{
	return state_of(vcpu);
}
#endif

/* long kvm_vcpu_ioctl(struct file *filp, unsigned int ioctl, unsigned long arg) */
PROGRAM on_kvm_vcpu_ioctl(CONTEXT *ctx)
{
	u64 vcpu = read_u64(ARGUMENT(1) + OFFSET_F_OP + OFFSET_PRIVATE_DATA);
	u64 thread = this_thread();
	u32 cmd = ARGUMENT(2);
	struct in_ioctl *in;
	struct vcpu_state *state;

	if (OWN_ONLY && cmd == KVM_RUN) {
		/* The hot path: a request that only the vCPU's own ioctls raise is as it was when the last one ended. */
		in = threads.lookup(&thread);
		if (in && !in->vcpu && in->last_vcpu == vcpu && !in->pending && in->epoch == current_epoch()) {
			in->vcpu = vcpu;
			in->cmd = cmd;
			return 0;
		}
	}
	state = vcpu ? state_of(vcpu) : NULL;
	if (state)
		enter_ioctl(state, vcpu, 0, cmd, ARGUMENT(3));
	return 0;
}

/* Raw tracepoint kvm:kvm_userspace_exit (u32 reason, int errno): no vCPU, but its thread is inside KVM_RUN. */
int on_userspace_exit(struct bpf_raw_tracepoint_args *ctx)
{
	u64 thread = this_thread();
	u32 reason = EXIT_REASON(ctx);
	struct in_ioctl *in = threads.lookup(&thread);
	struct vcpu_state *state;
	u64 vcpu;

	if (!in || !in->vcpu)
		return 0;		/* attached while this thread was inside: the next boundary will tell */
	vcpu = in->vcpu;
	in->vcpu = 0;
	if (OWN_ONLY && in->last_vcpu == vcpu && nothing_happened(in, reason, EXIT_ERRNO(ctx)))
		return 0;
	state = vcpus.lookup(&vcpu);
	if (state)
		run_returns(state, vcpu, in, reason, EXIT_ERRNO(ctx));
	return 0;
}

static inline void ioctl_ends(int result)
{
	u64 thread = this_thread();
	struct in_ioctl *in = threads.lookup(&thread);
	struct vcpu_state *state;
	u64 vcpu;

	if (!in || !in->vcpu)
		return;			/* attached while this thread was inside */
	vcpu = in->vcpu;
	in->vcpu = 0;
	state = vcpus.lookup(&vcpu);
	if (!state)
		return;
	end_of_ioctl(state, vcpu, in, in->cmd, in->argument, result);
	leave(state, in);
}

/* long kvm_arch_vcpu_ioctl(struct file *filp, unsigned int ioctl, unsigned long arg): all but KVM_RUN and registers */
PROGRAM after_kvm_arch_vcpu_ioctl(CONTEXT *ctx)
{
	ioctl_ends(RESULT(3));
	return 0;
}

/*
 * int kvm_arch_vcpu_ioctl_set_regs(struct kvm_vcpu *vcpu, struct kvm_regs *regs), and what else kvm_vcpu_ioctl handles
 * itself: each takes two arguments, and has put the vCPU by its end.
 */
PROGRAM after_registers(CONTEXT *ctx)
{
	ioctl_ends(RESULT(2));
	return 0;
}

/* int kvm_vcpu_ioctl_x86_{get,set}_vcpu_events(struct kvm_vcpu *vcpu, struct kvm_vcpu_events *events): entry */
PROGRAM on_vcpu_events(CONTEXT *ctx)
{
	u64 thread = this_thread();
	struct in_ioctl *in = threads.lookup(&thread);

	if (in)
		in->events = ARGUMENT(2);
	return 0;
}

/* KVM_SET_VCPU_EVENTS, or the same through kvm_run, has passed on what it was given. */
static inline void after_restore(int error)
{
	u64 thread = this_thread();
	struct in_ioctl *in = threads.lookup(&thread);
	struct reading reading = {};
	struct vcpu_state *state;
	u32 passed;
	u64 vcpu;
	u8 flags;
	int failed;

	if (!in || !in->vcpu || !in->events)
		return;			/* attached while this thread was inside: the end of the ioctl will tell */
	vcpu = in->vcpu;
	state = vcpus.lookup(&vcpu);
	if (!state)
		return;
	flags = in->cmd == KVM_RUN ? FLAG_SYNC : 0;
	passed = payload(in->events, 0, &failed);
	in->events = 0;
	in->told = 1;
	take_reading(state, vcpu, &reading);
	count(COUNT_BOUNDARIES);
	send(state, &reading, KIND_RESTORE, KVM_SET_VCPU_EVENTS | (u64)(u32)error << 32, passed,
	     flags | live_flags(state, vcpu));
}

PROGRAM after_get_vcpu_events(CONTEXT *ctx)
{
	u64 thread = this_thread();
	struct in_ioctl *in = threads.lookup(&thread);
	int failed;

	if (!in || !in->events)
		return 0;		/* attached while this thread was inside: the end of the ioctl will tell */
	if (in->cmd != KVM_RUN) {	/* a save through kvm_run is told by end_of_run() */
		in->payload = payload(in->events, 0, &failed);
		in->saved = 1;		/* whether user space has got it, the end of the ioctl will tell */
	}
	in->events = 0;
	return 0;
}

PROGRAM after_set_vcpu_events(CONTEXT *ctx)
{
	after_restore(RESULT(2));
	return 0;
}

/* int kvm_arch_vcpu_create(struct kvm_vcpu *vcpu) */
PROGRAM on_kvm_arch_vcpu_create(CONTEXT *ctx)
{
	created(ARGUMENT(1));
	return 0;
}

/* void kvm_arch_vcpu_destroy(struct kvm_vcpu *vcpu): in whichever task drops the last reference */
PROGRAM on_kvm_arch_vcpu_destroy(CONTEXT *ctx)
{
	u64 vcpu = ARGUMENT(1);
	struct vcpu_state *state = vcpus.lookup(&vcpu);

	if (!state)
		state = begin_vcpu(vcpu, 0);
	if (state)
		end_vcpu(state, vcpu, END_DESTROYED);
	return 0;
}

/* void kvm_destroy_vm(struct kvm *kvm): its vCPUs may still get requests, until they are destroyed, too */
PROGRAM on_kvm_destroy_vm(CONTEXT *ctx)
{
	u64 kvm = ARGUMENT(1);
	struct vm_state *vm = vms.lookup(&kvm);

	if (vm && vm->vcpus)
		vm->ends = 1;
	else if (vm)
		forget_vm(kvm);
	return 0;
}

/* int kvm_vm_ioctl_enable_cap(struct kvm *kvm, struct kvm_enable_cap *cap) */
PROGRAM on_kvm_vm_ioctl_enable_cap(CONTEXT *ctx)
{
	struct in_ioctl in = { .vcpu = ARGUMENT(1), .cmd = KVM_ENABLE_CAP };
	u64 thread = this_thread();

	if (read_u32(ARGUMENT(2)) == KVM_CAP_X86_TRIPLE_FAULT_EVENT && threads.update(&thread, &in))
		count(COUNT_MAP_FULL);
	return 0;
}

PROGRAM after_kvm_vm_ioctl_enable_cap(CONTEXT *ctx)
{
	u64 thread = this_thread();
	struct in_ioctl *in = threads.lookup(&thread);
	u64 kvm;

	if (!in || !in->vcpu || in->cmd != KVM_ENABLE_CAP)
		return 0;
	kvm = in->vcpu;
	in->vcpu = 0;
	if (!(int)RESULT(2))
		cap_set(kvm);
	return 0;
}

/* void kvm_vcpu_reset(struct kvm_vcpu *vcpu, bool init_event) */
PROGRAM on_kvm_vcpu_reset(CONTEXT *ctx)
{
	u64 vcpu = ARGUMENT(1);
	struct vcpu_state *state = vcpus.lookup(&vcpu);

	if (state)
		boundary(state, vcpu, KIND_RESET, 0, 0, WATCHED);
	return 0;
}

/* Raw tracepoint sched_process_exit (struct task_struct *task, ...): a thread leaves nothing behind. */
int on_thread_exit(struct bpf_raw_tracepoint_args *ctx)
{
	u64 thread = ctx->args[0];

	threads.delete(&thread);
#if FULL
	forget_requester(thread);
#endif
	return 0;
}

/* The plan makes one program of this for each function after which the word tells who raised or took a request. */
#define SITE(function, meaning)				\
	PROGRAM after_##function(CONTEXT *ctx)	\
	{						\
		after(meaning, 0);			\
		return 0;				\
	}
