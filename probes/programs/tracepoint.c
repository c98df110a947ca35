// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The tracepoint engine: raw system call tracepoints find the vCPU behind the file descriptor of an ioctl.
 *
 * KVM refuses ioctls of all but those that have the memory of the process that created the VM: kvm_vcpu_ioctl() compares
 * kvm->mm with current->mm, and nothing else (virt/kvm/kvm_main.c). So a vCPU has ended once nobody has that memory any
 * more, or once nothing refers to its struct file. Which tables of descriptors lead there does not matter: descriptors
 * travel through sockets, pidfd_getfd() and io_uring, and calls that close them fail.
 */

#define __NR_close		3
#define __NR_munmap		11
#define __NR_ioctl		16
#define __NR_dup2		33
#define __NR_dup3		292
#define __NR_close_range	436
#define PF_EXITING		4	/* task_struct.flags (include/linux/sched.h) */
#define KVM_CREATE_VM		0xae01
#define KVM_CREATE_VCPU		0xae41
#define KVMIO			0xae
#define TS_COMPAT		2	/* thread_info.status: in a system call of 32-bit code (asm/thread_info.h) */

#ifdef STAT
static inline void stat_run_on_fd(u32 fd);	/* probes/programs/stat.c: KVM_RUN begins */
#endif

static inline int end_unseen(struct in_ioctl *in)
{
	return in->cmd != KVM_ENABLE_CAP;	/* every ioctl that begins is seen to end */
}

/* A process with vCPUs, which is known by its memory. */
struct vmm_state {
	u64 mm;
	u32 pid;		/* what events call it */
	u32 not_alone;		/* another one has had the same number while this one lived */
};

struct arguments {			/* struct pt_regs from dx on: arguments 3, 2 and 1, and the number */
	u64 dx, si, di, orig_ax;
};

struct opened {				/* of a struct file */
	u64 f_op;
	u64 private_data;
};

BPF_HASH(vmms, u64, struct vmm_state, MAX_VMS);	/* by the numbers of their memory, memory_of() */
BPF_HASH(mms, u32, u64, MAX_VMS);	/* the latest of them that has this number */
BPF_ARRAY(looks, u32, 1);	/* counts what may have ended vCPUs: the tracer then has all of them looked at */
BPF_ARRAY(returns, u32, 1);	/* how many threads are inside system calls whose end matters: on_sys_exit() has work */
BPF_ARRAY(operations, u64, 2);		/* the file operations of a vCPU and of a VM, once seen */
#define OF_VCPU	0
#define OF_VM	1

/*
 * Where the kernel has the helpers for it, the verifier knows the types of the current task and of its registers from
 * BTF, so they are plain loads: a third of what calls would cost.
 */
#ifdef BPF_TASK_PT_REGS
/* Linux commit dd6e10fbd9fb ("bpf: Add bpf_task_pt_regs() helper") (in v5.15). */
static char *(*registers_of)(void *task) = (void *)175;	/* BPF_FUNC_task_pt_regs */
#endif

/*
 * Whether the system call that the current thread is inside is one of 32-bit code (int $0x80, sysenter): those have
 * other numbers and other registers. The plan says that they are not traced.
 */
static inline int of_32_bit_code(void)
{
#if defined(OFFSET_STATUS) && defined(BPF_GET_CURRENT_TASK_BTF)
	return *(u32 *)((char *)bpf_get_current_task_btf() + OFFSET_STATUS) & TS_COMPAT;
#elif defined(OFFSET_STATUS)
	return read_u32(bpf_get_current_task() + OFFSET_STATUS) & TS_COMPAT;
#else
	return 0;
#endif
}

