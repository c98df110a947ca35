"""The event is written down once: the C that the probes compile, numpy and Arrow must agree on every byte."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from probes.schema import EVENT, FIELDS, End, Flag, Kind, Site, arrow_schema, c_constants, c_struct
from tracer.recording import from_arrow, to_arrow


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Return what a C compiler says: sizes, offsets and constants by name."""
    if not shutil.which("gcc"):
        pytest.skip("no gcc: apt install gcc")
    constants = [line.split()[1] for line in c_constants().splitlines()]
    shown = [
        ("sizeof", "sizeof(struct event)"),
        *((f"offset {field.name}", f"__builtin_offsetof(struct event, {field.name})") for field in FIELDS),
        *((f"size {field.name}", f"sizeof(((struct event *)0)->{field.name})") for field in FIELDS),
        *((name, name) for name in constants),
    ]
    types = "".join(f"typedef unsigned {c} u{bits};\n" for c, bits in (("char", 8), ("short", 16), ("int", 32)))
    directory: Path = tmp_path_factory.mktemp("c")
    source = directory / "event.c"
    source.write_text(
        "#include <stdio.h>\n"
        + types
        + "typedef unsigned long long u64;\n"
        + c_constants()
        + c_struct()
        + "int main(void) {\n"
        + "".join(f'printf("{name}=%llu\\n", (u64)({expression}));\n' for name, expression in shown)
        + "return 0; }\n"
    )
    program = directory / "event"
    subprocess.run(["gcc", "-Wall", "-Werror", "-o", program, source], check=True)
    printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in (line.split("=") for line in printed.splitlines())}


def test_c_and_numpy_agree_on_every_offset(compiled: dict[str, int]) -> None:
    """Also on the size: the ring is viewed as an array of these."""
    assert compiled["sizeof"] == EVENT.itemsize
    assert EVENT.fields is not None
    for field in FIELDS:
        dtype, offset = EVENT.fields[field.name][:2]
        assert (compiled[f"offset {field.name}"], compiled[f"size {field.name}"]) == (offset, dtype.itemsize), field


def test_no_byte_of_an_event_is_padding() -> None:
    """What the compiler would fill in could be kernel memory, and would be recorded."""
    assert sum(np.dtype(field.dtype).itemsize for field in FIELDS) == EVENT.itemsize
    assert EVENT.itemsize % 8 == 0


def test_c_knows_every_constant(compiled: dict[str, int]) -> None:
    """By the names that the programs use."""
    for enum in (Kind, Flag, End, Site):
        for member in enum:
            assert compiled[f"{enum.__name__.upper()}_{member.name}"] == member.value


def test_arrow_has_the_same_columns() -> None:
    """In the same order, with the same types, and each says what it holds."""
    schema = arrow_schema()
    assert schema.names == list(EVENT.names or ())
    for field, column in zip(FIELDS, schema, strict=True):
        assert column.type.to_pandas_dtype() == np.dtype(field.dtype).type
        assert not column.nullable
        assert column.metadata == {b"": field.meaning.encode()}


def test_events_survive_arrow() -> None:
    """Every bit of every field."""
    raw = np.random.default_rng(23).integers(0, 256, 1000 * EVENT.itemsize, dtype=np.uint8)
    events = raw.view(EVENT)
    assert from_arrow(to_arrow(events)).tobytes() == raw.tobytes()
