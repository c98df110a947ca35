"""Names of the kernel's user-space interface, against the system's own header."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from probes.uapi import EXITS, IOCTLS


@pytest.mark.skipif(
    not shutil.which("gcc") or not Path("/usr/include/linux/kvm.h").exists(),
    reason="no gcc or no linux/kvm.h: apt install gcc linux-libc-dev",
)
def test_numbers_are_those_of_the_header(tmp_path: Path) -> None:
    """What an older header does not know yet is left out."""
    wanted = {f"KVM_{name}": number for number, name in IOCTLS.items()}
    wanted |= {f"KVM_EXIT_{name}": number for number, name in EXITS.items()}
    program = tmp_path / "numbers.c"
    program.write_text(
        "#include <stdio.h>\n#include <linux/kvm.h>\nint main(void) {\n"
        + "".join(f'#ifdef {name}\nprintf("{name} %u\\n", (unsigned int){name});\n#endif\n' for name in wanted)
        + "return 0; }\n"
    )
    subprocess.run(["gcc", "-o", tmp_path / "numbers", program], check=True)
    done = subprocess.run([tmp_path / "numbers"], check=True, capture_output=True, text=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    seen = {name: int(number) for name, number in lines}
    assert seen == {name: wanted[name] for name in seen}
    assert len(seen) > 0.9 * len(wanted)
