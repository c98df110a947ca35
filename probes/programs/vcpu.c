// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * What every engine shares: the state of each vCPU, and the one way to turn a reading of its requests word into an
 * event. A hook finds the vCPU and calls one of begin(), end_of_run(), end_of_ioctl(), site() and their kin.
 *
 * The tracer puts in front of this file: struct event and its constants (probes/schema.py), the offsets of the
 * kernel's fields (OFFSET_*, from BTF), and the settings WATCHED, FULL, FILTER and the sizes of the maps.
 */

#define KVM_RUN			0xae80
#define KVM_SET_REGS		0x4090ae82
#define KVM_SET_SREGS		0x4138ae84
#define KVM_SET_SREGS2		0x4140aecd
#define KVM_GET_VCPU_EVENTS	0x8040ae9f
#define KVM_SET_VCPU_EVENTS	0x4040aea0
#define KVM_ENABLE_CAP		0x4068aea3
#define KVM_CAP_X86_TRIPLE_FAULT_EVENT	218
#define KVM_EXIT_SHUTDOWN	8
#define KVM_EXIT_SYSTEM_EVENT	24
#define EIO			5
#define KVM_SYNC_X86_EVENTS	4
#define X86_CR0_PE		1
#define HF_GUEST_MASK		(1 << 5)	/* asm/kvm_host.h, as long as there is no statistic for it */
#define SREGS_CR0		224	/* offsetof(struct kvm_sregs, cr0), and of struct kvm_sregs2: uapi */
#define EVENTS_FLAGS		20	/* offsetof(struct kvm_vcpu_events, flags): uapi */
#define EVENTS_PENDING		28	/* offsetof(struct kvm_vcpu_events, triple_fault.pending): uapi */
#define VALID_TRIPLE_FAULT	0x20
#define ISA_VMX		1	/* KVM_ISA_VMX and KVM_ISA_SVM: what kvm_exit tells as isa (arch/x86/kvm/trace.h) */
#define ISA_SVM		2

/*
 * What a tracepoint tells. Raw, its arguments; as a trace event (TRACE_EVENTS, see the plan), the fields of its record,
 * as its format file has them, behind 8 bytes that are nobody's.
 */
#if TRACE_EVENTS
#define SYSCALL_NUMBER(ctx)	((u32)(ctx)->args[1])
#define SYSCALL_RESULT(ctx)	((int)(ctx)->args[2])
#define EXIT_REASON(ctx)	((u32)(ctx)->args[1])
#define EXIT_ERRNO(ctx)		((int)((ctx)->args[1] >> 32))
#define WAKEUP_NS(ctx)		((ctx)->args[1])
#define WAKEUP_WAITED(ctx)	(*(u8 *)&(ctx)->args[2])	/* the record ends behind it */
#else
#define SYSCALL_NUMBER(ctx)	((u32)(ctx)->args[1])
#define SYSCALL_RESULT(ctx)	((int)(ctx)->args[1])
#define EXIT_REASON(ctx)	((u32)(ctx)->args[0])
#define EXIT_ERRNO(ctx)		((int)(ctx)->args[1])
#define WAKEUP_NS(ctx)		((ctx)->args[0])
#define WAKEUP_WAITED(ctx)	((u8)(ctx)->args[1])
#endif

#ifdef OWN_ENDS
/* What probes/programs/tracepoint.c knows of a vCPU, which nobody tells it the end of. */
struct end_state {
	u64 file;		/* its struct file */
	u64 vmm;		/* the number of its VMM's memory */
	u64 ns;			/* when a system call began that may end it: */
	u64 word;		/* its requests word as it was then, */
	u64 exits;		/* and how often it had left the guest */
};
#endif

#ifdef STAT
/* What probes/programs/stat.c knows of a vCPU: what it is in the middle of. */
struct stat_state {
	u64 word;		/* the requests word as it was last read there */
	u64 exit_ns;		/* when it left the guest; 0: it is inside, or nobody has seen it leave */
	u64 user_ns;		/* when it went to user space; 0: it has come back, or nobody has seen it go */
	u32 exit_reason;
	u32 exit_isa;
	u32 user_reason;
	u32 user_error;
};
#endif

struct vcpu_state {
	u64 last_ns;		/* when the word was last read */
	u64 word;		/* the word as it was then */
	u64 kvm;
	u32 number;		/* what the recording calls this vCPU */
	u32 seq;		/* events produced for it */
	u32 vm;
	u32 vcpu_id;
	u32 pid;
	u8 flags;		/* FLAG_CREATED, FLAG_CAP_EXISTS */
	u8 seen;		/* the flags of its last event */
	u8 announced;		/* its VCPU_NEW is in the ring, or on its way there */
	u8 closing;		/* a descriptor of it was closed: whoever is inside an ioctl looks whether that was the last */
	u8 still;		/* FLAG_STILL */
	u32 read;		/* what user space has read of it, */
	u32 written;		/* and written, since it last ran */
	u64 exits;		/* how often it had left the guest by then */
	u64 restored;		/* the same and 1 more when it was restored; 0: it was not, or its run since was told */
	u64 fingerprint;	/* of its registers, as user space has read them */
#ifdef OWN_ENDS
	struct end_state end;
#endif
#if FULL
	u32 ran;		/* it was seen to enter or leave the guest */
#endif
#ifdef STAT
	struct stat_state stat;
#endif
};

