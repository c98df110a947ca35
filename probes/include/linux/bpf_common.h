/* Named by BCC's uapi copy of bpf.h, which uses nothing of it. */
