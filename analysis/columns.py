"""What is known of a vCPU, of a VM, of a pending request and of a finished one: each column once, with what it means.

From these columns follow the records that the pass works on, the tables and docs/lifecycle.md. Inside there are small
integers only; words come with the finished table (analysis/lifecycle.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from probes.schema import NO_BIT


class Column(NamedTuple):
    """A column: its name, its type (``word``: one of some words, ``text``: a sentence), and what it holds."""

    name: str
    dtype: str
    meaning: str


#: A lifecycle that has ended, or is open at the end of the recording: a row for each request instance.
FINISHED = (
    Column("vm", "u4", "number of the VM in the recording"),
    Column("pid", "u4", "the VMM's process"),
    Column("vcpu", "u4", "KVM's vcpu_id"),
    Column("vcpu_number", "u4", "number of the vCPU in the recording"),
    Column("request", "word", "the kernel's name in lower case, without KVM_REQ_"),
    Column("raised_by", "word", "who raised it"),
    Column("raised_after_ns", "i8", "last seen without it, CLOCK_MONOTONIC; 0: at some time since boot"),
    Column("raised_ns", "i8", "first seen with it"),
    Column("end", "word", "what became of it"),
    Column("ended_after_ns", "i8", "last seen with it"),
    Column("ended_ns", "i8", "first seen without it; -1: it has not ended"),
    Column("userspace_exits", "i8", "returns of KVM_RUN to user space while it was pending"),
    Column("saves", "i8", "saves that carried it"),
    Column("blind_saves", "i8", "saves that did not"),
    Column(
        "copies_without", "bool", "one did not: whatever became of the original, a copy that is made of it has lost it"
    ),
    Column("nested", "bool", "the vCPU was in nested guest mode (L2) meanwhile"),
    Column("stale", "bool", "raised before a reset and delivered after it"),
    Column("exposed", "bool", "open, and the last save did not carry it"),
    Column("why", "text", "what a verdict hangs on that is undecided, or empty"),
    Column("raised_in", "word", "where the vCPU was when it was raised"),
    Column("requester_tid", "u4", "the thread that raised it; 0: not known"),
    Column("requester_cpu", "i4", "the CPU of that thread; -1: not known"),
    Column("kicked_ns", "i8", "the first kick of the vCPU for it that was seen (detail full); -1: none"),
    Column("left_guest_ns", "i8", "when the vCPU left the guest in which it was when it was raised; -1: it was not"),
    Column("reentered_ns", "i8", "when it entered the guest with the request serviced; -1: not seen"),
)

#: A guest that shut down, or died: KVM_EXIT_SHUTDOWN, or what analysis.words.SOURCES says.
SHUTDOWN = (
    Column("vm", "u4", "number of the VM in the recording"),
    Column("pid", "u4", "the VMM's process"),
    Column("vcpu", "u4", "KVM's vcpu_id"),
    Column("vcpu_number", "u4", "number of the vCPU in the recording"),
    Column("time_ns", "i8", "KVM_RUN returned, or vm_dead was first seen of this VM, CLOCK_MONOTONIC"),
    Column("source", "word", "request, hardware where no request made it, crash, sev_term, tdx_fatal or vm_dead"),
    Column("nested", "bool", "the vCPU was in nested guest mode (L2)"),
)

#: What concerns the copies of a guest: a save, what came after it, and where it was restored.
COPY = (
    Column("what", "i8", "an analysis.words.Copy"),
    Column("vm", "u4", "number of the VM in the recording"),
    Column("pid", "u4", "the VMM's process"),
    Column("vcpu", "u4", "KVM's vcpu_id"),
    Column("vcpu_number", "u4", "number of the vCPU in the recording"),
    Column("request", "i8", "bit; -1: it concerns the vCPU"),
    Column("pause", "i8", "how often the vCPU had run since it was first saved"),
    Column("after_ns", "i8", "the last reading before it, CLOCK_MONOTONIC"),
    Column("time_ns", "i8", "it was over"),
    Column("carried", "bool", "the request was saved"),
    Column("ran", "bool", "the vCPU ran after it"),
    Column("read", "i8", "what user space had read: set of probes.schema.STATES"),
    Column("errno", "i8", "of an ioctl that failed"),
    Column("fingerprint", "u8", "of the registers that were read, or written; 0: none"),
    Column("word", "u8", "the requests that were pending when it ran"),
)

# How many requests others only make with a kick (analysis/promises.py, KICKED), at most.
KICKABLE = 16

#: A vCPU that is alive.
VCPU = (
    Column("number", "i8", "unique in the recording"),
    Column("vm", "i8", "number of its VM, 0: not known"),
    Column("pid", "i8", "of its VMM"),
    Column("vcpu", "i8", "KVM's vcpu_id"),
    Column("seq", "i8", "number of its last event"),
    Column("gaps", "i8", "events that gaps in seq have told to be lost"),
    Column("word", "u8", "its requests at its last event"),
    Column("last_ns", "i8", "time of that"),
    Column("kind", "i8", "kind of that"),
    Column("flagged", "i8", "flags of that"),
    Column("saved", "bool", "user space has read what makes a save since it last ran"),
    Column("state", "i8", "and all that it has read: set of probes.schema.STATES"),
    Column("fingerprint", "u8", "of its registers then"),
    Column("ran", "bool", "KVM_RUN has returned since then"),
    Column("pause", "i8", "how often it has run since it was first saved"),
    Column("copies", "i8", "saves of its requests that were told in this pause"),
    Column("restored_ns", "i8", "its registers were written, and it has not run since; -1: they were not"),
    Column("refused_ns", "i8", "a restore of its triple fault failed, and it has not run since; -1: none did"),
    Column("refused", "i8", "with which error"),
    Column("restored", "u8", "fingerprint of what was written"),
    Column("seen", "bool", "an event of its own has come; else only a kick told of it"),
    Column("cut", "bool", "a part of the recording is missing since its last event"),
    Column("named", "bool", "a VCPU_NEW has told its VM and its id"),
    Column("dead", "bool", "KVM has given its VM up, and nobody knows which that is"),
    Column("pending", "i8", "its first pending request"),
    Column("kicks", "i8", "the first of what others did to it since its last event"),
    Column("asked", "u8", "requests that were made of its whole VM since then"),
    Column("of_vm", "i8", "place of its VM; -1: not known"),
    Column("next_of_vm", "i8", "the next vCPU of the same VM"),
    Column("before", "i8", "the vCPU that became known before, "),
    Column("after", "i8", "and after: all that are known are a list"),
    # For the rules of ordering.
    Column("slept_ns", "i8", "its last WAKEUP from a sleep"),
    Column("cases", "i8", "the first of its open cases"),
    Column("last_kick_ns", f"({KICKABLE},)i8", "the last kick for each request of KICKED; -1: none"),
    Column("staying", "bool", "a requester with WAIT returned since its last event, while it was in the guest"),
    Column("stay_begin_ns", "i8", "when that requester began"),
    Column("stay_ns", "i8", "when it returned"),
    Column("stay_request", "i8", "what it had asked for"),
    # For periods.
    Column("period_ns", "i8", "how far its own events have come; 0: there was none"),
    Column("doing", "i8", "what it can have been doing since the last one: a set of period_rules"),
    Column("outer", "i8", "the period that is open, place in PERIODS; 0: none"),
    Column("inner", "i8", "and the one inside it"),
    Column("why_left", "i8", "why it has left the guest just now: instruction set << 32 | reason; -1: it has not"),
    # For counts.
    Column("exits", "i8", "the first of its rows of EXIT; -1: none"),
    Column("changes", "i8", "its row of CHANGES; -1: none"),
    Column("guest_exit", "i8", "row of the exit from the guest that goes on; -1: none, or its end is uncertain"),
    Column("guest_exit_ns", "i8", "when that began"),
    Column("user_exit", "i8", "row of the exit to user space that goes on; -1: as there"),
    Column("user_exit_ns", "i8", "when that began"),
)

#: A VM, for as long as a vCPU of it is alive; with exposure for ever.
VM = (
    Column("number", "i8", "of the recording"),
    Column("pid", "i8", "of its VMM"),
    Column("members", "i8", "its first vCPU"),
    Column("alive", "i8", "how many are alive"),
    Column("told", "i8", "which VM it is of those that an event told of, from 1; 0: none has"),
    Column("first_ns", "i8", "when that was"),
    Column("vcpus", "i8", "how many vCPUs were seen"),
    Column("dead", "bool", "KVM has given it up"),
    Column("cap", "i8", "KVM_CAP_X86_TRIPLE_FAULT_EVENT is on: 1, off: 0, not known: -1"),
    Column("last_ask_ns", f"({KICKABLE},)i8", "when each request of KICKED was last being made of it; -1: never"),
)

#: A pending request is a lifecycle that goes on, and besides:
PENDING = (
    *FINISHED,
    Column("last_save", "i8", "NO_SAVE, CARRIED, BLIND or UNSURE"),
    Column("look", "i8", "what KVM_GET_VCPU_EVENTS gave of it, where no registers were read: as last_save"),
    Column("sync", "i8", "what kvm_run held of it when KVM_RUN last returned: as last_save"),
    Column("without", "bool", "registers were read, the events were not"),
    Column("left_out", "bool", "raised after the vCPU was saved, and that has not run since"),
    Column("still", "bool", "raised before the vCPU ran for the first time since tracing began"),
    Column("reset", "bool", "the vCPU was reset, or its registers were put back, meanwhile"),
    Column("set_in_pause", "bool", "KVM_SET_VCPU_EVENTS has set it since the vCPU last ran"),
    Column("set_since_reset", "bool", "KVM_SET_VCPU_EVENTS has set it since then"),
    Column("restored_without", "bool", "KVM_SET_VCPU_EVENTS without the flag since it was raised"),
    Column("missed", "bool", "hooks were missed while it was pending, of which no number tells"),
    Column("unseen", "bool", "its raise was not seen"),
    Column("cut", "bool", "a part of the recording is missing since it was raised"),
    Column("gap", "bool", "events of its vCPU were lost while it was pending"),
    Column("gap_lost", "i8", "how many; 0: two threads, whose order is not certain"),
    Column("gap_from", "i8", "the last event before the first gap"),
    Column("gap_to", "i8", "the first event after the last gap"),
)

#: What another thread did to a vCPU since its last own event: a kick, or a request made of all vCPUs of its VM.
KICK = (
    Column("request", "i8", "which it shows or makes"),
    Column("seen", "bool", "the word was read then: the request had been raised"),
    Column("time_ns", "i8", "CLOCK_MONOTONIC"),
    Column("tid", "i8", "whose"),
    Column("cpu", "i8", "where"),
)

#: A thread that makes a request of many vCPUs.
THREAD = (
    Column("tid", "i8", "which"),
    Column("begin_ns", "i8", "its REQUEST_ALL"),
    Column("vm", "i8", "of which VM"),
    Column("request", "i8", "for what"),
    Column("everyone", "bool", "of every vCPU"),
    Column("going", "bool", "it has not returned"),
)

#: What breaks a rule of ordering, or will unless somebody explains it in time: then it is a case.
BREAK = (
    Column("rule", "i8", "place in RULES"),
    Column("request", "i8", "bit"),
    Column("vm", "i8", "number of the VM; 0: not known"),
    Column("pid", "i8", "of the VMM"),
    Column("vcpu", "i8", "KVM's vcpu_id"),
    Column("vcpu_number", "i8", "of the vCPU"),
    Column("time_ns", "i8", "when it was seen"),
    Column("since_ns", "i8", "since when it was so"),
    Column("detail", "i8", "by rule: the kind before, what was served, when the guest was left, how a lifecycle ended"),
    Column("raised_in", "i8", "of a lifecycle that starved"),
    Column("named", "bool", "the VM is known"),
    Column("before", "i8", "the case that was opened before, "),
    Column("after", "i8", "and after: all that are open are a list"),
)

#: Where a period of a vCPU begins or ends.
EDGE = (
    Column("vcpu", "u4", "number of the vCPU in the recording"),
    Column("time_ns", "i8", "CLOCK_MONOTONIC"),
    Column("begins", "bool", "else it ends"),
    Column("period", "u1", "place in period_rules.PERIODS"),
    Column("left", "i8", "why the guest was left there: instruction set << 32 | reason; -1: it was not"),
    Column("over", "u1", "it ends with its vCPU: 1, with its process: 2, else 0"),
)

#: Exits of one vCPU for one reason: what probes.stat.KEY and VALUE hold, but for the buckets.
EXIT = (
    Column("vcpu", "i8", "number of the vCPU in the recording"),
    Column("kind", "i8", "a probes.exits.Kind"),
    Column("reason", "i8", "the kernel's number of it"),
    Column("variant", "i8", "from the guest: the instruction set or 0, as the event tells; to user space: the error"),
    Column("next", "i8", "the next row of the vCPU; -1: none"),
    Column("count", "i8", "exits that began"),
    Column("sum_ns", "i8", "how long those took that ended"),
    Column("max_ns", "i8", "the longest one"),
)

#: What came and went in the word of one vCPU, by bit: probes.stat.WORDS.
CHANGES = (
    Column("vcpu", "i8", "number of the vCPU in the recording"),
    Column("raised", "(64,)i8", "readings that found it newly set"),
    Column("serviced", "(64,)i8", "readings that found it gone"),
)

# Lists of what the walk gives out.
GIVEN = ("finished", "shutdowns", "breaks", "edges", "copies")

#: What there is once.
NOW = (
    Column("top_ns", "i8", "how far the stream has come"),
    Column("due_ns", "i8", "when the next open case is to be closed"),
    Column("dark_ns", "i8", "until here something that may explain a case was lost"),
    Column("interrupted", "bool", "a part of the recording was missing"),
    Column("blind", "bool", "hooks are missed, of which no number tells"),
    Column("last", "i8", "place of the vCPU whose event came last"),
    Column("told", "i8", "VMs that events told of"),
    Column("shown", "u8", "requests for which a kick was seen"),
    Column("free", "i8", "the first free place"),
    Column("top", "i8", "places that were ever in use"),
    Column("used", "i8", "places in use"),
    Column("indexed", "i8", "numbers in the index"),
    *(Column(name, "i8", "how many there are") for name in ("vcpus", "pending", "kicks", "cases")),
    *(Column(f"first_{name}", "i8", "of a list of all") for name in ("vcpu", "vm", "case", "thread")),
    *(Column(name, "i8", "the last one to be given out") for name in GIVEN),
    *(Column(f"many_{name}", "i8", "how many") for name in GIVEN),
    Column("checked", "(5,)i8", "by rule of ordering"),
    Column("undecided", "(5,)i8", "by rule of ordering"),
    Column("broken", f"(5,{NO_BIT + 1})i8", "by rule of ordering and request"),
    # For counts.
    Column("exits", "i8", "rows of EXIT in use"),
    Column("changes", "i8", "rows of CHANGES in use"),
    Column("guest_events", "i8", "entries into the guest and exits from it"),
    Column("user_events", "i8", "beginnings and ends of KVM_RUN"),
    Column("missing", "i8", "events that gaps in seq have told to be lost"),
)

#: What the walk is to find out.
WANTED = (
    Column("mask", "u8", "the requests that are watched"),
    Column("carrier", "(64,)i8", "by bit: what keeps it in a save, analysis.rules.carrier"),
    Column("reads", "bool", "events tell what user space reads of a vCPU: schema 3"),
    Column("full", "bool", "detail full: each reading of the word is an event"),
    Column("exposure", "bool", "VMs are told"),
    Column("periods", "bool", "what each vCPU is doing"),
    Column("counts", "bool", "exits and changes of the word are counted"),
    # For the rules of ordering.
    Column("order", "bool", "they are checked"),
    Column("starves", "bool", "the hooks that this rule needs are there"),
    Column("waits", "bool", "and those of this one"),
    Column("own", "u8", "requests of OWN"),
    Column("kicked", "u8", "requests of KICKED, where kicks are seen"),
    Column("bounded", "u8", "requests of either, for the rule on waiting"),
    Column("bound_ns", "i8", "how long one may wait"),
    Column("place", "(64,)i8", "by bit: place in last_kick_ns"),
    Column("takers", "u8", "requests for which KVM_RUN returns"),
    Column("reason", "(64,)u8", "by bit: with which exit reason"),
    Column("earlier", "(64,)u8", "by bit: what KVM looks for before"),
)


def _inside(column: Column) -> str:
    """Return the type that a column has while events are handled: words are numbers, and all numbers alike."""
    return column.dtype if column.dtype in ("bool", "u8") or column.dtype.startswith("(") else "i8"


def record(*kinds: tuple[Column, ...]) -> np.dtype[Any]:
    """Return the record that can hold each of some kinds of things: columns that no kind has together share a place.

    ``row.name`` reads and writes a column, compiled or not.
    """
    of: dict[str, tuple[np.dtype[Any], set[int]]] = {}
    for number, kind in enumerate(kinds):
        for column in kind:
            of.setdefault(column.name, (np.dtype(_inside(column)), set()))[1].add(number)
    taken: list[tuple[int, int, set[int]]] = []
    offsets = []
    for dtype, where in of.values():
        ends = [end for _, end, others in taken if others & where]
        offset = -(-max(ends, default=0) // dtype.alignment) * dtype.alignment
        taken.append((offset, offset + dtype.itemsize, where))
        offsets.append(offset)
    size = -(-max(end for _, end, _ in taken) // 8) * 8
    formats = [dtype for dtype, _ in of.values()]
    fields: Any = {"names": list(of), "formats": formats, "offsets": offsets, "itemsize": size}
    return np.dtype((np.record, np.dtype(fields)))


_LINK = (Column("next", "i8", "the next one of the list that it is in, or of the free places; -1: none"),)
#: A place of analysis.memory: whatever is carried over from event to event.
PLACE = record(*((*_LINK, *kind) for kind in (VCPU, VM, PENDING, KICK, THREAD, BREAK, SHUTDOWN, EDGE, COPY)))
ONCE, WISH = record(NOW), record(WANTED)
#: Rows of what is counted: they are never given out one by one.
EXITS, CHANGED = record(EXIT), record(CHANGES)

#: What is known of the events that are missing in a lifecycle.
GAPS = ("gap", "gap_lost", "gap_from", "gap_to", "cut", "unseen")
_ENDED = (*FINISHED, *(column for column in PENDING if column.name in GAPS))


def given(columns: Iterable[Column]) -> np.dtype[Any]:
    """Return the record of what the walk gives out: words are small numbers."""
    small = {"word": "i1", "text": "i1"}
    return np.dtype((np.record, [(column.name, small.get(column.dtype, column.dtype)) for column in columns]))


#: A lifecycle that has ended, a shutdown exit, a break of a rule, an edge and a copy, as the walk gives them out.
ENDED, SHUT, BROKEN, EDGES, COPIES = given(_ENDED), given(SHUTDOWN), given(BREAK), given(EDGE), given(COPY)


def page() -> str:
    """Return docs/lifecycle.md: what each column of a finished table holds."""
    lines = [
        "# Columns of lifecycles and of shutdown exits",
        "",
        "A row for each request instance, one for each guest that shut down or died. Times are CLOCK_MONOTONIC, ns.",
        "[proof.md](proof.md) tells what the words mean. Written by `python -m analysis.columns`.",
    ]
    for title, columns in (("Lifecycles", FINISHED), ("Shutdown exits", SHUTDOWN)):
        lines += ["", f"## {title}", "", "| column | type | holds |", "| --- | --- | --- |"]
        lines += [f"| {column.name} | {column.dtype} | {column.meaning} |" for column in columns]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
