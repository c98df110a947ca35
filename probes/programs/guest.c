// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Where the guest is entered and left, for the file in front: guest_entered() and guest_left() are its own.
 *
 * The tracer puts in front of all the offsets of what holds the exit reason, where BTF has them, and UNREADABLE.
 */

static inline u32 reason_of_exit(u64 vcpu, u32 isa)
{
#ifdef OFFSET_VMX_REASON
	if (isa == ISA_VMX)
		return read_u32(vcpu + OFFSET_VMX_REASON);
#endif
#ifdef OFFSET_SVM_VMCB
	if (isa == ISA_SVM)
		return read_u32(read_u64(vcpu + OFFSET_SVM_VMCB) + OFFSET_SVM_REASON);
#endif
	return UNREADABLE;
}

/* Raw tracepoint kvm:kvm_exit (u32 exit_reason, struct kvm_vcpu *vcpu, u32 isa), on older kernels. */
int on_guest_exit_with_reason(struct bpf_raw_tracepoint_args *ctx)
{
	guest_left(ctx->args[1], ctx->args[2], ctx->args[0]);
	return 0;
}

/*
 * Raw tracepoint kvm:kvm_exit (struct kvm_vcpu *vcpu, u32 isa): Linux commit 0a62a0319abb
 * ("KVM: x86: Get exit_reason as part of kvm_x86_ops.get_exit_info") (in v5.16).
 */
int on_guest_exit(struct bpf_raw_tracepoint_args *ctx)
{
	u64 vcpu = ctx->args[0];
	u32 isa = ctx->args[1];

	guest_left(vcpu, isa, reason_of_exit(vcpu, isa));
	return 0;
}

/* Raw tracepoint kvm:kvm_entry (struct kvm_vcpu *vcpu, ...) */
int on_guest_entry(struct bpf_raw_tracepoint_args *ctx)
{
	guest_entered(ctx->args[0]);
	return 0;
}