/* What the system call was asked that the current thread is inside. */
static inline void arguments_of_syscall(struct arguments *arguments)
{
#ifdef BPF_TASK_PT_REGS
	char *registers = registers_of(bpf_get_current_task_btf());

	arguments->dx = *(u64 *)(registers + OFFSET_DX);
	arguments->si = *(u64 *)(registers + OFFSET_DX + 8);
	arguments->di = *(u64 *)(registers + OFFSET_DX + 16);
	arguments->orig_ax = *(u64 *)(registers + OFFSET_DX + 24);
#else
	/* They are at the end of its stack: kernels that put something behind them have the helper. */
	u64 stack = read_u64(bpf_get_current_task() + OFFSET_STACK);

	bpf_probe_read_kernel(arguments, sizeof(*arguments),
			      (void *)(stack + SIZE_STACK - SIZE_PT_REGS + OFFSET_DX));
#endif
}

static inline u64 descriptors(u32 *max)
{
#ifdef BPF_GET_CURRENT_TASK_BTF
	char *task = (char *)bpf_get_current_task_btf();
	char *files = *(char **)(task + OFFSET_FILES);
	char *fdt = *(char **)(files + OFFSET_FDT);

	if (max)
		*max = *(u32 *)(fdt + OFFSET_MAX_FDS);
	return *(u64 *)(fdt + OFFSET_FD);
#else
	u64 task = bpf_get_current_task();
	u64 files = read_u64(task + OFFSET_FILES);
	u64 fdt = read_u64(files + OFFSET_FDT);

	if (max)
		*max = read_u32(fdt + OFFSET_MAX_FDS);
	return read_u64(fdt + OFFSET_FD);
#endif
}

/* With one call where the two lie close together; what Linux 6.1 has between them, the stack has no room for. */
static inline int read_opened(struct opened *opened, u64 file)
{
#if OFFSET_PRIVATE_DATA <= 32
	u64 fields[OFFSET_PRIVATE_DATA / 8 + 1] = {};

	if (bpf_probe_read_kernel(fields, sizeof(fields), (void *)(file + OFFSET_F_OP)))
		return -1;
	opened->f_op = fields[0];
	opened->private_data = fields[OFFSET_PRIVATE_DATA / 8];
	return 0;
#else
	return bpf_probe_read_kernel(&opened->f_op, sizeof(opened->f_op), (void *)(file + OFFSET_F_OP)) ||
	       bpf_probe_read_kernel(&opened->private_data, sizeof(opened->private_data),
				     (void *)(file + OFFSET_F_OP + OFFSET_PRIVATE_DATA));
#endif
}

/* The vCPU or VM that a struct file leads to, or 0. */
static inline u64 behind(u64 file, u32 what)
{
	struct opened opened = {};
	u64 *known = operations.lookup(&what);

	if (!file || !known || read_opened(&opened, file))
		return 0;
	if (opened.f_op != *known || !*known) {
#if HIDDEN
		return 0;
#else
		if (read_u64(opened.f_op + OFFSET_UNLOCKED_IOCTL) != (what == OF_VCPU ? KVM_VCPU_IOCTL : KVM_VM_IOCTL))
			return 0;
		*known = opened.f_op;
#endif
	}
	return opened.private_data;
}

#if HIDDEN
/*
 * The kernel hides the addresses of KVM's functions (kernel.kptr_restrict), so the tracer shows a vCPU and a VM of its
 * own, by an ioctl that is none. Its argument is 1 + OF_VCPU or 1 + OF_VM. Returns whether this is one.
 */
static inline int learn(struct arguments *arguments)
{
	u32 what = arguments->dx - 1, fd = arguments->di, max = 0;
	u64 table = descriptors(&max), *known = operations.lookup(&what);
	struct opened opened = {};

	if (!known || bpf_get_current_pid_tgid() >> 32 != TRACER)
		return 0;
	if (fd < max && !read_opened(&opened, read_u64(table + 8 * (u64)fd)))
		*known = opened.f_op;
	return 1;
}
#endif

static inline u64 file_of(u32 fd)
{
	u32 max = 0;
	u64 table = descriptors(&max);

	return fd < max ? read_u64(table + 8 * (u64)fd) : 0;
}