/* The ioctl that a thread is inside. vcpu is 0 when it is inside none; for KVM_ENABLE_CAP it is the VM. */
struct in_ioctl {
	u64 vcpu;
	u64 argument;
	union {
		u64 events;	/* struct kvm_vcpu_events in kernel memory, while KVM fills or reads it */
		u64 closed;	/* tracepoint engine: the vCPU of which the thread has closed a descriptor since */
	};
	u32 cmd;
	u32 payload;		/* what user space passed to KVM_SET_VCPU_EVENTS, or, with saved, KVM_GET_VCPU_EVENTS gave */
	u16 told;		/* the restore was sent already */
	u16 saved;
	u32 fd;			/* the descriptor of its last ioctl of a vCPU, */
	u64 last_vcpu;		/* which led there */
	u64 last_ns;		/* when this thread last read its word, where the vCPU's own state was not told */
	u32 epoch;		/* as it was then */
	u32 pending;		/* a watched request was pending when it ended */
	u32 returning;		/* the end of its system call is awaited */
	u32 unused;		/* so that neighbours in the map share no line of the cache: 128 bytes with the map's own */
};

struct vm_state {
	u32 number;
	u32 pid;
	u32 vcpus;		/* so many of its vCPUs are traced: it is forgotten with the last one */
	u32 ends;		/* KVM destroys it: the next VM at this address is another one */
};

struct vcpu_loss {
	u64 count;
	u64 first_ns;
	u64 last_ns;
};

enum counter {
	COUNT_PRODUCED,		/* events made, in the ring or not */
	COUNT_RING_FULL,	/* events for which the ring had no room */
	COUNT_MAP_FULL,		/* vCPUs, threads or VMs that did not fit a map */
	COUNT_MISSED,		/* ioctls whose end was not seen */
	COUNT_BOUNDARIES,	/* readings at a boundary, sent or not */
	COUNT_GUEST,		/* events made where the guest was entered or left, or a vCPU stopped blocking */
	COUNT_KICKS,		/* kicks and requests of several vCPUs for which the ring had no room, or whose end was not seen */
	COUNT_ANSWERED,		/* vCPUs that the tracer asked, and that were seen for it */
	COUNT_FAR,		/* vCPUs that are not looked at where a request of several vCPUs has been raised */
	COUNTERS
};

/* By the time a thread enters an ioctl, has the end of its last one gone unseen? Each engine knows for its own hooks. */
static inline int end_unseen(struct in_ioctl *in);

BPF_RINGBUF_OUTPUT(ring, RING_PAGES);
BPF_HASH(vcpus, u64, struct vcpu_state, MAX_VCPUS);
BPF_HASH(threads, u64, struct in_ioctl, MAX_THREADS);
BPF_HASH(vms, u64, struct vm_state, MAX_VMS);	/* no LRU map: before 6.12 those drop live entries on many CPUs */
BPF_ARRAY(vms_full, u32, 1);		/* there was no room in it: what is not there may be traced all the same */
BPF_HASH(lost, u32, struct vcpu_loss, MAX_VCPUS);
BPF_HASH(filter, u32, u8, 1024);
BPF_PERCPU_ARRAY(counters, u64, COUNTERS);
BPF_PERCPU_ARRAY(numbers, u32, 1);
BPF_ARRAY(epoch, u32, 1);		/* counts vCPUs and descriptors that came or went, and changes of watched bits */

/* Not by its own name: for each call of bpf_probe_read_user() BCC looks the kernel's symbols through. */
static long (*read_user)(void *to, u32 size, const void *from) = (void *)BPF_FUNC_probe_read_user;

static inline u64 read_u64(u64 address)
{
	u64 value = 0;

	bpf_probe_read_kernel(&value, sizeof(value), (void *)address);
	return value;
}

static inline u32 read_u32(u64 address)
{
	u32 value = 0;

	bpf_probe_read_kernel(&value, sizeof(value), (void *)address);
	return value;
}

static inline u8 read_u8(u64 address)
{
	u8 value = 0;

	bpf_probe_read_kernel(&value, sizeof(value), (void *)address);
	return value;
}

static inline void count(u32 what)
{
	u64 *counter = counters.lookup(&what);

	if (counter)
		__sync_fetch_and_add(counter, 1);	/* per CPU, and yet: a program may be preempted by another one */
}

/* What a thread is known by: its task. On some CPUs every call of a helper is dear, and this one is needed anyway. */
static inline u64 this_thread(void)
{
#ifdef BPF_GET_CURRENT_TASK_BTF
	return (u64)bpf_get_current_task_btf();
#else
	return bpf_get_current_task();
#endif
}

