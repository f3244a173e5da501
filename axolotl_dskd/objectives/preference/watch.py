"""Notices when both answers of the pairs become less likely: preference learning's known failure.

Knows the means of logs; nothing of what is learned.
"""

from __future__ import annotations

from collections.abc import Mapping

#: The terms that it reads: log-probabilities per token.
_NAMES = ("logprob_preferred", "logprob_other")
#: So many logs are the beginning, and the last so many are compared with them.
_LOGS = 10
#: A fall that is worth saying, in nats per token.
_FALL = 0.1


class FallWatch:
    """Says once that both fall, from the means of the logs; a resumed training begins anew."""

    def __init__(self) -> None:
        self._logs: list[tuple[float, ...]] = []
        self._said = False

    def remark(self, means: Mapping[str, float]) -> str | None:
        """What to change, or None.

        Args:
            means: of the terms in the newest log.
        """
        if self._said or not set(_NAMES) <= means.keys():
            return None
        self._logs.append(tuple(means[name] for name in _NAMES))
        if len(self._logs) < 2 * _LOGS:
            return None
        del self._logs[_LOGS:-_LOGS]
        before, now = (
            [sum(column) / _LOGS for column in zip(*logs, strict=True)]
            for logs in (self._logs[:_LOGS], self._logs[-_LOGS:])
        )
        if min(a - b for a, b in zip(before, now, strict=True)) < _FALL:
            return None
        self._said = True
        return (
            "preferred answers and the others have both become less likely (log-probabilities per "
            f"token {before[0]:.2f} and {before[1]:.2f} at first, {now[0]:.2f} and {now[1]:.2f} "
            "now). Lower the learning rate or dskd.kd_ratio, so that cross-entropy holds the "
            "preferred ones."
        )
