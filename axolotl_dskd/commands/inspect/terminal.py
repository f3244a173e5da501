"""The report in a terminal, by rich; without one, the same as plain text."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from axolotl_dskd.commands.inspect.memory import GIB
from axolotl_dskd.commands.inspect.report import Coverage, Example, MemoryReport, Report, SideFacts
from axolotl_dskd.commands.inspect.sample import OUTCOMES

_BAR = 30


def gib(count: int) -> str:
    """Bytes for people."""
    if count >= GIB:
        return f"{count / GIB:.2f} GiB"
    mib = count / (1 << 20)
    return f"{mib:.0f} MiB" if mib >= 10 else f"{mib:.1f} MiB"


def _count(number: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def visible(text: str) -> str:
    """Line breaks and tabs as signs."""
    return text.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")


def _logits(side: SideFacts) -> str:
    found = [] if side.softcap is None else [f"softcap {side.softcap:g}"]
    found += [f"scale {side.scale:g}"] if side.scale != 1 else []
    found += ["bias"] if side.bias else []
    return ", ".join(found) or "plain"


#: What is said of each side, in order: label -> text.
SIDE_ROWS: dict[str, Callable[[SideFacts], str]] = {
    "model": lambda s: f"{s.name} ({s.architecture})",
    "parameters": lambda s: (
        f"{_count(s.parameters)}, {_count(s.trained)} train" if s.trained else _count(s.parameters)
    ),
    "vocabulary": lambda s: f"{s.vocabulary:,} ids",
    "output head": lambda s: (
        f"{s.head_rows:,} × {s.hidden_size:,}"
        + (f", {s.padding_rows:,} padding rows" if s.padding_rows else "")
        + (", tied to the embedding" if s.tied else "")
    ),
    "logits": _logits,
    "BOS, EOS": lambda s: (
        f"{s.bos or 'none'}"
        + (" (first in every row)" if s.begins_with_bos else "")
        + f", {s.eos or 'none'}"
    ),
    "a turn ends with": lambda s: visible(s.turn_end) if s.turn_end else "(varies)",
    "a prompt reads": lambda s: visible(s.prompt if len(s.prompt) < 90 else f"{s.prompt[:86]} …"),
    "tokens per byte": lambda s: (
        f"{s.tokens_per_byte:.4f}"
        + (f" ({1 / s.tokens_per_byte:.2f} bytes a token)" if s.tokens_per_byte else "")
    ),
}


def _sides(report: Report) -> Table:
    table = Table(title="The pair", title_justify="left")
    table.add_column()
    table.add_column("student", overflow="fold")
    table.add_column("teacher", overflow="fold")
    for label, text in SIDE_ROWS.items():
        table.add_row(label, escape(text(report.student)), escape(text(report.teacher)))
    return table


def shared_words(report: Report) -> str:
    """How much of the two vocabularies is the same."""
    shares = (
        f"{report.shared_tokens / side.vocabulary:.0%} of the {name}'s"
        for side, name in ((report.student, "student"), (report.teacher, "teacher"))
    )
    return f"{report.shared_tokens:,} tokens stand for the same bytes in both vocabularies: " + (
        " and ".join(shares)
    )


def _coverage(report: Report) -> Table:
    table = Table(title="Your rows", title_justify="left")
    table.add_column("dataset", overflow="fold")
    for name in ("sampled", "kept", "student tokens", "teacher tokens", "exactly aligned"):
        table.add_column(name, justify="right")
    parts: list[Coverage] = [*report.datasets]
    if len(parts) > 1:
        parts.append(report.coverage)
    for part in parts:
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
    share = sum(group.exact for group in example.groups) / len(example.groups)
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
        ours, theirs = (
            visible("|".join(side)).replace(" ", "·") for side in (group.student, group.teacher)
        )
        size = max(len(ours), len(theirs))
        if len(upper) + size + 1 > width:
            break
        style = "green" if group.exact else "yellow"
        upper.append(ours.ljust(size), style=style).append(" ")
        lower.append(theirs.ljust(size), style=style).append(" ")
    return text.append(upper).append("\n").append(lower)


def verdict(memory: MemoryReport) -> str:
    """Fits or not, in a sentence."""
    left = memory.card - memory.total
    if memory.fits:
        return f"Fits: {gib(memory.total)} of {gib(memory.card)}, {gib(left)} to spare."
    return f"Does not fit: {gib(memory.total)}, the card has {gib(memory.card)}."


def step_words(memory: MemoryReport) -> str:
    """What the steps lead to."""
    if not memory.steps:
        return "No setting of this configuration saves enough: take a smaller teacher or student."
    if memory.steps[-1].total <= memory.card:
        return "With these changes, each on top of those before it, it fits:"
    return "These changes save most, but it does not fit with all of them; take a smaller teacher:"


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
    console.print(Text(f"Alignment: {report.alignment_why}."))
    if report.recommended != report.alignment:
        console.print(Text(f"Recommended: {report.recommended}: {report.recommended_why}."))
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