static inline u32 current_epoch(void)
{
	u32 zero = 0, *now = epoch.lookup(&zero);

	return now ? *now : 0;
}

static inline void new_epoch(void)
{
	u32 zero = 0, *now = epoch.lookup(&zero);

	if (now)
		__sync_fetch_and_add(now, 1);
}

/*
 * A number that no other vCPU or VM of this recording has: every CPU hands out its own residue class. A program that
 * another one preempts between the two readings, and that adds as well, sees more than its own addition and tries again:
 * of those that have read the same number only the first to add can have it. An addition that gives what was there
 * before would do, but kernels before 5.12 have none: Linux commit 5ffa25502b5a ("bpf: Add instructions for
 * atomic_[cmp]xchg").
 */
static inline u32 new_number(void)
{
	u32 zero = 0, number;
	volatile u32 *next = numbers.lookup(&zero);

	if (!next)
		return 0;
	for (int i = 0; i < 8; i++) {
		number = *next;
		__sync_fetch_and_add(next, 1);
		if (*next == number + 1)
			return number * CPUS + bpf_get_smp_processor_id() + 1;
	}
	count(COUNT_MAP_FULL);		/* no number, no vCPU: every report says so */
	return 0;
}

static inline void lose(u32 number, u64 now)
{
	struct vcpu_loss first = { .first_ns = now };
	struct vcpu_loss *loss = lost.lookup_or_try_init(&number, &first);

	if (!loss) {
		number = 0;		/* always there: what cannot be told by vCPU concerns them all */
		loss = lost.lookup(&number);
		if (!loss)
			return;
	}
	__sync_fetch_and_add(&loss->count, 1);
	loss->last_ns = now;
}

/* User space has read what makes a save since the vCPU last ran, as far as forget_if_ran() has looked. */
static inline int is_saved(struct vcpu_state *state)
{
	return (state->read & SAVED_STATE) == SAVED_STATE;
}

/* Forget what was read and written of a vCPU that has run since. At no cost where it runs: KVM counts for itself. */
static inline void forget_if_ran(struct vcpu_state *state, u64 vcpu)
{
	u64 exits = read_u64(vcpu + OFFSET_EXITS);

	if (exits == state->exits)
		return;
	state->exits = exits;
	state->read = state->written = 0;
	state->still = 0;
}

/* Whether KVM has given the VM of a vCPU up, which is alive. */
static inline void notice_death(struct vcpu_state *state)
{
#if defined(OFFSET_VM_DEAD)
	if (read_u8(state->kvm + OFFSET_VM_DEAD))
		state->flags |= FLAG_DEAD;
#elif defined(OFFSET_VM_BUGGED)
	if (read_u8(state->kvm + OFFSET_VM_BUGGED))
		state->flags |= FLAG_DEAD;
#endif
}

/* What holds now. Only for a vCPU that is alive: this reads its memory and its VM's. */
static inline u8 live_flags(struct vcpu_state *state, u64 vcpu)
{
	u8 flags = state->flags;

#ifdef OFFSET_TRIPLE_FAULT_EVENT
	if (read_u8(state->kvm + OFFSET_TRIPLE_FAULT_EVENT))
		flags |= FLAG_CAP;
#endif
#if defined(OFFSET_GUEST_MODE)
	if (read_u64(vcpu + OFFSET_GUEST_MODE))
		flags |= FLAG_NESTED;
#elif defined(OFFSET_HFLAGS)
	if (read_u32(vcpu + OFFSET_HFLAGS) & HF_GUEST_MASK)
		flags |= FLAG_NESTED;
#endif
	if (state->read || state->still)
		forget_if_ran(state, vcpu);
	if (is_saved(state))
		flags |= FLAG_READ;
	if (state->still)
		flags |= FLAG_STILL;
	state->seen = flags;
	return flags;
}

struct reading {
	u64 now;
	u64 since;
	u64 word;
	u64 before;
};

static inline u32 payload(u64 events, int from_user, int *failed);

/*
 * Inside KVM_RUN, which begins with the events that user space left in kvm_run (kvm_dirty_regs, sync_regs): a triple
 * fault that is gone may have been cleared by those. Whether it was, their content tells as long as it cannot have been.
 */
static inline u8 perhaps_cleared(u64 vcpu, struct reading *reading)
{
	u32 events;
	int failed;

	if (!(reading->before & ~reading->word & (1ULL << TRIPLE_FAULT)))
		return 0;
	events = payload(read_u64(vcpu + OFFSET_RUN) + OFFSET_SYNC_EVENTS, 0, &failed);
	return !failed && events & VALID_TRIPLE_FAULT && !(events >> 16) ? FLAG_SYNC : 0;
}

/* Whom an event is about. */
struct subject {
	u32 vcpu;
	u32 seq;
	u32 pid;
};

