"""docs/compatibility.md, written from results of the matrix: ``python3 -m tests.matrix.compatibility RESULTS...``.

What it says is kept as docs/compatibility.json beside it; without RESULTS the page is written anew from that.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.matrix import CHECKOUT, MatrixError
from tests.matrix.suite import ENGINES, SCHEMA
from tests.matrix.verdicts import CANNOT_RUN, DECLARED, EXACT, WRONG

PAGE = CHECKOUT / "docs/compatibility.md"
DATA = CHECKOUT / "docs/compatibility.json"

NOT_TRIED = "-"  # an engine that holds the module does not let it be loaded again

HEAD = """\
# Compatibility

Which engine is right on which kernel, as seen: every scenario of the lab (`kvmreq lab list`) and three of KVM's own
selftests were run on stock Debian kernels, in QEMU with emulated SVM, while each engine recorded every request. The
verdicts were then compared with what each scenario must give. `make matrix` does it again, `make matrix
KERNELS="6.1 7.3"` for some; `python -m tests.matrix.compatibility .cache/matrix/results/*.json` writes this page from
what that leaves.

- **exact**: every request that the scenario is about, its end, who raised it, its saves and exits, and every shutdown:
  as it must be, no doubt
- **declared**: the same, but for what the engine says that it cannot see (below)
- **wrong**: anything else
- **cannot run**: the kernel lacks what the scenario needs
- **-**: not tried
- **refused**: the engine does not work there, and says why (below)

No kernel headers were installed. Of every engine it was checked, too, whether a recording that ends, and one that is
killed (`kill -9`), leaves a BPF program, a probe or a tracing instance in the kernel; what did is named below.
"""


def condensed(results: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the page needs of results."""
    kernels = [
        {
            **{key: result[key] for key in ("series", "release", "version", "date")},
            "vendors": result.get("vendors", {}),
            "userspaces": {
                name: {
                    "bcc": boot["bcc"],
                    "engines": [_condensed(engine) for engine in boot["engines"]],
                    **{key: boot[key] for key in ("together", "full") if key in boot},
                }
                for name, boot in result["userspaces"].items()
                if "failed" not in boot
            },
        }
        for result in sorted(results, key=lambda result: [int(part) for part in re.findall(r"\d+", result["release"])])
    ]
    return {"schema": SCHEMA, "kernels": kernels}


def _condensed(engine: Mapping[str, Any]) -> dict[str, Any]:
    if engine["refused"] is not None:
        return {"engine": engine["engine"], "refused": engine["refused"]}
    return {
        "engine": engine["engine"],
        "unseen": [f"{line['fact']}: {line['unseen']}" for line in engine["unseen"]],
        "left_behind": [*engine["left_behind"], *engine["left_behind_by_kill"]],
        "results": {
            name: [one["result"], *one["reasons"]]
            for kind in ("scenarios", "witnesses")
            for name, one in engine[kind].items()
        },
    }


def page(data: Mapping[str, Any]) -> str:
    """Return the page."""
    parts = [HEAD, _overview(data["kernels"])]
    parts += [_of_kernel(kernel) for kernel in data["kernels"]]
    parts += [
        _left_behind(data["kernels"]),
        _unseen(data["kernels"]),
        _together(data["kernels"]),
        _vendors(data["kernels"]),
        _refused(data["kernels"]),
        _cannot_run(data["kernels"]),
    ]
    return "\n".join(part for part in parts if part)