static inline u64 behind_fd(u32 fd, u32 what)
{
	return behind(file_of(fd), what);
}

static inline u64 vcpu_behind_fd(u32 fd)
{
	u32 what = OF_VCPU;
	u64 *known = operations.lookup(&what);
	struct opened opened = {};
	u64 file = read_u64(descriptors(NULL) + 8 * (u64)fd);

	/* The hot path: KVM_RUN on a descriptor that is one, or the ioctl would not have got this far. */
	if (known && *known && !read_opened(&opened, file) && opened.f_op == *known)
		return opened.private_data;
	return behind_fd(fd, OF_VCPU);
}

/* The number of an mm_struct, which no other one has: addresses come round. */
static inline u64 memory_of(u64 mm)
{
	return mm ? read_u64(mm + OFFSET_CTX_ID) : 0;
}

static inline u32 vmm_pid(u64 kvm)
{
	u64 memory = memory_of(read_u64(kvm + OFFSET_KVM_MM));
	struct vmm_state *vmm = vmms.lookup(&memory);

	return vmm ? vmm->pid : owner_of(kvm);
}

/* Whether the current thread is one of a VMM, or of a process that shares the memory of one. */
static inline int inside_vmm(void)
{
	u64 memory = memory_of(this_mm());

	return vmms.lookup(&memory) != NULL;
}

/* A vCPU has been met: note how its end will be known. */
static inline void join_vmm(struct vcpu_state *state, u64 file)
{
	struct vmm_state new = { .mm = read_u64(state->kvm + OFFSET_KVM_MM), .pid = state->pid }, *another;
	u64 memory = memory_of(new.mm), *other;

	if (!vmms.lookup(&memory)) {
		other = mms.lookup(&new.pid);
		another = other ? vmms.lookup(other) : NULL;
		if (another)
			another->not_alone = new.not_alone = 1;	/* its memory has outlived its number */
		if (mms.update(&new.pid, &memory))
			count(COUNT_MAP_FULL);
		vmms.insert(&memory, &new);
		if (!vmms.lookup(&memory)) {
			count(COUNT_MAP_FULL);
			return;			/* its end will not be known */
		}
	}
	state->end.vmm = memory;
	state->end.file = file;		/* at last: from now on it is looked at */
}

/* The state of a vCPU; its story begins here where it is seen for the first time. */
static inline struct vcpu_state *state_behind_fd(u64 vcpu, u32 fd)
{
	struct vcpu_state *state = vcpus.lookup(&vcpu);

	if (state)
		return state;
	state = begin_vcpu(vcpu, 0);
	if (state)
		join_vmm(state, file_of(fd));
	return state;
}

#if FULL
/* The state of a vCPU that the current thread is inside KVM_RUN of. */
static inline struct vcpu_state *state_inside(u64 vcpu)
{
	struct arguments arguments = {};

	arguments_of_syscall(&arguments);
	if ((u32)arguments.si != KVM_RUN || arguments.orig_ax != __NR_ioctl)
		return NULL;			/* a 32-bit process: the plan says that it is not traced */
	return state_behind_fd(vcpu, arguments.di);
}
#endif

/* What is known of a thread, to be filled where it is new. */
static inline struct in_ioctl *known_of(u64 thread)
{
	struct in_ioctl *in = threads.lookup(&thread), new = {};

	if (in)
		return in;
	if (threads.update(&thread, &new))
		count(COUNT_MAP_FULL);
	return threads.lookup(&thread);
}

static inline void await_return(struct in_ioctl *in)
{
	u32 zero = 0, *number = returns.lookup(&zero);

	if (in->returning || !number)
		return;
	in->returning = 1;
	__sync_fetch_and_add(number, 1);
}

static inline void returned(struct in_ioctl *in)
{
	u32 zero = 0, *number = returns.lookup(&zero);

	if (!in->returning || !number)
		return;
	in->returning = 0;
	__sync_fetch_and_add(number, -1);
}