/* Put one event into the ring. Returns whether that had room. */
static inline int put_event(struct subject *subject, struct reading *reading, u32 kind, u64 arg, u32 detail, u8 flags)
{
	struct event *event = ring.ringbuf_reserve(sizeof(*event));

	if (!event)
		return 0;
	event->time_ns = reading->now;
	event->since_ns = reading->since;
	event->requests = reading->word;
	event->before = reading->before;
	event->arg = arg;
	event->vcpu = subject->vcpu;
	event->seq = subject->seq;
	event->pid = subject->pid;
	event->tid = bpf_get_current_pid_tgid();
	event->detail = detail;
	event->cpu = bpf_get_smp_processor_id();
	event->kind = kind;
	event->flags = flags;
	ring.ringbuf_submit(event, BPF_RB_NO_WAKEUP);
	return 1;
}

/* Put one event of a whole VM or VMM into the ring, or count it as lost. */
static inline void send_vm(u64 now, u32 pid, u32 kind, u64 arg, u32 detail)
{
	struct subject subject = { .pid = pid };
	struct reading reading = { .now = now };

	count(COUNT_PRODUCED);
	if (put_event(&subject, &reading, kind, arg, detail, 0))
		return;
	count(COUNT_RING_FULL);
	lose(0, now);
}

/* The numbers of a vCPU's events come round: 1 follows the last one, for 0 is none. */
static inline u32 next_seq(struct vcpu_state *state)
{
	if (!++state->seq)
		state->seq = 1;
	return state->seq;
}

/* Put the next event of a vCPU into the ring, or count it as lost. Returns whether the ring had room. */
static inline int put_next(struct vcpu_state *state, struct reading *reading, u32 kind, u64 arg, u32 detail, u8 flags)
{
	struct subject subject = { .vcpu = state->number, .seq = next_seq(state), .pid = state->pid };

	if (put_event(&subject, reading, kind, arg, detail, flags))
		return 1;
	count(COUNT_RING_FULL);
	lose(state->number, reading->now);
	return 0;
}

static inline int put(struct vcpu_state *state, struct reading *reading, u32 kind, u64 arg, u32 detail, u8 flags)
{
	count(COUNT_PRODUCED);
	return put_next(state, reading, kind, arg, detail, flags);
}

/* The VCPU_NEW of a vCPU goes first, however often the ring was full: without it nobody knows whose the rest is. */
static inline void send(struct vcpu_state *state, struct reading *reading, u32 kind, u64 arg, u32 detail, u8 flags)
{
	/* As the word was before this reading: what changed since then is the event's own news. */
	struct reading first = { .now = reading->since, .since = 0, .word = reading->before, .before = 0 };

	if (!state->announced)
		state->announced = put(state, &first, KIND_VCPU_NEW, state->vcpu_id, state->vm, flags & ~FLAG_SYNC);
	put(state, reading, kind, arg, detail, flags);
}

static inline void take_reading(struct vcpu_state *state, u64 vcpu, struct reading *reading)
{
	reading->now = bpf_ktime_get_ns();
	reading->word = read_u64(vcpu + OFFSET_REQUESTS);
	reading->since = state->last_ns;
	reading->before = state->word;
	state->last_ns = reading->now;
	state->word = reading->word;
}

/*
 * Another thread is inside an ioctl of the vCPU: it has vcpu->mutex, for which this one will wait, or which it has given
 * back. What changes meanwhile is that one's doing, and its own boundaries tell it.
 */
static inline int another_is_inside(u64 vcpu)
{
#ifdef OFFSET_MUTEX_OWNER
	u64 owner = read_u64(vcpu + OFFSET_MUTEX_OWNER) & ~7ULL;	/* the low bits are the mutex's own */

	return owner && owner != this_thread();
#else
	return 0;
#endif
}

/* Read the word at a boundary. An event is sent if a watched bit changed, or `send_if` wants it. */
#define ALWAYS	(~0ULL)
static inline void boundary(struct vcpu_state *state, u64 vcpu, u32 kind, u64 arg, u32 detail, u64 send_if)
{
	struct reading reading = {};

	if (kind != KIND_RUN_EXIT && kind != KIND_SITE && kind != KIND_VCPU_END && another_is_inside(vcpu)) {
		reading.now = bpf_ktime_get_ns();
		reading.since = state->last_ns;
		reading.word = reading.before = state->word;
	} else {
		take_reading(state, vcpu, &reading);
	}
	count(COUNT_BOUNDARIES);
	if (OWN_ONLY && ((reading.word ^ reading.before) & WATCHED))
		new_epoch();		/* all that use it are left out otherwise */
	if (reading.word & DEAD)
		notice_death(state);	/* the bit alone does not tell: vendors' kernels have others there */
	if (FULL || send_if == ALWAYS || ((reading.word ^ reading.before) & WATCHED) || (reading.word & send_if))
		send(state, &reading, kind, arg, detail,
		     live_flags(state, vcpu) | (kind == KIND_RUN_EXIT ? perhaps_cleared(vcpu, &reading) : 0));
}

