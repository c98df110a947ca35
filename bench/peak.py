"""The peak of another process's memory: python -m bench.peak COMMAND... prints it in MiB, and the exit status.

A process of its own that imports next to nothing, for what the kernel tells of a child (ru_maxrss) begins with what the
process had in memory that started it.
"""

import os
import sys

if __name__ == "__main__":
    silent = os.open(os.devnull, os.O_WRONLY)
    child = os.posix_spawn(
        sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, silent, number) for number in (1, 2)]
    )
    _, status, used = os.wait4(child, 0)
    print(used.ru_maxrss / 1024, os.waitstatus_to_exitcode(status))
