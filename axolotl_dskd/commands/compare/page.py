"""A comparison as one HTML page."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import yaml

from axolotl_dskd.commands.compare.outcome import Outcome
from axolotl_dskd.commands.compare.plan import Run, shown
from axolotl_dskd.commands.compare.summary import MOMENTS, Method, verdict
from axolotl_dskd.commands.pages import environment, in_page
from axolotl_dskd.progress import duration, quantity

_ENVIRONMENT = environment(
    bits="{:.4f}".format,
    signed="{:+.1%}".format,
    duration=duration,
    size=lambda count: quantity(count, "bytes"),
)


def html_page(
    results: dict[str, Any],
    runs: Sequence[Run],
    outcomes: Sequence[Outcome],
    methods: Sequence[Method],
    picture: bytes,
) -> str:
    """The whole page."""
    return _ENVIRONMENT.get_template("compare/page.html.jinja").render(
        results=results,
        outcomes=outcomes,
        methods=methods,
        moments=MOMENTS,
        verdicts=[verdict(method, methods[0]) for method in methods[1:]],
        picture=in_page(picture),
        configs=_configs(runs),
        answers=_answers(outcomes),
    )


def _answers(outcomes: Sequence[Outcome]) -> list[tuple[str, str, list[tuple[str, str, float]]]]:
    """Prompts with their references and each run's last greedy answer and its Rouge-L."""
    found: dict[tuple[str, str], list[tuple[str, str, float]]] = {}
    for outcome in outcomes:
        for one in outcome.answered.answers if outcome.answered else []:
            key = one["prompt"], one["reference"]
            found.setdefault(key, []).append((outcome.name, one["greedy"], one["rouge_l"]))
    return [(prompt, reference, rows) for (prompt, reference), rows in found.items()]


def _configs(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Each run's name and configuration: whole the first time, then what differs from that."""
    first, *others = [
        (run.name, yaml.safe_dump(shown(run.config), sort_keys=False)) for run in runs
    ]
    lines = first[1].splitlines()
    return [
        first,
        *(
            (name, "\n".join(difflib.unified_diff(lines, text.splitlines(), lineterm="", n=1)))
            for name, text in others
        ),
    ]