#define ROTATED(word, by)	((word) << (by) | (word) >> (64 - (by)))
#define SIPROUND(a, b, c, d)								\
	do {										\
		a += b; b = ROTATED(b, 13); b ^= a; a = ROTATED(a, 32);			\
		c += d; d = ROTATED(d, 16); d ^= c;					\
		a += d; d = ROTATED(d, 21); d ^= a;					\
		c += b; b = ROTATED(b, 17); b ^= c; c = ROTATED(c, 32);			\
	} while (0)

#define NR_REGS	17	/* RAX to R15, RIP: enum kvm_reg */

/*
 * A fingerprint of the general registers and CR3 (SipHash-1-3, https://www.aumasson.jp/siphash/siphash.pdf): it is the
 * same for a vCPU that is saved and for one that is restored from that, and tells nothing of them without the
 * recording's key.
 */
static inline u64 fingerprint(u64 vcpu)
{
	u64 regs[NR_REGS + 1] = {};
	u64 a = FINGERPRINT_KEY0 ^ 0x736f6d6570736575ULL, b = FINGERPRINT_KEY1 ^ 0x646f72616e646f6dULL;
	u64 c = FINGERPRINT_KEY0 ^ 0x6c7967656e657261ULL, d = FINGERPRINT_KEY1 ^ 0x7465646279746573ULL;

	if (bpf_probe_read_kernel(regs, NR_REGS * sizeof(u64), (void *)(vcpu + OFFSET_REGS)))
		return 0;
	regs[NR_REGS] = read_u64(vcpu + OFFSET_CR3);
#pragma unroll
	for (int i = 0; i <= NR_REGS; i++) {
		d ^= regs[i];
		SIPROUND(a, b, c, d);
		a ^= regs[i];
	}
	d ^= (u64)sizeof(regs) << 56;
	SIPROUND(a, b, c, d);
	a ^= (u64)sizeof(regs) << 56;
	c ^= 0xff;
	SIPROUND(a, b, c, d);
	SIPROUND(a, b, c, d);
	SIPROUND(a, b, c, d);
	return a ^ b ^ c ^ d;
}

/* The next time that it runs is told: its next KVM_RUN is not left out by the hot path. */
static inline void restored(struct vcpu_state *state, u64 vcpu)
{
	state->restored = read_u64(vcpu + OFFSET_EXITS) + 1;
	new_epoch();
}

/*
 * User space has read or written a part of a vCPU's state: told where what makes a save, or a restore, is complete, and
 * then at each change of it. KVM_GET_MSRS and KVM_SET_MSRS return how many they did.
 */
static inline void state_passed(struct vcpu_state *state, u64 vcpu, u32 cmd, int result)
{
	u32 read = state_read_by(cmd), written = state_written_by(cmd), known;
	u64 mark;

	if (cmd == KVM_SET_VCPU_EVENTS && result < 0)
		restored(state, vcpu);
	if (result < 0 || (((read | written) & STATE_MSRS) && !result) || !(read | written))
		return;
	forget_if_ran(state, vcpu);
	if (read) {
		known = state->read;
		state->read |= read;
		if (state->read == known || !is_saved(state))
			return;
		state->fingerprint = fingerprint(vcpu);
		boundary(state, vcpu, KIND_READ, state->fingerprint, state->read, ALWAYS);
	} else {
		state->written |= written;
		if (!(written & SAVED_STATE) || (state->written & RESTORED_STATE) != RESTORED_STATE)
			return;
		mark = fingerprint(vcpu);
		if (is_saved(state) && mark == state->fingerprint)
			return;			/* what was read is put back: it is what it was */
		state->read = 0;
		restored(state, vcpu);
		boundary(state, vcpu, KIND_WRITTEN, mark, state->written, ALWAYS);
	}
}

/* Whether a vCPU has run that was restored, or refused to be. */
static inline u32 ran_restored(struct vcpu_state *state, u64 vcpu)
{
	if (!state->restored || read_u64(vcpu + OFFSET_EXITS) + 1 == state->restored)
		return 0;
	state->restored = 0;
	return RAN;
}

/* Whether the user asked for this process; a process that the tracer looks up on its behalf counts as itself. */
static inline int asked_for(u32 pid)
{
	return !FILTER || filter.lookup(&pid);
}

/* The memory of the process that the current thread is one of. */
static inline u64 this_mm(void)
{
#ifdef BPF_GET_CURRENT_TASK_BTF
	return *(u64 *)((char *)bpf_get_current_task_btf() + OFFSET_MM);
#else
	return read_u64(bpf_get_current_task() + OFFSET_MM);
#endif
}

/*
 * The process that KVM knows a VM to be of: kvm_vcpu_ioctl() refuses all that have not kvm->mm. Not whoever is seen with
 * a descriptor of it, which may be a broker, a parent or a tracer. The owner of an mm is a part of CONFIG_MEMCG.
 */