/* What cannot be proved now, or is not the only one: the tracer has all vCPUs looked at again (tracer/bpf.py). */
static inline void look_later(void)
{
	u32 zero = 0, *number = looks.lookup(&zero);

	if (number)
		__sync_fetch_and_add(number, 1);
}

/*
 * Whether something refers to the struct file of a vCPU. Memory that was one is another file's later, or another vCPU's
 * (SLAB_TYPESAFE_BY_RCU, or RCU alone before): so its content is asked, too.
 */
static inline int is_referred_to(u64 file, u64 vcpu)
{
	u32 what = OF_VCPU;
	u64 *known = operations.lookup(&what);
	struct opened opened = {};
#ifdef OFFSET_F_REF
	/*
	 * FILE_REF_ONEREF is 0, FILE_REF_RELEASED is the lowest value of a file that nobody has (include/linux/file_ref.h).
	 * Linux commit 90ee6ed776c0 ("fs: port files to file_ref") (in v6.13).
	 */
	int referred = read_u64(file + OFFSET_F_REF) < 0xC000000000000000ULL;
#else
	int referred = read_u64(file + OFFSET_F_COUNT) != 0;
#endif

	return referred && known && !read_opened(&opened, file) && opened.f_op == *known && opened.private_data == vcpu;
}

/*
 * A system call begins that may end a vCPU, which is alive: note how it is, for its memory may be gone when that has
 * succeeded. Linux commit 021a160abf62 ("fs: use __fput_sync in close(2)") (in v6.6).
 */
static inline void note_before_end(struct vcpu_state *state, u64 vcpu)
{
	state->end.ns = bpf_ktime_get_ns();
	state->end.word = read_u64(vcpu + OFFSET_REQUESTS);
	state->end.exits = read_u64(vcpu + OFFSET_EXITS);
	notice_death(state);
	live_flags(state, vcpu);
	state->closing = 1;
}

/* Nothing refers to a vCPU any more. Its memory may be anything, so it ends as it was last seen. */
static inline void end_unreadable(struct vcpu_state *state, u64 vcpu)
{
	struct reading reading = {
		.now = bpf_ktime_get_ns(), .since = state->last_ns, .word = state->word, .before = state->word,
	};
	u32 ran = 0;

	if (state->end.ns > state->last_ns) {
		reading.word = state->end.word;
		if (state->restored && state->end.exits + 1 != state->restored)
			ran = RAN;
	}
	new_epoch();
	send(state, &reading, KIND_VCPU_END, END_CLOSED, ran, state->seen);
	forget_vcpu(state, vcpu);
}

/* Whether anybody has this memory. Once nobody has, nobody ever will: only those that have it can pass it on. */
static inline int has_users(u64 mm, u64 memory)
{
	return read_u32(mm + OFFSET_MM_USERS) && memory_of(mm) == memory;
}

/* Look whether a vCPU has ended, and tell it. Returns whether it has, or is none. What is not proved is no end. */
static inline int has_ended(u64 vcpu)
{
	struct vcpu_state *state = vcpus.lookup(&vcpu);
	struct vmm_state *vmm;
	u64 memory;

	if (!state)
		return 1;
	if (!state->end.file)
		return 0;			/* another CPU is just meeting it */
	memory = state->end.vmm;
	vmm = vmms.lookup(&memory);
	if (!vmm) {
		forget_vcpu(state, vcpu);	/* it was told to have ended with its VMM */
		return 1;
	}
	if (!is_referred_to(state->end.file, vcpu)) {
		end_unreadable(state, vcpu);
		return 1;
	}
	if (has_users(vmm->mm, memory))
		return 0;
	end_vcpu(state, vcpu, END_EXITED);
	return 1;
}

/*
 * The thread that is inside an ioctl of a vCPU, whose descriptor may lead nowhere by its end, or to another one: what it
 * is inside of is noted, and that it looks whether that was the end.
 */
