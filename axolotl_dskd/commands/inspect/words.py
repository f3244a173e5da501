"""What terminal and page both say of a report. Knows reports; nothing of how they look."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator

from axolotl_dskd.commands.inspect.report import MemoryReport, Report, SideFacts

GIB = 1 << 30

_SIGNS = {
    "\n": "⏎",
    "\t": "⇥",
    "\r": "␍",
    " ": "·",
    "\u00a0": "⍽",
    "\u200d": "ZWJ",
    "\ufe0f": "VS16",
}


def signs(text: str) -> Iterator[tuple[str, bool]]:
    """Character by character, what is shown and whether it is a sign that stands for the character.

    What has no ink gets one: spaces, breaks, tabs, joiners, controls.
    """
    for place, char in enumerate(text):
        kind = unicodedata.category(char)
        if char in _SIGNS:
            yield _SIGNS[char], True
        elif kind in ("Cc", "Cf", "Zl", "Zp", "Zs", "Cs", "Co", "Cn"):
            yield f"U+{ord(char):04X}", True
        elif kind.startswith("M") and place == 0:
            yield "◌" + char, False  # a mark without its letter
        else:
            yield char, False


def visible(text: str) -> str:
    """The text with its signs, in one line."""
    return "".join(shown for shown, _ in signs(text))


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


def _parameters(side: SideFacts) -> str:
    return _count(side.parameters) + (f", {_count(side.trained)} train" if side.trained else "")


def _head(side: SideFacts) -> str:
    padding = f", {side.padding_rows:,} padding rows" if side.padding_rows else ""
    tied = ", tied to the embedding" if side.tied else ""
    return f"{side.head_rows:,} × {side.hidden_size:,}{padding}{tied}"


def _logits(side: SideFacts) -> str:
    parts = [] if side.softcap is None else [f"softcap {side.softcap:g}"]
    parts += [f"scale {side.scale:g}"] if side.scale != 1 else []
    parts += ["bias"] if side.bias else []
    return ", ".join(parts) or "plain"


def _special(side: SideFacts) -> str:
    first = " (first in every row)" if side.begins_with_bos else ""
    return f"{side.bos or 'none'}{first}, {side.eos or 'none'}"


def _prompt(side: SideFacts) -> str:
    text = side.prompt if len(side.prompt) < 90 else f"{side.prompt[:86]} …"
    return " ".join(map(visible, text.split(" ")))


def _rate(side: SideFacts) -> str:
    rate = side.tokens_per_byte
    return f"{rate:.4f}" + (f" ({1 / rate:.2f} bytes a token)" if rate else "")


#: What is said of each side, in order: label -> text.
SIDE_ROWS: dict[str, Callable[[SideFacts], str]] = {
    "model": lambda side: f"{side.name} ({side.architecture})",
    "parameters": _parameters,
    "vocabulary": lambda side: f"{side.vocabulary:,} ids",
    "output head": _head,
    "logits": _logits,
    "BOS, EOS": _special,
    "a turn ends with": lambda side: visible(side.turn_end) if side.turn_end else "(varies)",
    "a prompt reads": _prompt,
    "tokens per byte": _rate,
}


def shared_words(report: Report) -> str:
    """How much of the two vocabularies is the same."""
    shares = (
        f"{report.shared_tokens / side.vocabulary:.0%} of the {name}'s"
        for side, name in ((report.student, "student"), (report.teacher, "teacher"))
    )
    return f"{report.shared_tokens:,} tokens stand for the same bytes in both vocabularies: " + (
        " and ".join(shares)
    )


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
