"""The report in a terminal, by rich; without one, the same as plain text."""

from __future__ import annotations

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from axolotl_dskd.commands.inspect.report import MemoryReport, Report
from axolotl_dskd.commands.inspect.rows import Coverage, Example
from axolotl_dskd.commands.inspect.sample import OUTCOMES
from axolotl_dskd.commands.inspect.words import (
    SIDE_ROWS,
    gib,
    shared_words,
    step_words,
    verdict,
    visible,
)

_BAR = 30


def _sides(report: Report) -> Table:
    table = Table(title="The pair", title_justify="left")
    table.add_column()
    table.add_column("student", overflow="fold")
    table.add_column("teacher", overflow="fold")
    for label, text in SIDE_ROWS.items():
        table.add_row(label, escape(text(report.student)), escape(text(report.teacher)))
    return table


def _coverage(report: Report) -> Table:
    table = Table(title="Your rows", title_justify="left")
    table.add_column("dataset", overflow="fold")
    for name in ("sampled", "kept", "student tokens", "teacher tokens", "exactly aligned"):
        table.add_column(name, justify="right")
    for part in report.parts:
        table.add_row(
            escape(part.name),
            f"{part.sampled:,} of {part.total:,}",
            f"{part.kept:,}",
            f"{part.student_tokens:,}",
            f"{part.teacher_tokens:,}",
            f"{part.share:.1%}",
        )
    return table


def outcome_lines(part: Coverage) -> list[str]:
    """Rows by what became of them, those that are trained on as they are left out."""
    return [
        f"{part.name}: {rows:,} {OUTCOMES[outcome]}"
        for outcome, rows in part.outcomes.items()
        if rows and outcome != "kept"
    ]


def _unlike(report: Report, example: Example) -> tuple[bool, float]:
    """How far a row is from the data as a whole; short ones show little."""
    share = example.exact / len(example.groups)
    return len(example.groups) < 12, abs(share - report.coverage.share)


def _example(report: Report, width: int) -> Text:
    """The first groups of a row: an exact pair on one ground, others on another."""
    text = Text()
    if not report.examples:
        return text
    example = min(report.examples, key=lambda e: _unlike(report, e))
    text.append(f"A row of {example.dataset}, · a space, | between tokens of one text:\n")
    upper, lower = Text(), Text()
    for group in example.groups:
        ours, theirs = (visible("|".join(side)) for side in (group.student, group.teacher))
        size = max(len(ours), len(theirs))
        if len(upper) + size + 1 > width:
            break
        style = "green" if group.exact else "yellow"
        upper.append(ours.ljust(size), style=style).append(" ")
        lower.append(theirs.ljust(size), style=style).append(" ")
    return text.append(upper).append("\n").append(lower)


def _memory(memory: MemoryReport) -> Group:
    table = Table(title="Memory plan", title_justify="left")
    table.add_column("at the fullest moment", min_width=32)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column(f"of {gib(memory.card)}", width=_BAR)
    for name, size in memory.at_peak.items():
        bar = round(_BAR * min(1.0, size / memory.card))
        table.add_row(name, gib(size), "█" * bar or ("▏" if size else ""))
    table.add_section()
    table.add_row(
        "total", gib(memory.total), "█" * round(_BAR * min(1.0, memory.total / memory.card))
    )
    lines: list[Table | Text] = [table]
    lines.append(
        Text(
            f"Planned for {memory.card_name}. Fullest in: {memory.peak_phase}. "
            f"Largest batch: {memory.batch}.",
            style="dim",
        )
    )
    phases = ", ".join(f"{name} {gib(size)}" for name, size in memory.phases.items())
    lines.append(Text(f"All phases: {phases}.", style="dim"))
    weights = ", ".join(f"{gib(size)} in {bits}" for bits, size in memory.teacher_weights.items())
    lines.append(Text(f"The teacher's weights: {weights}.", style="dim"))
    lines += [Text(f"Note: {note}.", style="dim") for note in memory.notes]
    lines.append(Text(verdict(memory), style="bold green" if memory.fits else "bold red"))
    if not memory.fits:
        lines.append(Text(step_words(memory)))
        lines += [
            Text(f"  {step.change}  → {gib(step.total)} (saves {gib(step.saves)}; {step.cost})")
            for step in memory.steps
        ]
    return Group(*lines)


def print_report(report: Report, console: Console) -> None:
    """Everything that fits a terminal; the page shows more."""
    console.print(_sides(report))
    console.print(Text(shared_words(report) + "."))
    console.print(Text(f"Objective: {report.objective}."))
    if report.advice:
        console.print(Text(f"Recommended: {report.advice}."))
    console.print()
    console.print(_coverage(report))
    for part in report.datasets:
        for line in outcome_lines(part):
            console.print(Text(line))
    console.print()
    console.print(_example(report, console.width))
    console.print()
    console.print(_memory(report.memory))
    for remark in report.remarks:
        console.print(Text(f"• {remark}"))
    if report.probe:
        console.print(Text(f"\n{report.probe}"))
