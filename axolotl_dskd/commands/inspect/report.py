"""What `inspect` found, as plain data, and the same in words: sections of lines, tables and
examples, once for the terminal and the page.

Knows what there is to say and in which order; nothing of how it is found or drawn.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from axolotl_dskd.commands.inspect.examples import Example
from axolotl_dskd.commands.inspect.sides import SideFacts
from axolotl_dskd.commands.sample import Sample
from axolotl_dskd.commands.words import gib
from axolotl_dskd.data.outcomes import KEPT, MEANING
from axolotl_dskd.planning.plan import Plan

#: Of a gauge, in characters.
_WIDTH = 30


@dataclass(frozen=True)
class Report:
    """Everything that `inspect` found."""

    config: str
    student: SideFacts
    teacher: SideFacts
    shared_tokens: int
    objective: str
    advice: str | None
    coverage: Sample
    datasets: Sequence[Sample]
    examples: Sequence[Example]
    memory: Plan
    remarks: Sequence[str]

    def as_json(self) -> str:
        """For `--json`, with the derived numbers."""
        return json.dumps(self, default=_with_derived, ensure_ascii=False, indent=1) + "\n"


def _with_derived(found: Any) -> dict[str, Any]:
    shown = [field.name for field in fields(found) if field.repr]  # no rows
    derived = [name for name, kind in vars(type(found)).items() if isinstance(kind, property)]
    return {name: getattr(found, name) for name in shown + derived}


class Line(NamedTuple):
    """A sentence, of which `tone` says how it is meant: "", "soft", "good" or "bad"."""

    words: str
    tone: str = ""


class Table(NamedTuple):
    """Rows of cells. `numeric`: whether all columns but the first are read as numbers."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: bool = True


def sections(report: Report) -> dict[str, Sequence[Line | Table | Example]]:
    """All of it by title. Where there is no room for all examples, the first one shows most."""
    found: dict[str, Sequence[Line | Table | Example]] = {
        "The pair": [*_pair(report)],
        "Your rows": [*_rows(report)],
        "Both tokenizers on your text": report.examples,
        "Memory plan": [*_memory(report.memory)],
        "Remarks": [Line(remark) for remark in report.remarks],
    }
    return {title: blocks for title, blocks in found.items() if blocks}


def _pair(report: Report) -> Iterator[Line | Table]:
    student, teacher = report.student, report.teacher
    facts = [(label, text, teacher.table[label]) for label, text in student.table.items()]
    yield Table(("", "student", "teacher"), facts, numeric=False)
    ours, theirs = (report.shared_tokens / side.vocabulary for side in (student, teacher))
    yield Line(
        f"{report.shared_tokens:,} tokens stand for the same bytes in both vocabularies: "
        f"{ours:.0%} of the student's and {theirs:.0%} of the teacher's."
    )
    yield Line(f"Objective: {report.objective}.")
    if report.advice:
        yield Line(f"Recommended: {report.advice}.")


def _rows(report: Report) -> Iterator[Line | Table]:
    parts = [*report.datasets, report.coverage] if len(report.datasets) > 1 else report.datasets
    columns = "dataset", "sampled", "kept", "student tokens", "teacher tokens", "exactly aligned"
    rows = [
        (
            part.name,
            f"{part.sampled:,} of {part.total:,}",
            *(f"{n:,}" for n in (part.kept, part.student_tokens, part.teacher_tokens)),
            f"{part.share:.1%}",
        )
        for part in parts
    ]
    yield Table(columns, rows)
    for part in report.datasets:
        for outcome, count in part.outcomes.items():
            if count and outcome != KEPT:
                yield Line(f"{part.name}: {count:,} {MEANING[outcome]}")


def _memory(memory: Plan) -> Iterator[Line | Table]:
    total, card = gib(memory.total), gib(memory.card)
    parts = {**memory.at_peak, "total": memory.total}
    yield Table(
        ("at the fullest moment", "", f"of {card}"),
        [(name, gib(size), _gauge(size / memory.card)) for name, size in parts.items()],
    )
    yield Line(
        f"Planned for {memory.card_name}. Fullest in: {memory.peak_phase}. "
        f"Largest batch: {memory.batch}.",
        "soft",
    )
    phases = (f"{name} {gib(size)}" for name, size in memory.phases.items())
    yield Line(f"All phases: {', '.join(phases)}.", "soft")
    yield from (Line(f"Note: {note}.", "soft") for note in memory.notes)
    if memory.fits:
        spare = gib(memory.card - memory.total)
        yield Line(f"Fits: {total} of {card}, {spare} to spare.", "good")
        return
    yield Line(f"Does not fit: {total}, the card has {card}.", "bad")
    if not memory.steps:
        yield Line("No setting of this configuration saves enough: take smaller models.")
    elif memory.steps[-1].total <= memory.card:
        yield Line("With these changes, each on top of those before it, it fits:")
    else:
        yield Line("These changes save most, but it does not fit with all; take smaller models:")
    for step in memory.steps:
        yield Line(f"{step.change} → {gib(step.total)} (saves {gib(step.saves)}; {step.cost})")


def _gauge(share: float) -> str:
    full = min(_WIDTH, math.ceil(_WIDTH * share))
    return "█" * full + "░" * (_WIDTH - full)
