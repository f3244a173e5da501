"""Some of the answers of every k-th step, for people to read: in the log and in tables.

Knows answers and where to say them; not what is learned from them.
"""

from __future__ import annotations

from collections.abc import Sequence

from axolotl.utils.logging import get_logger

from axolotl_dskd.config import StudentSamplesConfig
from axolotl_dskd.generation import Answer
from axolotl_dskd.samples.asking import Place
from axolotl_dskd.samples.base import SamplesRun

LOG = get_logger(__name__)

#: Name of the table.
TABLE = "dskd/answers"
#: Characters of a prompt's end and of an answer's begin in the log; tables have all.
_PROMPT, _ANSWER = 200, 500


class Showing:
    """Shows answers of the first rank, at most every `show_every` steps.

    Args:
        config: how many, how often.
        run: the training.
    """

    def __init__(self, config: StudentSamplesConfig, run: SamplesRun) -> None:
        self.config = config
        self.run = run
        self._from = 0

    def __call__(self, step: int, places: Sequence[Place], answers: Sequence[Answer]) -> None:
        """Show some where it is time.

        Args:
            step: optimizer steps made so far.
            places: what was asked in this one.
            answers: to each of them.
        """
        every, count = self.config.show_every, self.config.show_count
        if not every or step < self._from or not places or self.run.rank:
            return
        self._from = step - step % every + every
        shown = []
        for place, answer in zip(places[:count], answers[:count], strict=True):
            prompt, text = map(self.run.decode, (place.prompt["student"].ids, answer.ids))
            LOG.info(
                f"Step {step + 1}, the student's answer ({len(answer.ids)} tokens, "
                f"{'ended by itself' if answer.ended else 'cut'}) to …{prompt[-_PROMPT:]!r}: "
                f"{text[:_ANSWER]!r}"
            )
            shown.append(
                {
                    "step": step + 1,
                    "prompt": prompt,
                    "answer": text,
                    "tokens": len(answer.ids),
                    "ended": answer.ended,
                }
            )
        self.run.table(TABLE, step + 1, shown)
