"""The report in a terminal, by rich; without one, the same as plain text."""

from __future__ import annotations

from functools import partial

from rich.console import Console
from rich.table import Table
from rich.text import Text

from axolotl_dskd.commands.inspect import words
from axolotl_dskd.commands.inspect.report import MemoryReport, Report
from axolotl_dskd.commands.inspect.rows import Example
from axolotl_dskd.commands.inspect.sample import OUTCOMES

_BAR = 30


def _sides(report: Report) -> Table:
    table = Table(title="The pair", title_justify="left")
    table.add_column()
    table.add_column("student", overflow="fold")
    table.add_column("teacher", overflow="fold")
    for label, text in report.student.table.items():
        table.add_row(label, text, report.teacher.table[label])
    return table


def _coverage(report: Report) -> Table:
    table = Table(title="Your rows", title_justify="left")
    table.add_column("dataset", overflow="fold")
    for name in ("sampled", "kept", "student tokens", "teacher tokens", "exactly aligned"):
        table.add_column(name, justify="right")
    for part in report.parts:
        counts = part.kept, part.student_tokens, part.teacher_tokens
        rows = f"{part.sampled:,} of {part.total:,}"
        table.add_row(part.name, rows, *(f"{n:,}" for n in counts), f"{part.share:.1%}")
    return table


def _unlike(report: Report, example: Example) -> tuple[bool, float]:
    """How far a row is from the data as a whole; short ones show little."""
    share = example.exact / len(example.groups)
    return len(example.groups) < 12, abs(share - report.coverage.share)


def _example(report: Report, width: int) -> Text:
    """The first groups of a row: an exact pair on one ground, others on another."""
    if not report.examples:
        return Text()
    example = min(report.examples, key=lambda e: _unlike(report, e))
    title = f"A row of {example.dataset}, · a space, | between tokens of one text:\n"
    upper, lower = Text(), Text()
    for group in example.groups:
        ours, theirs = (words.visible("|".join(side)) for side in (group.student, group.teacher))
        size = max(len(ours), len(theirs))
        if len(upper) + size + 1 > width:
            break
        style = "green" if group.exact else "yellow"
        upper.append(ours.ljust(size), style=style).append(" ")
        lower.append(theirs.ljust(size), style=style).append(" ")
    return Text(title).append(upper).append("\n").append(lower)


def _plan(memory: MemoryReport) -> Table:
    table = Table(title="Memory plan", title_justify="left")
    table.add_column("at the fullest moment", min_width=32)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column(f"of {words.gib(memory.card)}", width=_BAR)
    for name, size in {**memory.at_peak, "total": memory.total}.items():
        if name == "total":
            table.add_section()
        bar = "█" * round(_BAR * min(1.0, size / memory.card))
        table.add_row(name, words.gib(size), bar or ("▏" if size else ""))
    return table


def print_report(report: Report, console: Console) -> None:
    """Everything that fits a terminal; the page shows more."""
    # Texts come from models and data: what looks like markup is none, in tables as well.
    say = partial(console.print, markup=False, highlight=False)
    note = partial(say, style="dim")
    memory, gib = report.memory, words.gib
    say(_sides(report))
    say(report.shared)
    say(f"Objective: {report.objective}.")
    if report.advice:
        say(f"Recommended: {report.advice}.")
    say()
    say(_coverage(report))
    for part in report.datasets:
        for outcome, rows in part.outcomes.items():
            if rows and outcome != "kept":
                say(f"{part.name}: {rows:,} {OUTCOMES[outcome]}")
    say()
    say(_example(report, console.width))
    say()
    say(_plan(memory))
    note(
        f"Planned for {memory.card_name}. Fullest in: {memory.peak_phase}. "
        f"Largest batch: {memory.batch}."
    )
    phases = (f"{name} {gib(size)}" for name, size in memory.phases.items())
    note(f"All phases: {', '.join(phases)}.")
    for remark in memory.notes:
        note(f"Note: {remark}.")
    say(memory.verdict, style="bold green" if memory.fits else "bold red")
    if not memory.fits:
        say(memory.leads_to)
    for step in memory.steps:
        say(f"  {step.change}  → {gib(step.total)} (saves {gib(step.saves)}; {step.cost})")
    for remark in report.remarks:
        say(f"• {remark}")
    if report.probe:
        say(f"\n{report.probe}")