static inline u32 owner_of(u64 kvm)
{
	u64 mm = read_u64(kvm + OFFSET_KVM_MM);

#ifdef OFFSET_OWNER
	u64 owner = mm ? read_u64(mm + OFFSET_OWNER) : 0;

	if (owner)
		return read_u32(owner + OFFSET_TGID);
#endif
#ifdef OFFSET_USERSPACE_PID
	if (mm != this_mm())
		return read_u32(kvm + OFFSET_USERSPACE_PID);	/* of the thread that created it */
#endif
	return bpf_get_current_pid_tgid() >> 32;
}

/* The number of the process that a VM is of, as events tell it. */
static inline u32 vmm_pid(u64 kvm);

static inline u32 vm_number(u64 kvm, u32 pid)
{
	struct vm_state *known = vms.lookup(&kvm), new = { .pid = pid };
	u32 zero = 0, yes = 1;

	if (known && known->pid == pid && !known->ends)
		return known->number;
	new.number = new_number();
	if (known ? !vms.update(&kvm, &new) : !vms.insert(&kvm, &new))
		return new.number;
	known = vms.lookup(&kvm);
	if (known)
		return known->number;		/* another CPU has met it at the same time */
	count(COUNT_MAP_FULL);
	vms_full.update(&zero, &yes);
	return new.number;
}

#if FULL && KICKS
static inline void forget_vcpus_of(u64 kvm);	/* probes/programs/kicks.c */
#endif

static inline void forget_vm(u64 kvm)
{
	vms.delete(&kvm);
#if FULL && KICKS
	forget_vcpus_of(kvm);
#endif
}

/* A vCPU has ended; so has what is kept of its VM with the last one. */
static inline void forget_vcpu(struct vcpu_state *state, u64 vcpu)
{
	u64 kvm = state->kvm;
	struct vm_state *vm = vms.lookup(&kvm);

	if (vm && vm->number == state->vm) {
		__sync_fetch_and_add(&vm->vcpus, -1);
		if (!vm->vcpus)
			forget_vm(kvm);
	}
	vcpus.delete(&vcpu);
}

/* Begin the story of a vCPU: at its creation, or where it is first seen. Of two CPUs that see it first one does. */
static inline struct vcpu_state *begin_vcpu(u64 vcpu, u8 flags)
{
	struct vcpu_state *state, new = {};
	struct vm_state *vm;
	struct reading reading = {};

	new.kvm = read_u64(vcpu + OFFSET_KVM);
	new.pid = vmm_pid(new.kvm);
	if (!asked_for(new.pid))
		return NULL;			/* not one of the processes that the user asked for */
	new_epoch();
	new.number = new_number();
	if (!new.number)
		return NULL;
	new.vm = vm_number(new.kvm, new.pid);
	new.vcpu_id = read_u32(vcpu + OFFSET_VCPU_ID);
	new.announced = 1;
	new.flags = flags;
	new.still = !(flags & FLAG_CREATED);
	new.exits = read_u64(vcpu + OFFSET_EXITS);
#ifdef OFFSET_TRIPLE_FAULT_EVENT
	new.flags |= FLAG_CAP_EXISTS;
#endif
	if (vcpus.insert(&vcpu, &new)) {
		state = vcpus.lookup(&vcpu);
		if (!state)
			count(COUNT_MAP_FULL);	/* this vCPU is not traced: every report says so */
		return state;
	}
	state = vcpus.lookup(&vcpu);
	if (!state)
		return NULL;
	vm = vms.lookup(&new.kvm);
	if (vm)
		__sync_fetch_and_add(&vm->vcpus, 1);
	take_reading(state, vcpu, &reading);
	reading.since = 0;
	reading.before = 0;
#ifdef STAT
	state->stat.word = reading.word;
#endif
	state->announced = put(state, &reading, KIND_VCPU_NEW, new.vcpu_id, new.vm, live_flags(state, vcpu));
	return state;
}

static inline void end_vcpu(struct vcpu_state *state, u64 vcpu, u32 how)
{
	new_epoch();
	notice_death(state);
	boundary(state, vcpu, KIND_VCPU_END, how, ran_restored(state, vcpu), ALWAYS);
	forget_vcpu(state, vcpu);
}

/* KVM created a vCPU: whatever was known at this address is over. */
static inline struct vcpu_state *created(u64 vcpu)
{
	struct vcpu_state *stale = vcpus.lookup(&vcpu);

	if (stale) {
		/* Its memory is another vCPU's by now, so the word is the last one that was read. */
		struct reading reading = {
			.now = bpf_ktime_get_ns(), .since = stale->last_ns, .word = stale->word, .before = stale->word,
		};

		send(stale, &reading, KIND_VCPU_END, END_REUSED, 0, stale->seen);
		forget_vcpu(stale, vcpu);
	}
	return begin_vcpu(vcpu, FLAG_CREATED);
}