def _columns(kernel: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return user space and engine of everything that was tried on a kernel, by engine."""
    tried = [(name, engine) for name, boot in kernel["userspaces"].items() for engine in boot["engines"]]
    return sorted(tried, key=lambda one: (ENGINES.index(one[1]["engine"]), one[0]))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _merged(cells: Mapping[str, str]) -> str:
    """Return one cell for several user spaces: once if they agree."""
    if len(set(cells.values())) == 1:
        return next(iter(cells.values()))
    return ", ".join(f"{cell} ({userspace})" for userspace, cell in cells.items())


def _by_engine(kernel: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Mapping[str, Any]]]]:
    for name in ENGINES:
        tried = {userspace: engine for userspace, engine in _columns(kernel) if engine["engine"] == name}
        if tried:
            yield name, tried


def _summary(engine: Mapping[str, Any]) -> str:
    if "refused" in engine:
        return "refused"
    ends = [result[0] for result in engine["results"].values()]
    words = [f"{ends.count(word)} {word}" for word in (EXACT, DECLARED, WRONG) if word in ends]
    return " + ".join(words)


def _overview(kernels: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for kernel in kernels:
        by_engine = dict(_by_engine(kernel))
        bcc = ", ".join(f"{name}: {boot['bcc']}" for name, boot in kernel["userspaces"].items())
        cells = [
            _merged({userspace: _summary(engine) for userspace, engine in by_engine[name].items()})
            if name in by_engine
            else "not tried"
            for name in ENGINES
        ]
        rows.append([kernel["release"], kernel["version"], kernel["date"], bcc, *cells])
    return "## Kernels\n\n" + _table(["kernel", "package", "seen on", "BCC", *ENGINES], rows)


def _of_kernel(kernel: Mapping[str, Any]) -> str:
    working = [
        (name, {userspace: engine for userspace, engine in tried.items() if "refused" not in engine})
        for name, tried in _by_engine(kernel)
    ]
    working = [(name, tried) for name, tried in working if tried]
    names = list(dict.fromkeys(name for _, tried in working for one in tried.values() for name in one["results"]))
    rows = [
        [
            name.replace("_", "\\_"),
            *(
                _merged({userspace: engine["results"].get(name, [NOT_TRIED])[0] for userspace, engine in tried.items()})
                for _, tried in working
            ),
        ]
        for name in names
    ]
    heads = [f"{name} ({', '.join(tried)})" for name, tried in working]
    return f"## {kernel['release']}\n\n" + _table(["scenario", *heads], rows)


def _grouped(said: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Return what was said, each with all those who said so."""
    groups: dict[str, list[str]] = {}
    for who, what in said:
        who_all = groups.setdefault(what, [])
        if who not in who_all:
            who_all.append(who)
    return groups


def _unseen(kernels: Sequence[Mapping[str, Any]]) -> str:
    parts = ["## What stays unseen\n", "From the plan that each recording carries.\n"]
    for name in ENGINES:
        said = [
            (kernel["series"], line)
            for kernel in kernels
            for _, engine in _columns(kernel)
            if engine["engine"] == name
            for line in engine.get("unseen", [])
        ]
        reasons = [
            (kernel["series"], f"declared in {scenario}: {reason}")
            for kernel in kernels
            for _, engine in _columns(kernel)
            if engine["engine"] == name
            for scenario, (result, *reasons) in engine.get("results", {}).items()
            if result == DECLARED
            for reason in reasons
        ]
        if said or reasons:
            parts.append(f"### {name}\n")
            parts.append(_list(_grouped([*said, *reasons])))
    return "\n".join(parts)


def _list(groups: Mapping[str, Sequence[str]]) -> str:
    return "".join(f"- {what} ({', '.join(who)})\n" for what, who in groups.items())


def _together(kernels: Sequence[Mapping[str, Any]]) -> str:
    boots = [
        (f"{kernel['series']} {userspace}", boot)
        for kernel in kernels
        for userspace, boot in kernel["userspaces"].items()
    ]
    said = [
        (
            where,
            f"{' and '.join(both['engines'])}: {both['scenarios']} scenarios, "
            + ("; ".join(both["differences"]) or f"the same {both['lifecycles']} lifecycles"),
        )
        for where, boot in boots
        if (both := boot.get("together"))
    ]
    # How often what happened differs from boot to boot: such numbers would make a line of its own for each.
    said += [
        (
            where,
            f"{' and '.join(full['engines'])} in detail full, beside tracefs: "
            + ("; ".join(full["differences"]) or "the same entries, exits and transitions of every request"),
        )
        for where, boot in boots
        if (full := boot.get("full"))
    ]
    return "## Two engines at the same time\n\n" + _list(_grouped(said)) if said else ""


def _vendors(kernels: Sequence[Mapping[str, Any]]) -> str:
    known = [kernel for kernel in kernels if kernel.get("vendors")]
    if not known:
        return ""
    parts = [
        "## Functions of the vendor modules\n",
        "By the files of each package: QEMU emulates no VMX, so what the plan hooks in kvm_intel was not run.\n"
        "`symbol`: kprobe and ftrace can hook it; `symbol and BTF`: fentry, too; `-`: none, or inlined.\n",
    ]
    for module in known[0]["vendors"]:
        rows = [(name, *(kernel["vendors"][module][name] for kernel in known)) for name in known[0]["vendors"][module]]
        parts.append(_table((module, *(kernel["series"] for kernel in known)), rows))
    return "\n".join(parts)


def _left_behind(kernels: Sequence[Mapping[str, Any]]) -> str:
    said = [
        (f"{kernel['series']} {userspace}", f"{engine['engine']}: {what}")
        for kernel in kernels
        for userspace, engine in _columns(kernel)
        for what in engine.get("left_behind", [])
    ]
    return "## Left behind\n\n" + _list(_grouped(said)) if said else ""


def _refused(kernels: Sequence[Mapping[str, Any]]) -> str:
    said = [
        (f"{kernel['series']} {userspace}", f"{engine['engine']}: {engine['refused']}")
        for kernel in kernels
        for userspace, engine in _columns(kernel)
        if "refused" in engine
    ]
    return "## Refused\n\n" + _list(_grouped(said)) if said else ""


def _cannot_run(kernels: Sequence[Mapping[str, Any]]) -> str:
    said = [
        (kernel["series"], f"{scenario}: {'; '.join(reasons)}")
        for kernel in kernels
        for _, engine in _columns(kernel)
        for scenario, (result, *reasons) in engine.get("results", {}).items()
        if result == CANNOT_RUN
    ]
    return "## Cannot run\n\n" + _list(_grouped(said)) if said else ""


def main(words: Sequence[str]) -> int:
    """Write the page, and what it is made from."""
    if words:
        results = [json.loads(Path(word).read_text()) for word in words]
        foreign = [word for word, result in zip(words, results, strict=True) if result.get("schema") != SCHEMA]
        if foreign:
            raise MatrixError(
                f"{', '.join(foreign)}: no results of this matrix; python -m tests.matrix.suite makes them"
            )
        DATA.write_text(json.dumps(condensed(results), indent=1) + "\n")
    PAGE.write_text(page(json.loads(DATA.read_text())))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (MatrixError, OSError) as error:
        sys.exit(str(error))
