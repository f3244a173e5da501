"""Divergences that may be others in answers that the student writes."""

from __future__ import annotations

from axolotl_dskd.config import WrittenDivergenceKeys
from axolotl_dskd.losses import Divergence, make_divergence


def both_divergences(config: WrittenDivergenceKeys) -> tuple[Divergence, Divergence | None]:
    """That of an objective, and the one of what the student writes, where it is another one."""

    def made(name: str) -> Divergence:
        return make_divergence(
            name,
            skew_lambda=config.skew_lambda,
            adaptive_alpha=config.adaptive_alpha,
            js_beta=config.js_beta,
        )

    written = config.divergence_written
    same = written in ("same", config.divergence)
    return made(config.divergence), None if same else made(written)


def named_divergences(config: WrittenDivergenceKeys) -> str:
    """In words."""
    if config.divergence_written == "same":
        return config.divergence
    return f"{config.divergence} ({config.divergence_written} in what the student writes)"