/* struct kvm_vcpu_events, as user space passes it or as KVM holds it, in the form of the event's detail. */
static inline u32 payload(u64 events, int from_user, int *failed)
{
	u32 flags = 0;
	u8 pending = 0;

	if (from_user)
		*failed = read_user(&flags, sizeof(flags), (void *)(events + EVENTS_FLAGS)) ||
			  read_user(&pending, sizeof(pending), (void *)(events + EVENTS_PENDING));
	else
		*failed = bpf_probe_read_kernel(&flags, sizeof(flags), (void *)(events + EVENTS_FLAGS)) ||
			  bpf_probe_read_kernel(&pending, sizeof(pending), (void *)(events + EVENTS_PENDING));
	return (flags & 0xffff) | (pending ? 1 << 16 : 0);
}

/*
 * What KVM_GET_VCPU_EVENTS gave, where it cannot be read: KVM sets the flag exactly if the capability is enabled.
 * Linux commit ed2351174e38 ("KVM: x86: Extend KVM_{G,S}ET_VCPU_EVENTS to support pending triple fault") (in v6.0).
 */
static inline u32 payload_by_rule(struct vcpu_state *state, u64 vcpu)
{
	if (!(live_flags(state, vcpu) & FLAG_CAP))
		return 0;
	return VALID_TRIPLE_FAULT | (read_u64(vcpu + OFFSET_REQUESTS) & (1ULL << TRIPLE_FAULT) ? 1 << 16 : 0);
}

/* User space is about to write the registers of a guest in real mode: it resets the vCPU. */
static inline int resets(u64 vcpu, u32 cmd, u64 argument)
{
	u64 cr0 = X86_CR0_PE;

	if (cmd == KVM_SET_SREGS || cmd == KVM_SET_SREGS2)
		read_user(&cr0, sizeof(cr0), (void *)(argument + SREGS_CR0));
	else if (cmd == KVM_SET_REGS)
		bpf_probe_read_kernel(&cr0, sizeof(cr0), (void *)(vcpu + OFFSET_CR0));
	return !(cr0 & X86_CR0_PE);
}

/* What the hot path has read since is told to the vCPU's own state before that is used. */
static inline void tell_last(struct vcpu_state *state, u64 vcpu, struct in_ioctl *in)
{
	if (in->last_vcpu == vcpu && in->last_ns > state->last_ns)
		state->last_ns = in->last_ns;
}

/* The tracer counts the vCPUs that it asks, and so does the hook that sees them: what is missing was not seen. */
static inline void answer(u32 cmd)
{
	if (cmd == NO_IOCTL && bpf_get_current_pid_tgid() >> 32 == TRACER)
		count(COUNT_ANSWERED);
}

/* A thread enters an ioctl of a vCPU. */
static inline void enter_ioctl(struct vcpu_state *state, u64 vcpu, u32 fd, u32 cmd, u64 argument)
{
	u64 thread = this_thread();
	struct in_ioctl *known, new = {
		.vcpu = vcpu, .argument = argument, .cmd = cmd,
		.fd = fd, .last_vcpu = vcpu, .epoch = current_epoch(), .pending = (state->word & WATCHED) != 0,
	};
	u32 kind = cmd == KVM_RUN ? KIND_RUN_ENTER : KIND_IOCTL_ENTER;
	u64 send_if = 0;
	int failed;

	if (cmd == KVM_SET_VCPU_EVENTS)
		new.payload = payload(argument, 1, &failed);
	known = threads.lookup(&thread);
	if (known) {
		tell_last(state, vcpu, known);
		if (known->vcpu && end_unseen(known)) {
			/* A gap in that vCPU's events: whether it was saved, nobody knows. */
			struct vcpu_state *gap = vcpus.lookup(&known->vcpu);

			count(COUNT_MISSED);
			if (gap) {
				next_seq(gap);
				lose(gap->number, bpf_ktime_get_ns());
			}
		}
		new.returning = known->returning;
		*known = new;
	} else if (threads.update(&thread, &new)) {
		count(COUNT_MAP_FULL);
		return;
	}
	if ((state->word & WATCHED) && resets(vcpu, cmd, argument)) {
		kind = KIND_RESET;
		send_if = ALWAYS;
	} else if (cmd == KVM_RUN && is_saved(state)) {
		send_if = WATCHED;	/* what was raised since it was saved is not left out by that any more */
	}
	boundary(state, vcpu, kind, cmd, 0, send_if);
	answer(cmd);
}

static inline void leave(struct vcpu_state *state, struct in_ioctl *in)
{
	in->pending = (state->word & WATCHED) != 0;
}

/* Whether KVM cannot read the registers of this vCPU: then it leaves those of kvm_run as they are (store_regs). */
static inline int is_protected(u64 vcpu)
{
#ifdef OFFSET_STATE_PROTECTED
	return read_u8(vcpu + OFFSET_STATE_PROTECTED);
#else
	return 0;
#endif
}

