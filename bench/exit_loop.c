// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A guest that exits to user space as fast as it can: one OUT instruction in a loop.
 *
 *	exit_loop ROUNDS EXITS
 *
 * Prints, for each round, the nanoseconds of one KVM_RUN round trip (the mean over EXITS of them): as they
 * pass, and as this thread has a CPU, which does not depend on what else runs. The first line tells the pid, so that
 * a tracer can be pointed at it; a round begins when a line is read from standard input, so that untraced and traced
 * rounds can alternate in one process. The line can tell another number of exits for its round.
 */
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static double now(clockid_t clock)
{
	struct timespec time;

	clock_gettime(clock, &time);
	return time.tv_sec * 1e9 + time.tv_nsec;
}

static int checked(int result, const char *what)
{
	if (result < 0)
		fail(what);
	return result;
}

int main(int argc, char **argv)
{
	static const unsigned char code[] = { 0xe6, 0x10, 0xeb, 0xfc };	/* out %al, $0x10; jmp . - 2 */
	long rounds = argc > 1 ? atol(argv[1]) : 1, exits = argc > 2 ? atol(argv[2]) : 100000;
	int kvm = checked(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
	int vm = checked(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
	void *memory = mmap(NULL, 0x1000, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	struct kvm_userspace_memory_region slot = {
		.guest_phys_addr = 0x1000, .memory_size = 0x1000, .userspace_addr = (unsigned long)memory,
	};
	int vcpu, run_size;
	struct kvm_run *run;
	struct kvm_sregs sregs;
	struct kvm_regs regs = { .rip = 0x1000, .rflags = 2 };
	char line[16];

	if (memory == MAP_FAILED)
		fail("mmap");
	memcpy(memory, code, sizeof(code));
	checked(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot), "KVM_SET_USER_MEMORY_REGION");
	vcpu = checked(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
	run_size = checked(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
	run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	if (run == MAP_FAILED)
		fail("mmap of the vCPU");
	checked(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
	sregs.cs.base = 0;
	sregs.cs.selector = 0;
	checked(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
	checked(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");

	printf("%d\n", getpid());
	fflush(stdout);
	for (long round = 0; round < rounds && fgets(line, sizeof(line), stdin); round++) {
		long asked = atol(line), times = asked > 0 ? asked : exits;
		double wall = now(CLOCK_MONOTONIC), cpu = now(CLOCK_THREAD_CPUTIME_ID);

		for (long i = 0; i < times; i++) {
			checked(ioctl(vcpu, KVM_RUN, 0), "KVM_RUN");
			if (run->exit_reason != KVM_EXIT_IO) {
				fprintf(stderr, "exit reason %u instead of KVM_EXIT_IO\n", run->exit_reason);
				return 1;
			}
		}
		wall = now(CLOCK_MONOTONIC) - wall;
		cpu = now(CLOCK_THREAD_CPUTIME_ID) - cpu;
		printf("%.1f %.1f\n", wall / times, cpu / times);
		fflush(stdout);
	}
	return 0;
}
