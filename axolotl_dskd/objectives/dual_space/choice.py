"""Which alignment a run uses, and why."""

from __future__ import annotations

from typing import Literal

from axolotl_dskd.config import DualSpaceConfig
from axolotl_dskd.objectives.base import Facts

Alignment = Literal["positions", "eta", "cma"]

#: `auto` takes exact pairs where at least this share of the student's tokens has one: then hardly
#: a token goes without teacher. On the demo, where 69% have one, attention was clearly better.
ETA_SHARE = 0.95


def choose_alignment(config: DualSpaceConfig, facts: Facts) -> tuple[Alignment, str]:
    """Which alignment a run uses, and why, in words.

    Where no exact share is known, `auto` with different vocabularies is cma.

    Raises:
        ValueError: `positions` for vocabularies that differ.
    """
    ours, theirs = (len(tokenizer.get_vocab()) for tokenizer in (facts.student, facts.teacher))
    exact_share, differing = facts.exact_share, facts.differing()
    if config.alignment == "cma":
        return "cma", "cross-model attention, as configured"
    share = "" if exact_share is None else f"{exact_share:.0%} of the student's supervised tokens"
    if config.alignment == "eta":
        return "eta", "exactly aligned tokens, as configured" + (share and f": {share}")
    if not differing:
        return "positions", f"position by position: both vocabularies are the same {ours}"
    if config.alignment == "positions":
        raise ValueError(
            f"alignment: positions needs identical vocabularies, but {differing}. "
            "Use alignment: cma, or auto."
        )
    sizes = f"{ours} and {theirs} tokens, {differing}"
    if exact_share is None:
        return "cma", f"cross-model attention: {sizes}"
    if exact_share >= ETA_SHARE and not config.causal:
        return "eta", (
            f"exactly aligned tokens: {sizes}; {share} stand for the same bytes as one of the "
            f"teacher's, and from {ETA_SHARE:.0%} on `auto` distils on those"
        )
    return "cma", (
        f"cross-model attention: {sizes}; {share} stand for the same bytes as one of the "
        f"teacher's" + (", but causal is set" if config.causal else f", less than {ETA_SHARE:.0%}")
    )