/* KVM_RUN returns to user space. */
static inline void end_of_run(struct vcpu_state *state, u64 vcpu, u32 reason, int error)
{
	u32 ran = ran_restored(state, vcpu), type = 0;
	u64 send_if = ran || (reason == KVM_EXIT_SHUTDOWN && !error) ? ALWAYS : WATCHED;

#ifdef OFFSET_SYSTEM_EVENT
	if (reason == KVM_EXIT_SYSTEM_EVENT && !error) {
		type = read_u32(read_u64(vcpu + OFFSET_RUN) + OFFSET_SYSTEM_EVENT);
		send_if = ALWAYS;
	}
#endif
	if (error == -EIO) {
		notice_death(state);	/* vcpu_enter_guest took the request, and gives up */
		if (state->flags & FLAG_DEAD)
			send_if = ALWAYS;
	}
	boundary(state, vcpu, KIND_RUN_EXIT, reason | (u64)(u32)error << 32, type | ran, send_if);
	if (state->word & WATCHED && !is_protected(vcpu)) {
		/* A VMM that has its registers in kvm_run gets the events with them: that is a save, too. */
		u64 run = read_u64(vcpu + OFFSET_RUN);

		if (read_u64(run + OFFSET_VALID_REGS) & KVM_SYNC_X86_EVENTS) {
			struct reading reading = {};
			int failed;
			u32 saved = payload(run + OFFSET_SYNC_EVENTS, 0, &failed);

			take_reading(state, vcpu, &reading);
			send(state, &reading, KIND_SAVE, KVM_GET_VCPU_EVENTS, saved,
			     FLAG_SYNC | live_flags(state, vcpu));
		}
	}
}

/* Inside KVM, after a function that can explain a request: its thread's vCPU is read. */
static inline void after(u32 site, u64 send_if)
{
	u64 thread = this_thread();
	struct in_ioctl *in = threads.lookup(&thread);
	struct vcpu_state *state;
	u64 vcpu;

	if (!in || !in->vcpu)
		return;				/* attached while this thread was inside: the next boundary will tell */
	vcpu = in->vcpu;
	state = vcpus.lookup(&vcpu);
	if (state)
		boundary(state, vcpu, KIND_SITE, site, 0, send_if);
}

/* An ioctl other than KVM_RUN returns; `in` tells what the engine has seen inside it. */
static inline void end_of_ioctl(struct vcpu_state *state, u64 vcpu, struct in_ioctl *in, u32 cmd, u64 argument, int error)
{
	u32 kind = KIND_IOCTL_EXIT, detail = 0;
	u64 send_if = WATCHED;
	int failed;

	if (cmd == KVM_GET_VCPU_EVENTS) {
		kind = KIND_SAVE;
		send_if = ALWAYS;
		failed = 0;
		detail = in->saved ? in->payload : payload(argument, 1, &failed);
		if (failed)
			detail = payload_by_rule(state, vcpu);
		in->saved = 0;
	} else if (!in->told && cmd == KVM_SET_VCPU_EVENTS) {
		kind = KIND_RESTORE;
		send_if = ALWAYS;
		detail = in->payload;
	}
	/* KVM_GET_MSRS and its like return a number where they succeed. */
	boundary(state, vcpu, kind, cmd | (error < 0 ? (u64)(u32)error << 32 : 0), detail, send_if);
	state_passed(state, vcpu, cmd, error);
}

/* KVM_CAP_X86_TRIPLE_FAULT_EVENT was set on a VM. */
static inline void cap_set(u64 kvm)
{
#ifdef OFFSET_TRIPLE_FAULT_EVENT
	u32 pid = vmm_pid(kvm);

	if (!asked_for(pid))
		return;
	send_vm(bpf_ktime_get_ns(), pid, KIND_VM_CAP, read_u8(kvm + OFFSET_TRIPLE_FAULT_EVENT), vm_number(kvm, pid));
#endif
}

/*
 * The hot path of KVM_RUN's end: when this thread's last one ended nothing was pending, no vCPU or descriptor of one has
 * come or gone since, so this is the same vCPU; and nothing is pending now.
 */
static inline int nothing_happened(struct in_ioctl *in, u32 reason, int error)
{
	if (!in->last_vcpu || in->pending || in->epoch != current_epoch() || reason == KVM_EXIT_SHUTDOWN ||
	    reason == KVM_EXIT_SYSTEM_EVENT || error == -EIO)
		return 0;
	if (read_u64(in->last_vcpu + OFFSET_REQUESTS) & WATCHED)
		return 0;
	in->last_ns = bpf_ktime_get_ns();
	count(COUNT_BOUNDARIES);
	return 1;
}

/* KVM_RUN returns to user space; what its thread is known for from now on. */
static inline void run_returns(struct vcpu_state *state, u64 vcpu, struct in_ioctl *in, u32 reason, int error)
{
	tell_last(state, vcpu, in);
	end_of_run(state, vcpu, reason, error);
	in->last_vcpu = vcpu;
	in->epoch = current_epoch() - !!state->restored;	/* not left out before the guest has been entered */
	leave(state, in);
}
