/* BCC includes this first. */
#define CONFIG_BPF_SYSCALL 1
#define CONFIG_64BIT 1
#include <linux/types.h>
