"""Who writes what a step asks: the student alone, or beside the teacher of each prompt.

Knows places and writers; not what is done with the answers.
"""

from __future__ import annotations

from collections.abc import Sequence

from axolotl_dskd.config import StudentSamplesConfig
from axolotl_dskd.data.answers import AnsweredRows, RoutedAnswers
from axolotl_dskd.generation import Answer, MixedWriter, Sampling, Writer
from axolotl_dskd.samples.asking import Place
from axolotl_dskd.samples.base import SamplesRun


class Writing:
    """See the module.

    Args:
        config: whether teachers take part, and how many tokens are written at once.
        run: the training.
        answered: of its rows.
        sampling: how tokens are drawn.
    """

    def __init__(
        self,
        config: StudentSamplesConfig,
        run: SamplesRun,
        answered: AnsweredRows | RoutedAnswers,
        sampling: Sampling,
    ) -> None:
        self.sampling = sampling
        self._alone: Writer | None = None
        self._mixed: list[MixedWriter] = []
        ends, share = answered.end_ids["student"], config.teacher_mix
        if not share:
            self._alone = run.writer("student", ends, config.batch_tokens)
            return
        each = answered.each if isinstance(answered, RoutedAnswers) else [answered]
        self._mixed = [
            one.mixed_writer(share, rows, ends, config.batch_tokens)
            for one, rows in zip(run.by_teacher or [run], each, strict=True)
        ]

    def __call__(self, places: Sequence[Place]) -> list[Answer]:
        """An answer to each place's prompt, in order; on every rank alike."""
        ours = [place.prompt["student"].ids for place in places]
        seeds = [place.seed for place in places]
        if self._alone is not None:
            return self._alone.write(ours, self.sampling, seeds)
        theirs = [place.prompt["teacher"].ids for place in places]
        answers: dict[int, Answer] = {}
        for number, writer in enumerate(self._mixed):
            mine = [k for k, place in enumerate(places) if (place.prompt.number or 0) == number]
            found = writer.write(
                [ours[k] for k in mine],
                [theirs[k] for k in mine],
                self.sampling,
                [seeds[k] for k in mine],
            )
            answers.update(zip(mine, found, strict=True))
        return [answers[k] for k in range(len(places))]
