"""The report as one HTML page: no script, nothing loaded from elsewhere, light and dark.

Every text in it comes from models, data or paths, so all of it is escaped here.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from html import escape

from axolotl_dskd import __version__
from axolotl_dskd.commands.inspect.report import (
    Coverage,
    Example,
    ExampleGroup,
    MemoryReport,
    Report,
)
from axolotl_dskd.commands.inspect.sample import OUTCOMES
from axolotl_dskd.commands.inspect.style import CSS
from axolotl_dskd.commands.inspect.terminal import SIDE_ROWS, gib, shared_words, step_words, verdict

_SIGNS = {
    "\n": "⏎",
    "\t": "⇥",
    "\r": "␍",
    " ": "·",
    "\u00a0": "⍽",
    "\u200d": "ZWJ",
    "\ufe0f": "VS16",
}

#: Colours of the memory bar's parts, by what they belong to.
_PART_COLOURS = {
    "student weights": "s1",
    "adapters": "s2",
    "gradients": "s3",
    "optimizer states": "s4",
    "student activations": "s5",
    "student layer": "s5",
    "projectors with their optimizer": "p1",
    "alignment and loss": "p2",
    "backward's own": "p3",
    "optimizer's temporaries": "s4",
    "projectors' start": "p3",
    "teacher layers": "t1",
    "teacher embedding and head": "t2",
    "teacher activations": "t3",
}


def visible(text: str) -> str:
    """Escaped text in which what has no ink is seen: spaces, breaks, tabs, joiners, controls."""
    out = []
    for place, char in enumerate(text):
        kind = unicodedata.category(char)
        if char in _SIGNS:
            out.append(f'<i class="sign">{_SIGNS[char]}</i>')
        elif kind in ("Cc", "Cf", "Zl", "Zp", "Zs", "Cs", "Co", "Cn"):
            out.append(f'<i class="sign">U+{ord(char):04X}</i>')
        elif kind.startswith("M") and place == 0:
            out.append("◌" + escape(char))  # a mark without its letter
        else:
            out.append(escape(char))
    return "".join(out)


def _token(text: str, kind: str = "tok") -> str:
    if text.startswith("‹") and text.endswith("›") and len(text) > 2:
        return f'<bdi class="{kind} name">{escape(text[1:-1])}</bdi>'
    return f'<bdi class="{kind}">{visible(text)}</bdi>'


def _group(group: ExampleGroup) -> str:
    words = "exact pair" if group.exact else "same text, divided differently"
    if not group.student or not group.teacher:
        words = "only one side has this token"
    sides = "".join(
        f'<span class="row">{"".join(map(_token, side)) or "&nbsp;"}</span>'
        for side in (group.student, group.teacher)
    )
    kind = "exact" if group.exact else "group"
    text = _token(group.text, "text") if group.text else "&nbsp;"
    return f'<span class="g {kind}" title="{words}">{text}{sides}</span>'


def _example(example: Example) -> str:
    exact = sum(group.exact for group in example.groups)
    more = example.shown_of - len(example.groups)
    tail = f" The first {len(example.groups)} of {example.shown_of} groups." if more > 0 else ""
    return (
        f"<figure><figcaption>A row of <b>{escape(example.dataset)}</b>: {exact} exact pairs in "
        f"{len(example.groups)} groups.{tail}</figcaption>"
        f'<div class="tokens" dir="ltr">{"".join(map(_group, example.groups))}</div></figure>'
    )


def _bar(parts: Iterable[tuple[str, float, str]], whole: float) -> str:
    """A stacked bar: (words, size, colour class) against what the full width stands for."""
    shown = (
        f'<span class="{colour}" style="width:{100 * size / whole:.3f}%" title="{escape(words)}">'
        "</span>"
        for words, size, colour in parts
        if size
    )
    return f'<div class="bar">{"".join(shown)}</div>'


def _key(colour: str, words: str, value: str) -> str:
    return f'<li><span class="dot {colour}"></span>{escape(words)} <b>{escape(value)}</b></li>'


def _coverage(part: Coverage) -> str:
    seen = max(1, sum(part.outcomes.values()))
    colours = {"kept": "ok", "cut": "cut"}
    rows = [
        (f"{rows:,} {OUTCOMES[outcome]}", rows, colours.get(outcome, "bad"))
        for outcome, rows in part.outcomes.items()
    ]
    tokens = [
        (f"{part.exact:,} with an exact partner", part.exact, "exact-bar"),
        ("others", part.student_tokens - part.exact, "group-bar"),
    ]
    keys = "".join(_key(colour, words, "") for words, count, colour in rows if count)
    return (
        f"<article><h3>{escape(part.name)}</h3>"
        f"<p>{part.sampled:,} of {part.total:,} rows sampled, {part.kept:,} of them usable.</p>"
        f'{_bar(rows, seen)}<ul class="keys">{keys}</ul>'
        f"<p><b>{part.share:.1%}</b> of {part.student_tokens:,} supervised student tokens have an "
        f"exact partner among {part.teacher_tokens:,} of the teacher.</p>"
        f"{_bar(tokens, max(1, part.student_tokens))}</article>"
    )


def _memory(memory: MemoryReport) -> str:
    whole = max(memory.card, memory.total) * 1.02
    parts = [
        (f"{name}: {gib(size)}", float(size), _PART_COLOURS.get(name, "x1"))
        for name, size in memory.at_peak.items()
    ]
    keys = "".join(
        _key(_PART_COLOURS.get(name, "x1"), name, gib(size))
        for name, size in memory.at_peak.items()
    )
    line = (
        f'<div class="card-line" style="left:{100 * memory.card / whole:.3f}%">'
        f"<span>{gib(memory.card)}</span></div>"
    )
    phases = "".join(
        f'<tr><th>{escape(name)}</th><td class="num">{gib(size)}</td><td class="wide">'
        + _bar([(name, size, "peak" if name == memory.peak_phase else "phase")], memory.total)
        + "</td></tr>"
        for name, size in memory.phases.items()
    )
    weights = "".join(
        f'<tr><th>teacher in {escape(bits)}</th><td class="num">{gib(size)}</td><td class="wide">'
        f"{_bar([(bits, size, 't1')], max(memory.teacher_weights.values()))}</td></tr>"
        for bits, size in memory.teacher_weights.items()
    )
    steps = ""
    if not memory.fits:
        rows = "".join(
            f"<tr><td><code>{escape(step.change)}</code><br><small>{escape(step.cost)}</small></td>"
            f'<td class="num">−{gib(step.saves)}</td><td class="num">{gib(step.total)}</td></tr>'
            for step in memory.steps
        )
        steps = (
            f"<p>{escape(step_words(memory))}</p><table><tr><th>change</th><th>saves</th>"
            f"<th>then</th></tr>{rows}</table>"
        )
    notes = "".join(f"<li>{escape(note)}</li>" for note in memory.notes)
    return (
        f'<p class="verdict {"fits" if memory.fits else "over"}">{escape(verdict(memory))}</p>'
        f'<div class="card">{_bar(parts, whole)}{line}</div><ul class="keys">{keys}</ul>'
        f"<p>Planned for {escape(memory.card_name)}; fullest in: {escape(memory.peak_phase)}. "
        f"Largest batch: {escape(memory.batch)}.</p>{steps}"
        f"<h3>Moments of a step</h3><table>{phases}</table>"
        f"<h3>The teacher's weights</h3><table>{weights}</table><ul class='notes'>{notes}</ul>"
    )


def _pair(report: Report) -> str:
    rows = "".join(
        f"<tr><th>{escape(label)}</th><td>{escape(text(report.student))}</td>"
        f"<td>{escape(text(report.teacher))}</td></tr>"
        for label, text in SIDE_ROWS.items()
    )
    largest = max(report.student.vocabulary, report.teacher.vocabulary)
    bars = "".join(
        f"<p>{name}'s vocabulary, {side.vocabulary:,} ids</p>"
        + _bar(
            [
                ("shared", min(report.shared_tokens, side.vocabulary), "exact-bar"),
                ("its own", max(0, side.vocabulary - report.shared_tokens), "group-bar"),
            ],
            largest,
        )
        for name, side in (("student", report.student), ("teacher", report.teacher))
    )
    return (
        f'<div class="scroll"><table><tr><th></th><th>student</th><th>teacher</th></tr>{rows}'
        f"</table></div><p>{escape(shared_words(report))}.</p>{bars}"
    )


def _alignment(report: Report) -> str:
    advice = (
        "That is what <code>auto</code> takes as well."
        if report.recommended == report.alignment
        else f"Recommended: <b>{escape(report.recommended)}</b>, {escape(report.recommended_why)}."
    )
    remarks = "".join(
        f"<li>{escape(remark).replace(chr(10), '<br>')}</li>" for remark in report.remarks
    )
    return (
        f"<p><b>{escape(report.alignment)}</b>: {escape(report.alignment_why)}. {advice}</p>"
        f"<ul>{remarks}</ul>"
    )


def html_page(report: Report) -> str:
    """The whole page."""
    coverage = "".join(map(_coverage, report.datasets))
    if len(report.datasets) > 1:
        coverage += _coverage(report.coverage)
    legend = (
        '<p class="legend"><span class="g exact">exact pair</span> one token on each side '
        '<span class="g group">group</span> the same text, divided differently. Above the text, '
        "then the student's tokens, then the teacher's. "
        '<i class="sign">·</i> space, <i class="sign">⏎</i> line break, '
        '<i class="sign">⇥</i> tab, hexadecimal digits: part of a character.</p>'
    )
    sections = [
        ("Does it fit?", _memory(report.memory)),
        ("The pair", _pair(report)),
        ("Alignment", _alignment(report)),
        ("Your rows", coverage),
        ("Both tokenizers on your text", legend + "".join(map(_example, report.examples))),
    ]
    if report.probe:
        sections.append(("The teacher as it is loaded", f"<p>{escape(report.probe)}</p>"))
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections)
    name = escape(report.config)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{name}</title><style>{CSS}</style></head><body><main>"
        f"<header><h1>{escape(report.student.name)} <span>←</span> {escape(report.teacher.name)}"
        f"</h1><p>{name}, read by axolotl-dskd {escape(__version__)} before training. No weights "
        f"were loaded.</p></header>{body}</main></body></html>"
    )