static inline void note_who_is_inside(u64 vcpu)
{
	u64 task = read_u64(vcpu + OFFSET_MUTEX_OWNER) & ~7ULL;	/* the low bits are the mutex's own */
	struct in_ioctl *in = task ? known_of(task) : NULL;

	if (!in || in->vcpu)
		return;
	in->cmd = KVM_RUN;
	in->vcpu = vcpu;
	await_return(in);
}

/* The current thread is about to close a descriptor. */
static inline void close_begins(u32 fd)
{
	u64 vcpu = behind_fd(fd, OF_VCPU);
	struct vcpu_state *state = vcpu ? vcpus.lookup(&vcpu) : NULL;
	struct in_ioctl *in;

	if (!state)
		return;
	in = known_of(this_thread());
	if (!in)
		return;				/* counted; the tracer looks at all of them now and then */
	new_epoch();
	note_before_end(state, vcpu);
	note_who_is_inside(vcpu);
	in->closed = vcpu;
	await_return(in);
}

/* What else may drop the last reference to a vCPU that the current thread has closed: its kvm_run is no longer mapped. */
static inline void munmap_begins(void)
{
	u64 thread = this_thread(), vcpu;
	struct in_ioctl *in = threads.lookup(&thread);
	struct vcpu_state *state;

	if (!in || !in->closed)
		return;
	vcpu = in->closed;
	state = vcpus.lookup(&vcpu);
	if (!state || !state->end.file || !is_referred_to(state->end.file, vcpu))
		return;
	note_before_end(state, vcpu);
	await_return(in);
}

/* A system call has ended in which the current thread may have ended a vCPU. */
static inline void look_after(struct in_ioctl *in, u32 number)
{
	u64 vcpu = in->closed;
	struct vcpu_state *state;

	if (number == __NR_close_range)
		look_later();
	if (!vcpu)
		return;
	if (has_ended(vcpu)) {
		in->closed = 0;
		return;
	}
	look_later();
	if (number != __NR_ioctl)
		return;				/* another thread may be inside an ioctl: it looks, too */
	in->closed = 0;
	state = vcpus.lookup(&vcpu);
	if (state)
		state->closing = 0;
}

/*
 * Nobody has the memory of a VMM any more: all its vCPUs have ended. What is kept of them goes when the tracer has them
 * looked at, or KVM uses their memory again.
 */
static inline void end_vmm(u64 memory, u32 how, int each_is_told)
{
	struct vmm_state *vmm = vmms.lookup(&memory);
	u64 *latest;
	u32 pid;

	if (!vmm)
		return;
	new_epoch();
	if (!each_is_told)
		look_later();
	if (vmm->not_alone && !each_is_told)
		return;				/* its number does not tell whose they are: each of them will be told */
	pid = vmm->pid;
	if (!vmm->not_alone)
		send_vm(bpf_ktime_get_ns(), pid, KIND_VMM_EXIT, how, 0);
	vmms.delete(&memory);
	latest = mms.lookup(&pid);
	if (latest && *latest == memory)
		mms.delete(&pid);
}

/* Where the kernel did not tell it. */
static inline void end_unused_vmm(u64 memory, u32 how, int each_is_told)
{
	struct vmm_state *vmm = vmms.lookup(&memory);

	if (vmm && !has_users(vmm->mm, memory))
		end_vmm(memory, how, each_is_told);
}

/* The tracer has something looked at: a vCPU, or, when all of those have been, a VMM by its memory. */
static inline void look_at(u64 what)
{
	if (vmms.lookup(&what))
		end_unused_vmm(what, END_EXITED, 1);
	else
		has_ended(what);
}

