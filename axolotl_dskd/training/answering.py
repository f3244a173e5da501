"""The student's answers at evaluations: every k-th one, by the model that is being trained."""

from __future__ import annotations

from functools import partial
from typing import Any

from axolotl_dskd.config import EvaluationConfig
from axolotl_dskd.evaluation.answers import Answered, answer, end_ids, held_out_prompts
from axolotl_dskd.generation import TransformersWriter
from axolotl_dskd.models.student import Student


def evaluations_before(state: Any, prefix: str) -> int:
    """How many times a set was evaluated in a training, as its checkpoints know it: a training that
    goes on from one counts like one that was never interrupted. Of one step once.

    Args:
        state: the trainer's.
        prefix: of the metrics of the evaluated set.
    """
    of_set = f"{prefix}_runtime"
    steps = {entry["step"] for entry in state.log_history if of_set in entry}
    return sum(step < state.global_step for step in steps)


class Answering:
    """Lets the student answer held-out prompts.

    Args:
        config: how many, how often, how.
        student: whole or sharded.
        tokenizer: its own.
        token_bytes: bytes of each of its ids.
        seed: the run's.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        student: Student,
        tokenizer: Any,
        token_bytes: list[bytes],
        seed: int,
    ) -> None:
        self.config, self.student, self.tokenizer = config, student, tokenizer
        self.token_bytes, self.seed = token_bytes, seed

    def __call__(self, number: int, dataset: Any) -> list[Answered]:
        """The answers of an evaluation; none where it is not its turn.

        Args:
            number: of the evaluation among those of its set, from 0.
            dataset: that is evaluated.
        """
        if not self.config.answers or number % self.config.answers_every:
            return []
        prompts = held_out_prompts(dataset, self.config.answers)
        ends = end_ids(prompts, self.tokenizer.eos_token_id, self.token_bytes)
        writer = TransformersWriter(
            partial(self.student.running, evaluates=True),
            end_ids=ends,
            pad_id=self.tokenizer.pad_token_id or 0,
            vocab_size=self.student.vocab_size,
            together=self.student.runs_together,
        )
        limit = self.student.position_limit
        return answer(prompts, writer, self.config, self.tokenizer, self.seed, limit)
