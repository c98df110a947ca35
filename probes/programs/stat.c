// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Statistics: exits by reason in histograms that stay in the kernel, so that an exit costs no event.
 *
 * Follows vcpu.c and the file of the engine, which know which vCPU it is. Every histogram is of one vCPU, and all that
 * counts in it runs in the thread that is inside KVM_RUN of that vCPU: plain additions do, on whatever CPU.
 *
 * The tracer puts in front: STAT_* (probes/stat.py). guest.c follows, whose programs call what is here.
 */

struct stat_key {
	u32 vcpu;		/* its number */
	u32 kind;
	u32 reason;
	u32 variant;		/* of a guest's exit the instruction set, of an exit to user space the error */
};

struct stat_value {
	u64 count;		/* exits that began */
	u64 sum_ns;		/* of those that ended */
	u64 max_ns;
	u64 buckets[STAT_BUCKETS];
};

struct stat_bits {
	u64 raised[64];
	u64 serviced[64];
};

BPF_HASH(stat_values, struct stat_key, struct stat_value, STAT_MAX_VALUES);
BPF_HASH(stat_requests, u32, struct stat_bits, MAX_VCPUS);
BPF_PERCPU_ARRAY(stat_new_value, struct stat_value, 1);	/* never written: too large for the stack */
BPF_PERCPU_ARRAY(stat_new_bits, struct stat_bits, 1);
#if STAT_KPROBES
BPF_HASH(stat_threads, u64, u64, MAX_THREADS);		/* the vCPU whose KVM_RUN a thread is inside, or 0 */
#endif

/* 2^STAT_BITS buckets for each power of two, so that a bucket is at most 1/2^STAT_BITS as wide as what it holds. */
static inline u64 stat_bucket(u64 ns)
{
	u64 above, bucket;

	if (ns < 1 << STAT_BITS)
		return ns;
	above = bpf_log2l(ns) - 1 - STAT_BITS;		/* bpf_log2l() counts from 1 */
	bucket = (above << STAT_BITS) + (ns >> above);
	return bucket < STAT_BUCKETS ? bucket : STAT_BUCKETS - 1;
}

/* Keeps the compiler from checking one copy of an index and using another: the verifier believes the checked one only. */
#define STAT_HIDE(index)	asm volatile("" : "+r"(index))

static inline void stat_begins(struct stat_key *key)
{
	struct stat_value *value = stat_values.lookup(key), *new;
	u32 zero = 0;

	if (!value) {
		new = stat_new_value.lookup(&zero);
		value = new ? stat_values.lookup_or_try_init(key, new) : NULL;
	}
	if (value)
		value->count++;
	else
		count(COUNT_MAP_FULL);		/* an exit that is not counted: every table says so */
}

static inline void stat_ends(struct stat_key *key, u64 ns)
{
	struct stat_value *value = stat_values.lookup(key);
	u64 bucket = stat_bucket(ns);

	if (!value)
		return;				/* its begin was not counted either */
	value->sum_ns += ns;
	if (ns > value->max_ns)
		value->max_ns = ns;
	STAT_HIDE(bucket);
	if (bucket < STAT_BUCKETS)
		value->buckets[bucket]++;	/* always: for the verifier */
}

/* Count the requests that came and went since the word was last read. */
static inline void stat_word(struct vcpu_state *state, u64 vcpu)
{
	u64 word = read_u64(vcpu + OFFSET_REQUESTS), changed = word ^ state->stat.word;
	struct stat_bits *bits, *new;
	u32 zero = 0;
	u64 bit;

	if (!changed)
		return;
	state->stat.word = word;
	bits = stat_requests.lookup(&state->number);
	if (!bits) {
		new = stat_new_bits.lookup(&zero);
		bits = new ? stat_requests.lookup_or_try_init(&state->number, new) : NULL;
	}
	if (!bits) {
		count(COUNT_MAP_FULL);
		return;
	}
	for (u32 i = 0; i < 64; i++) {
		if (!changed)
			break;
		bit = bpf_log2l(changed) - 1;
		changed &= ~(1ULL << bit);
		STAT_HIDE(bit);
		bit &= 63;			/* for the verifier */
		if (word & (1ULL << bit))
			bits->raised[bit]++;
		else
			bits->serviced[bit]++;
	}
}

/* A thread enters KVM_RUN: user space has had the vCPU since its last exit. */
static inline void stat_run_begins(struct vcpu_state *state, u64 vcpu)
{
	struct stat_key key = { .vcpu = state->number, .kind = STAT_USER };

	stat_word(state, vcpu);
	if (!state->stat.user_ns)
		return;
	key.reason = state->stat.user_reason;
	key.variant = state->stat.user_error;
	stat_ends(&key, bpf_ktime_get_ns() - state->stat.user_ns);
	state->stat.user_ns = 0;
}

