// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The tracepoint engine: raw system call tracepoints find the vCPU behind the file descriptor of an ioctl.
 *
 * KVM refuses ioctls of every process but the one that created the VM (Documentation/virt/kvm/api.rst, "File
 * descriptors"), so a vCPU has ended once no descriptor of that process leads to it.
 */

#define __NR_close		3
#define __NR_ioctl		16
#define __NR_dup		32
#define __NR_dup2		33
#define __NR_fcntl		72
#define __NR_dup3		292
#define __NR_close_range	436
#define F_DUPFD			0
#define F_DUPFD_CLOEXEC		1030
#define CLOSE_RANGE_CLOEXEC	4
#define KVM_CREATE_VM		0xae01
#define KVM_CREATE_VCPU		0xae41
#define KVMIO			0xae
#define TS_COMPAT		2	/* thread_info.status: in a system call of 32-bit code (asm/thread_info.h) */
#define CHUNK			64
#define MAX_CHUNKS		16

#ifdef STAT
static inline void stat_run_on_fd(u32 fd);	/* probes/programs/stat.c: KVM_RUN begins */
#endif

static inline int end_unseen(struct in_ioctl *in)
{
	return in->cmd != KVM_ENABLE_CAP;	/* every ioctl that begins is seen to end */
}

/* A process with vCPUs, and the descriptors between which those lie. */
struct vmm_state {
	u32 low;
	u32 high;
};

struct arguments {			/* struct pt_regs from dx on: arguments 3, 2 and 1, and the number */
	u64 dx, si, di, orig_ax;
};

struct opened {				/* of a struct file */
	u64 f_op;
	u64 private_data;
};

struct chunk {
	u64 file[CHUNK];
};

BPF_PERCPU_ARRAY(chunks, struct chunk, 1);
BPF_HASH(vmms, u32, struct vmm_state, MAX_VMS);
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

static inline u64 behind_fd(u32 fd, u32 what)
{
	u32 max = 0;
	u64 table = descriptors(&max);

	return fd < max ? behind(read_u64(table + 8 * (u64)fd), what) : 0;
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

static inline void widen(u32 pid, u32 fd)
{
	struct vmm_state *vmm = vmms.lookup(&pid), new = { .low = fd, .high = fd };

	new_epoch();
	if (!vmm) {
		if (vmms.update(&pid, &new))
			count(COUNT_MAP_FULL);
		return;
	}
	if (fd < vmm->low)
		vmm->low = fd;
	if (fd > vmm->high)
		vmm->high = fd;
}

/* The state of a vCPU; its story begins here where it is seen for the first time. */
static inline struct vcpu_state *state_behind_fd(u64 vcpu, u32 fd)
{
	struct vcpu_state *state = vcpus.lookup(&vcpu);
	u32 pid = bpf_get_current_pid_tgid() >> 32;

	if (state)
		return state;
	if (pid != TRACER)		/* the tracer's own descriptors end nothing */
		widen(pid, fd);
	return begin_vcpu(vcpu, 0);
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

/*
 * Whether another descriptor of this process than fd leads to the same file.
 *
 * Chunks are read at multiples of their length, as tables are allotted (alloc_fdtable() in fs/file.c: a multiple of
 * BITS_PER_LONG). What lies behind a table is another one, with files that were there before, at addresses in use again.
 */
static inline int duplicated(u64 table, u32 max, u64 file, u32 fd, struct vmm_state *vmm)
{
	u32 zero = 0, low = vmm->low & ~(CHUNK - 1), high = vmm->high;
	struct chunk *chunk = chunks.lookup(&zero);

	if (!chunk || high - low >= CHUNK * MAX_CHUNKS)
		return 1;		/* too many to look through: the end of the process will tell */
	for (u32 i = 0; i < MAX_CHUNKS; i++) {
		if (low + i * CHUNK > high || low + i * CHUNK >= max)
			break;
		if (bpf_probe_read_kernel(chunk, sizeof(*chunk), (void *)(table + 8 * (u64)(low + i * CHUNK))))
			return 1;
		for (u32 j = 0; j < CHUNK; j++)
			if (chunk->file[j] == file && low + i * CHUNK + j != fd)
				return 1;
	}
	return 0;
}

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

/*
 * The last descriptor of a vCPU is closed while a task is inside an ioctl of it: that ends first. What the task is inside
 * of is noted, for its descriptor leads nowhere any more, or to another vCPU.
 */
static inline void end_after_ioctl(struct vcpu_state *state, u64 vcpu, u64 task)
{
	struct in_ioctl *in = known_of(task);

	state->closing = 1;
	if (!in)
		return;
	if (!in->vcpu) {
		in->cmd = KVM_RUN;
		in->vcpu = vcpu;
	}
	await_return(in);
}

/* A descriptor is about to be closed: its vCPU ends, unless another descriptor leads to it. */
static inline void close_one(u32 pid, u32 fd)
{
	struct vmm_state *vmm = vmms.lookup(&pid);
	struct vcpu_state *state;
	u32 max = 0;
	u64 table, file, vcpu, owner;

	if (!vmm || fd < vmm->low || fd > vmm->high)
		return;
	table = descriptors(&max);
	if (fd >= max)
		return;
	file = read_u64(table + 8 * (u64)fd);
	vcpu = behind(file, OF_VCPU);
	if (!vcpu)
		return;
	state = vcpus.lookup(&vcpu);
	if (!state || state->pid != pid || duplicated(table, max, file, fd, vmm))
		return;
	new_epoch();
	owner = read_u64(vcpu + OFFSET_MUTEX_OWNER);
	if (owner)
		end_after_ioctl(state, vcpu, owner & ~7ULL);	/* the low bits are the mutex's own */
	else
		end_vcpu(state, vcpu, END_CLOSED);
}

/* All vCPUs of a process end. What is kept of them goes when KVM uses their memory again, or the tracer sweeps. */
static inline void end_vmm(u32 pid, u32 how)
{
	new_epoch();
	send_vm(bpf_ktime_get_ns(), pid, KIND_VMM_EXIT, how, 0);
	vmms.delete(&pid);
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
	u32 pid = bpf_get_current_pid_tgid() >> 32;
	u64 vcpu = behind_fd(fd, OF_VCPU);

	if (!vcpu)
		return;
	created(vcpu);
	widen(pid, fd);
}

/* Raw tracepoint sys_enter (struct pt_regs *regs, long id). */
int on_sys_enter(struct bpf_raw_tracepoint_args *ctx)
{
	struct arguments arguments = {};
	u32 pid, number = SYSCALL_NUMBER(ctx);
	struct vmm_state *vmm;
	struct in_ioctl *in;

	switch (number) {
	case __NR_ioctl:
		ioctl_begins();
		return 0;
	case __NR_close:
	case __NR_close_range:
	case __NR_dup:
	case __NR_dup2:
	case __NR_dup3:
	case __NR_fcntl:
		break;
	default:
		return 0;
	}
	pid = bpf_get_current_pid_tgid() >> 32;
	vmm = vmms.lookup(&pid);
	if (!vmm || of_32_bit_code())
		return 0;
	arguments_of_syscall(&arguments);
	if (number == __NR_close_range) {
		/* Of a part of them, the end of the process will tell. */
		if (!(arguments.dx & CLOSE_RANGE_CLOEXEC) && (u32)arguments.di <= vmm->low &&
		    (u32)arguments.si >= vmm->high)
			end_vmm(pid, END_CLOSED);
		return 0;
	}
	if (number == __NR_close) {
		close_one(pid, arguments.di);
		return 0;
	}
	if (number == __NR_fcntl && (u32)arguments.si != F_DUPFD && (u32)arguments.si != F_DUPFD_CLOEXEC)
		return 0;
	in = known_of(this_thread());
	if (in)
		await_return(in);
	/* dup2 closes what its target was. */
	if ((number == __NR_dup2 || number == __NR_dup3) && (u32)arguments.si != (u32)arguments.di)
		close_one(pid, arguments.si);
	return 0;
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
	leave(state, of, in);
}

/* Raw tracepoint sys_exit (struct pt_regs *regs, long ret). */
int on_sys_exit(struct bpf_raw_tracepoint_args *ctx)
{
	struct arguments arguments = {};
	int result = SYSCALL_RESULT(ctx);
	u32 pid, zero = 0, *awaited = returns.lookup(&zero);
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
	if (arguments.orig_ax == __NR_ioctl) {
		ioctl_returns(in, &arguments, result);
		return 0;
	}
	pid = bpf_get_current_pid_tgid() >> 32;
	if (result >= 0 && vmms.lookup(&pid) && behind_fd(result, OF_VCPU))
		widen(pid, result);
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
	if (!asked_for(bpf_get_current_pid_tgid() >> 32))
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
	return 0;
}

/* Raw tracepoint sched_process_exit (struct task_struct *task, ...): every thread, still with its descriptors. */
int on_process_exit(struct bpf_raw_tracepoint_args *ctx)
{
	u64 signal = read_u64(ctx->args[0] + OFFSET_SIGNAL);
	u32 pid = bpf_get_current_pid_tgid() >> 32;
	u64 thread = ctx->args[0];
	struct in_ioctl *in = threads.lookup(&thread);

	if (in) {
		returned(in);
		threads.delete(&thread);
	}
	if (!vmms.lookup(&pid) || read_u32(signal + OFFSET_LIVE))
		return 0;				/* no VMM, or not its last thread */
	end_vmm(pid, END_EXITED);
	return 0;
}

/* Raw tracepoint sched_process_exec (struct task_struct *task, pid_t old_pid, ...): its memory was replaced. */
int on_process_exec(struct bpf_raw_tracepoint_args *ctx)
{
	u32 pid = bpf_get_current_pid_tgid() >> 32;

	if (vmms.lookup(&pid))
		end_vmm(pid, END_EXECED);
	return 0;
}
