"""The house: which part may import which, and that no two modules need each other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
# Each may import those after it. The lab depends on nothing, and whoever plays scenarios may import it.
HOUSE = ("command", "reports", "analysis", "tracer", "probes")
PLAYERS = {"command", "tracer"}


def named(source: str, known: Iterable[str]) -> set[str]:
    """Return the modules, of those known, that a source imports, wherever in it that is."""
    known = set(known)
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= submodules & known or {node.module}
    return found & known


@pytest.fixture(scope="module")
def imports() -> Mapping[str, set[str]]:
    """What each module of the house imports of it."""
    paths = {
        f"{folder}.{path.stem}": path for folder in (*HOUSE, "lab") for path in sorted((CHECKOUT / folder).glob("*.py"))
    }
    return {name: named(path.read_text(), paths) for name, path in paths.items()}


def test_imports_are_found_wherever_they_are() -> None:
    """At the top, in a function, and of a module by its package."""
    source = "import a.b\nfrom a import c, no\ndef f():\n    from a.d import e\nfrom other import a\n"
    assert named(source, {"a.b", "a.c", "a.d", "a.e"}) == {"a.b", "a.c", "a.d"}


def test_no_modules_import_each_other(imports: Mapping[str, set[str]]) -> None:
    """Not even late: a circle cannot be understood one module at a time."""
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"c"}, "c": {"a"}}).prepare()
    TopologicalSorter(imports).prepare()
    assert sum(map(len, imports.values())) > 100


def test_arrows_point_down(imports: Mapping[str, set[str]]) -> None:
    """Reports may be changed without a thought to the tracer, and the tracer without one to reports."""
    wrong = []
    for name, needed in imports.items():
        part = name.partition(".")[0]
        allowed = {part} if part == "lab" else {*HOUSE[HOUSE.index(part) :], *({"lab"} if part in PLAYERS else ())}
        wrong += [f"{name} imports {other}" for other in sorted(needed) if other.partition(".")[0] not in allowed]
    assert wrong == []


def test_analysis_never_imports_bcc() -> None:
    """A recording is judged where nothing can be traced."""
    for folder in ("analysis", "reports"):
        for path in (CHECKOUT / folder).glob("*.py"):
            assert not named(path.read_text(), {"bcc"}), path
    assert named((CHECKOUT / "tracer/bpf.py").read_text(), {"bcc"}) == {"bcc"}


def test_every_c_program_says_its_licence() -> None:
    """That of the package; and the kernel takes programs that call what is for GPL programs alone."""
    licence = re.search(r"^license = (.*)$", (CHECKOUT / "setup.cfg").read_text(), re.MULTILINE)
    assert licence
    programs = [*(CHECKOUT / "probes/programs").glob("*.c"), *(CHECKOUT / "bench").glob("*.c")]
    assert len(programs) > 6
    for path in programs:
        assert path.read_text().splitlines()[0] == f"// SPDX-License-Identifier: {licence[1]}", path
    assert "Version 2, June 1991" in (CHECKOUT / "LICENSE").read_text()


def test_every_page_is_in_the_index_and_every_link_leads_somewhere() -> None:
    """Of the pages in docs, and of those that lead to them."""
    index = (CHECKOUT / "docs/README.md").read_text()
    pages = {path.name for path in (CHECKOUT / "docs").glob("*.md")} - {"README.md"}
    assert pages
    listed = re.findall(r"^\| \[[^]]*\]\(([^)]*)\) \| \S.* \|$", index, re.MULTILINE)
    assert sorted(listed) == sorted(pages)
    for path in (*CHECKOUT.glob("*.md"), *(CHECKOUT / "docs").glob("*.md")):
        links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text())
        assert [link for link in links if "://" not in link and not (path.parent / link).exists()] == [], path


def test_what_contributing_names_is_there() -> None:
    """A page that names files which are gone leads astray."""
    text = (CHECKOUT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`((?:command|reports|analysis|tracer|probes|lab|tests|bench|docs)/[\w./-]*)`", text)
    assert len(set(named)) > 20
    to_come = {"command/NAME.py"}
    assert [name for name in named if not (CHECKOUT / name).exists() and name not in to_come] == []
    makefile = (CHECKOUT / "Makefile").read_text()
    targets = set(re.findall(r"`make ([a-z]+)", text))
    assert targets > {"check", "test", "matrix"}
    assert [name for name in targets if f"\n{name}: " not in makefile] == []