static inline void ioctl_begins(void)
{
	struct arguments arguments = {};
	struct vcpu_state *state;
	struct in_ioctl *in;
	u32 cmd, cap = 0;
	u64 of;

	arguments_of_syscall(&arguments);
	cmd = arguments.si;
#ifdef STAT
	if (cmd == KVM_RUN) {
		stat_run_on_fd(arguments.di);
		return;
	}
#endif
	if (cmd == LOOK) {
		look_at(arguments.dx);		/* anyone may ask for it: what is told is what is so */
		return;
	}
	/* A request that only the vCPU's own ioctls raise is as it was when the last one ended: nothing to read. */
	if ((cmd == KVM_RUN && OWN_ONLY) || ((cmd >> 8) & 0xff) != KVMIO || of_32_bit_code())
		return;
#if HIDDEN
	if (cmd == NO_IOCTL && learn(&arguments))
		return;
#endif
	if (cmd == KVM_CREATE_VM || cmd == KVM_CREATE_VCPU) {
		of = 0;
	} else if (cmd == KVM_ENABLE_CAP) {
		if (read_user(&cap, sizeof(cap), (void *)arguments.dx) || cap != KVM_CAP_X86_TRIPLE_FAULT_EVENT)
			return;
		of = behind_fd(arguments.di, OF_VM);
		if (!of)
			return;
	} else {
		of = vcpu_behind_fd(arguments.di);
		state = of ? state_behind_fd(of, arguments.di) : NULL;
		if (!state)
			return;
		enter_ioctl(state, of, arguments.di, cmd, arguments.dx);
	}
	in = known_of(this_thread());
	if (!in)
		return;
	in->vcpu = of;
	in->cmd = cmd;
	await_return(in);
}

static inline void vcpu_created(u32 fd)
{
	u64 vcpu = behind_fd(fd, OF_VCPU);
	struct vcpu_state *state = vcpu ? created(vcpu) : NULL;

	if (state)
		join_vmm(state, file_of(fd));
}

/* Raw tracepoint sys_enter (struct pt_regs *regs, long id). */
int on_sys_enter(struct bpf_raw_tracepoint_args *ctx)
{
	struct arguments arguments = {};
	u32 number = SYSCALL_NUMBER(ctx);
	struct in_ioctl *in;

	switch (number) {
	case __NR_ioctl:
		ioctl_begins();
		return 0;
	case __NR_close:
	case __NR_close_range:
	case __NR_dup2:
	case __NR_dup3:
	case __NR_munmap:
		break;
	default:
		return 0;
	}
	if (!inside_vmm() || of_32_bit_code())
		return 0;
	arguments_of_syscall(&arguments);
	switch (number) {
	case __NR_close:
		close_begins(arguments.di);
		return 0;
	case __NR_munmap:
		munmap_begins();
		return 0;
	case __NR_close_range:
		in = known_of(this_thread());
		if (in)
			await_return(in);
		return 0;
	default:
		close_begins(arguments.si);	/* dup2 closes what its target was, if it succeeds */
		return 0;
	}
}

static inline void ioctl_returns(struct in_ioctl *in, struct arguments *arguments, int result)
{
	u32 cmd = arguments->si;
	struct vcpu_state *state;
	u64 of = in->vcpu;

	in->vcpu = 0;
	switch (cmd) {
	case KVM_CREATE_VCPU:
		if (result >= 0)
			vcpu_created(result);
		return;
	case KVM_CREATE_VM:
		of = result >= 0 ? behind_fd(result, OF_VM) : 0;
		if (of)
			vms.delete(&of);	/* a new VM where another one was */
		return;
	case KVM_ENABLE_CAP:
		if (of && !result)
			cap_set(of);
		return;
	}
	/* Of KVM_RUN on_userspace_exit() has seen the end, unless KVM refused it before it ran. */
	state = of ? vcpus.lookup(&of) : NULL;
	if (!state)
		return;
	end_of_ioctl(state, of, in, cmd, arguments->dx, result);
	leave(state, in);
	if (state->closing)
		in->closed = of;
}

