"""What a trainer keeps of a run beside its log, and which checkpoint it takes for the best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from axolotl_dskd.evaluation.answers import Answered, as_dicts
from axolotl_dskd.evaluation.record import append_line, rows_digest
from axolotl_dskd.evaluation.rows import Row
from axolotl_dskd.ranks import sum_over_ranks
from axolotl_dskd.training.attending import Attending

#: Of our metrics those of which more is better, by how their names end; of the others less is.
_MORE_IS_BETTER = (
    *("accuracy", "agreement", "rouge_l", "rouge_l_sampled", "aligned", "won", "same_choice"),
    *("kept_mass", "logprob_preferred", "margin_preferred"),
)


def best_by_name(args: Any, greater_is_better: bool | None) -> None:
    """Let `metric_for_best_model: eval_dskd/...` pick what is better.

    transformers takes every metric whose name does not end in "loss" for one where more is better,
    and Axolotl does not hand `greater_is_better: false` on.

    Args:
        args: the training arguments; changed in place.
        greater_is_better: as configured; None: by the metric's name.
    """
    name = str(args.metric_for_best_model)
    if greater_is_better is not None:
        args.greater_is_better = greater_is_better
    elif name.removeprefix("eval_").startswith("dskd/"):
        args.greater_is_better = name.endswith(_MORE_IS_BETTER)


class Recorder:
    """Writes `dskd-record.jsonl` into the run's folder, on the first rank.

    Every rank must call it alike.

    Args:
        trainer: whose data sets, state and folder they are.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        #: Supervised tokens of this rank that were learned from.
        self.learned_tokens = 0

    def rows(self) -> None:
        """Which rows the run trains on, in which order."""
        dataset = self.trainer.train_dataset
        self.say({"train": {"rows": len(dataset), "digest": rows_digest(dataset)}})

    def evaluation(
        self,
        prefix: str,
        metrics: dict[str, float],
        rows: dict[str, Row],
        answered: Sequence[Answered],
        attending: Attending | None = None,
    ) -> None:
        """What an evaluation found.

        Args:
            prefix: of its metrics.
            metrics: by name, with the prefix.
            rows: of all ranks, by key.
            answered: the student's answers.
            attending: virtual attention, where there is one.
        """
        state, device = self.trainer.state, self.trainer.accelerator.device
        learned = sum_over_ranks(torch.tensor(self.learned_tokens, device=device))
        shown = {} if attending is None else {"attention": attending.margins()}
        self.say(
            shown
            | {
                "evaluation": prefix,
                "step": state.global_step,
                "epoch": state.epoch or 0,
                "metrics": {k: v for k, v in metrics.items() if isinstance(v, int | float)},
                "learned_tokens": int(learned),
                "gpu_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
                "rows": {key: row.as_list() for key, row in rows.items()},
                "answers": as_dicts(answered),
            }
        )

    def log(self, logs: dict[str, float], attending: Attending | None = None) -> None:
        """What the trainer logs, and virtual attention at that moment."""
        state = self.trainer.state
        numbers = {k: v for k, v in logs.items() if isinstance(v, int | float)}
        shown = {} if attending is None else {"attention": attending.attention()}
        self.say({"log": numbers, "step": state.global_step, "max_steps": state.max_steps} | shown)

    def say(self, record: dict[str, Any]) -> None:
        """Write a line."""
        if self.trainer.args.process_index == 0:
            append_line(self.trainer.args.output_dir, record)