static inline void stat_run_ends(struct vcpu_state *state, u64 vcpu, u32 reason, u32 error)
{
	struct stat_key key = { .vcpu = state->number, .kind = STAT_USER, .reason = reason, .variant = error };

	stat_begins(&key);
	state->stat.user_ns = bpf_ktime_get_ns();
	state->stat.user_reason = reason;
	state->stat.user_error = error;
	stat_word(state, vcpu);
}

#if STAT_KPROBES
/* Which vCPU a thread is inside KVM_RUN of, for the tracepoint that does not tell it. */
static inline void stat_inside(u64 vcpu)
{
	u64 thread = this_thread(), *known = stat_threads.lookup(&thread);

	if (known)
		*known = vcpu;
	else if (stat_threads.update(&thread, &vcpu))
		count(COUNT_MAP_FULL);
}
#endif

/* A vCPU that leaves or enters the guest; its story begins here where it ran before the hooks were set. */
static inline struct vcpu_state *stat_running(u64 vcpu)
{
	struct vcpu_state *state = vcpus.lookup(&vcpu);

	if (state)
		return state;
	state = begin_vcpu(vcpu, 0);
#if STAT_KPROBES
	if (state)
		stat_inside(vcpu);
#endif
	return state;
}

static inline void guest_left(u64 vcpu, u32 isa, u32 reason)
{
	struct vcpu_state *state = stat_running(vcpu);
	struct stat_key key = { .kind = STAT_GUEST, .reason = reason, .variant = isa };

	if (!state)
		return;				/* not one of the processes that the user asked for */
	key.vcpu = state->number;
	stat_begins(&key);
	state->stat.exit_ns = bpf_ktime_get_ns();
	state->stat.exit_reason = reason;
	state->stat.exit_isa = isa;
	stat_word(state, vcpu);
}

static inline void guest_entered(u64 vcpu)
{
	struct vcpu_state *state = stat_running(vcpu);
	struct stat_key key = { .kind = STAT_GUEST };

	if (!state)
		return;				/* not one of the processes that the user asked for */
	stat_word(state, vcpu);
	if (!state->stat.exit_ns)
		return;				/* the first entry that is seen: nothing ends here */
	key.vcpu = state->number;
	key.reason = state->stat.exit_reason;
	key.variant = state->stat.exit_isa;
	stat_ends(&key, bpf_ktime_get_ns() - state->stat.exit_ns);
	state->stat.exit_ns = 0;
}

#if STAT_KPROBES
/* int kvm_arch_vcpu_ioctl_run(struct kvm_vcpu *vcpu) */
int stat_on_run(struct pt_regs *ctx)
{
	u64 vcpu = PT_REGS_PARM1(ctx);
	struct vcpu_state *state = state_of(vcpu);

	if (!state)
		return 0;			/* not one of the processes that the user asked for */
	stat_inside(vcpu);
	stat_run_begins(state, vcpu);
	return 0;
}

/* Raw tracepoint kvm:kvm_userspace_exit (u32 reason, int errno): no vCPU, but its thread is inside KVM_RUN. */
int stat_on_userspace_exit(struct bpf_raw_tracepoint_args *ctx)
{
	u64 thread = this_thread(), *inside = stat_threads.lookup(&thread);
	struct vcpu_state *state;
	u64 vcpu;

	if (!inside || !*inside) {
		if (asked_for(bpf_get_current_pid_tgid() >> 32))
			count(COUNT_MISSED);	/* the hooks were set while this thread was inside */
		return 0;
	}
	vcpu = *inside;
	*inside = 0;
	state = vcpus.lookup(&vcpu);
	if (state)
		stat_run_ends(state, vcpu, ctx->args[0], ctx->args[1]);
	return 0;
}

/* Raw tracepoint sched_process_exit (struct task_struct *task, ...): a thread leaves nothing behind. */
int stat_on_thread_exit(struct bpf_raw_tracepoint_args *ctx)
{
	u64 thread = ctx->args[0];

	stat_threads.delete(&thread);
	return 0;
}
#else
/* A system call on a descriptor asks for KVM_RUN: on_sys_enter() calls this. */
static inline void stat_run_on_fd(u32 fd)
{
	u64 vcpu = vcpu_behind_fd(fd);
	struct vcpu_state *state = vcpu ? state_behind_fd(vcpu, fd) : NULL;

	if (state)
		stat_run_begins(state, vcpu);
}

/* Raw tracepoint kvm:kvm_userspace_exit (u32 reason, int errno): the descriptor of its system call tells the vCPU. */
int stat_on_userspace_exit(struct bpf_raw_tracepoint_args *ctx)
{
	struct arguments arguments = {};
	struct vcpu_state *state;
	u64 vcpu;

	arguments_of_syscall(&arguments);
	if ((u32)arguments.si != KVM_RUN || arguments.orig_ax != __NR_ioctl)
		return 0;			/* a 32-bit process: the plan says that it is not counted */
	vcpu = vcpu_behind_fd(arguments.di);
	state = vcpu ? state_behind_fd(vcpu, arguments.di) : NULL;
	if (state)
		stat_run_ends(state, vcpu, ctx->args[0], ctx->args[1]);
	return 0;
}
#endif