/* Raw tracepoint sys_exit (struct pt_regs *regs, long ret). */
int on_sys_exit(struct bpf_raw_tracepoint_args *ctx)
{
	struct arguments arguments = {};
	int result = SYSCALL_RESULT(ctx);
	u32 zero = 0, *awaited = returns.lookup(&zero);
	struct in_ioctl *in;
	u64 thread;

	if (!awaited || !*awaited)
		return 0;			/* the hot path, for every system call of the host */
	thread = this_thread();
	in = threads.lookup(&thread);
	if (!in || !in->returning)
		return 0;
	returned(in);
	arguments_of_syscall(&arguments);
	if (arguments.orig_ax == __NR_ioctl)
		ioctl_returns(in, &arguments, result);
	look_after(in, arguments.orig_ax);
	return 0;
}

/*
 * Raw tracepoint kvm:kvm_userspace_exit (u32 reason, int errno): right after KVM_RUN, in the same system call. It tells
 * no vCPU: the descriptor does.
 */
int on_userspace_exit(struct bpf_raw_tracepoint_args *ctx)
{
	u64 thread = this_thread();
	struct in_ioctl *in = threads.lookup(&thread);
	struct arguments arguments = {};
	u32 reason = EXIT_REASON(ctx), fd;
	struct vcpu_state *state;
	u64 vcpu;

	arguments_of_syscall(&arguments);
	if ((u32)arguments.si != KVM_RUN || arguments.orig_ax != __NR_ioctl)
		return 0;			/* a 32-bit process: the plan says that it is not traced */
	fd = arguments.di;
	if (OWN_ONLY && in && !in->vcpu && in->fd == fd && nothing_happened(in, reason, EXIT_ERRNO(ctx)))
		return 0;
	if (!asked_for(bpf_get_current_pid_tgid() >> 32) && !inside_vmm())
		return 0;
	if (in && in->vcpu) {
		vcpu = in->vcpu;
		in->vcpu = 0;
		state = vcpus.lookup(&vcpu);
	} else {
		vcpu = vcpu_behind_fd(fd);
		state = vcpu ? state_behind_fd(vcpu, fd) : NULL;
		in = state ? known_of(thread) : NULL;
	}
	if (!state || !in)
		return 0;
	run_returns(state, vcpu, in, reason, EXIT_ERRNO(ctx));
	in->fd = fd;
	if (state->closing) {
		in->closed = vcpu;
		await_return(in);
	}
	return 0;
}

/* Raw tracepoint exit_mmap (struct mm_struct *mm): nobody has it any more. Its last task may still have descriptors. */
int on_exit_mmap(struct bpf_raw_tracepoint_args *ctx)
{
	u64 memory = memory_of(ctx->args[0]);
	struct vmm_state *vmm = vmms.lookup(&memory);
	u32 pid = bpf_get_current_pid_tgid() >> 32, flags = read_u32(this_thread() + OFFSET_TASK_FLAGS);

	if (vmm)	/* the last to have it may also be a worker, or whoever reads /proc */
		end_vmm(memory, pid == vmm->pid && !(flags & PF_EXITING) ? END_EXECED : END_EXITED, 0);
	return 0;
}

/*
 * Raw tracepoint sched_process_exit (struct task_struct *task, ...): every thread, still with its descriptors. Kernels
 * without exit_mmap have let its memory go by then.
 */
int on_process_exit(struct bpf_raw_tracepoint_args *ctx)
{
	u32 pid = bpf_get_current_pid_tgid() >> 32;
	u64 thread = ctx->args[0], *memory = mms.lookup(&pid);
	struct in_ioctl *in = threads.lookup(&thread);

	if (in) {
		returned(in);
		threads.delete(&thread);
	}
	if (memory)
		end_unused_vmm(*memory, END_EXITED, 0);
	return 0;
}

/* Raw tracepoint sched_process_exec (struct task_struct *task, pid_t old_pid, ...): its memory was replaced. */
int on_process_exec(struct bpf_raw_tracepoint_args *ctx)
{
	u32 pid = bpf_get_current_pid_tgid() >> 32;
	u64 *memory = mms.lookup(&pid);

	if (memory)
		end_unused_vmm(*memory, END_EXECED, 0);
	return 0;
}
