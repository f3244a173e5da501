"""On-policy: the student answers the prompts of a step's rows.

What a step takes is decided for all ranks alike (`schedule`); where it takes written answers they
stand in place of the data set's, row by row, and the batches are collated again. Answers that
cannot be used leave the data set's row in its place.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from axolotl.utils.logging import get_logger

from axolotl_dskd.config import StudentSamplesConfig
from axolotl_dskd.data.collator import samples_of
from axolotl_dskd.generation import Sampling
from axolotl_dskd.ranks import gather_objects
from axolotl_dskd.samples.asking import Asking
from axolotl_dskd.samples.base import Batch, Samples, SamplesRun
from axolotl_dskd.samples.placing import Placing
from axolotl_dskd.samples.replay import Replay
from axolotl_dskd.samples.schedule import Schedule, Take
from axolotl_dskd.samples.showing import Showing
from axolotl_dskd.samples.tally import Tally
from axolotl_dskd.samples.writing import Writing

LOG = get_logger(__name__)

Row = dict[str, Any]
_STATE, _REPLAY = "samples.json", "replay.safetensors"
#: An adaptive share follows this metric.
VALIDATION_LOSS = "dskd/ce"


class StudentSamples(Samples):
    """See the module.

    Args:
        config: its keys.
        run: the training.

    Raises:
        ValueError: no row of the data set has a prompt; the objective or the batch does not
            allow what is asked for.
    """

    def __init__(self, config: StudentSamplesConfig, run: SamplesRun) -> None:
        self.config = config
        self.run = run
        self.schedule = Schedule(config)
        self.replay = Replay(config.replay)
        self.tally = Tally()
        self.begins_with_evaluation = self.schedule.is_adaptive
        self.answered = run.answered()
        if not self.answered.prompts:
            raise ValueError(
                "dskd.samples.from: student: no row has a supervised answer with a prompt before "
                "it, so there is nothing to answer. Use rows of questions and answers, without "
                "train_on_inputs."
            )
        if self.schedule.is_adaptive and not run.evaluates:
            raise ValueError(
                "dskd.samples.share: adaptive follows the validation loss, but nothing is "
                "evaluated. Set val_set_size or test_datasets, and evals_per_epoch; or give share "
                "a number."
            )
        if run.contrast and config.replay:
            raise ValueError(
                "dskd.samples.replay: this objective compares each written answer with the data's "
                "to the same prompt, and a kept one has none beside it. Set replay: 0."
            )
        sampling = Sampling(
            config.max_new_tokens, config.temperature, config.top_p, config.top_k, run.max_length
        )
        self.asking = Asking(config, self.answered, sampling, run.contrast, self.tally)
        self.show = Showing(config, run)
        self.placing = Placing(self.answered, run.pack_length, self.tally)
        group = self.asking.group
        if run.batch is not None and run.batch % group:
            beside = ", and the data's answer beside each" if run.contrast else ""
            raise ValueError(
                f"dskd.samples: {group} rows of a micro-batch belong together (per_prompt: "
                f"{config.per_prompt}{beside}), but micro_batch_size is {run.batch}. Make it a "
                f"multiple of {group}, or use sample_packing: true."
            )
        self.end_ids = self.answered.end_ids["student"]
        self.writing = Writing(config, run, self.answered, sampling)
        self._said_of_refused = self._said_of_replay = False
        beside = ""
        if config.teacher_mix:
            beside = f", {config.teacher_mix:.0%} of each draw from the teacher's distribution"
        LOG.info(
            f"The student answers the prompts of {config.share} of the steps, up to "
            f"{config.max_new_tokens} tokens{beside}; an answer ends with "
            f"{[run.decode([i]) for i in self.end_ids]}"
        )

    # ---- a step --------------------------------------------------------------------------------

    def __call__(self, batches: list[Batch], step: int) -> list[Batch]:
        """See `Samples`. One draw decides for the whole step."""
        full = self.replay.is_full
        draw, total = self.schedule.draw(step), self.run.total_steps()
        take = self.schedule.take(draw, step + 1, total, full=full)
        if take is Take.DATASET:
            self.tally.count("rows", sum(len(b["dskd_teacher_labels"]) for b in batches))
            return batches
        micro = [samples_of(batch) for batch in batches]
        self.tally.count("rows", sum(len(bin) for bins in micro for bin in bins))
        columns = _columns(micro)
        change = self._write if take is Take.WRITTEN else self._put_kept
        change(micro, step, columns)
        return [self.run.collator.again(bins) for bins in micro]

    def _write(self, micro: list[list[list[Row]]], step: int, columns: list[str]) -> None:
        """Answer the prompts of all rows, and put the answers in."""
        places = [self.asking(bins, step) for bins in micro]
        flat = [place for found in places for place in found]
        begin = time.monotonic()
        answers = self.writing(flat)
        self.tally.count("seconds", time.monotonic() - begin)
        self.show(step, flat, answers)
        written: list[list[Row]] = []
        for found in places:
            mine, answers = answers[: len(found)], answers[len(found) :]
            written.append(self.placing.answers(found, mine, columns))
        if self.replay.capacity:
            self._keep(written)

    # ---- kept rows -----------------------------------------------------------------------------

    def _keep(self, written: list[list[Row]]) -> None:
        """Keep the rows of all ranks, micro-batch by micro-batch, so that they lie in the same
        order however many ranks there are."""
        ranks = gather_objects(written)
        self._say_of_replay(sum(len(rows) for rank in ranks for rows in rank))
        for number in range(max(map(len, ranks))):
            kept = [row for rank in ranks for row in (rank[number] if number < len(rank) else [])]
            gone = self.replay.add(kept)
            if self.run.memory is not None:
                self.run.memory.turn(kept, gone)

    def _say_of_replay(self, rows: int) -> None:
        """Say once where the buffer will never be full, so that no step will take kept rows.

        Args:
            rows: that a step has written, on all ranks together.
        """
        if self._said_of_replay or not rows:
            return
        self._said_of_replay = True
        steps, share = self.run.total_steps(), self.config.share
        most = round(rows * steps * (1.0 if share == "adaptive" else share))
        if len(self.replay) + most < self.replay.capacity:
            LOG.warning(
                f"dskd.samples.replay: steps take kept answers once there are "
                f"{self.replay.capacity:,}, but this training of {steps:,} steps writes about "
                f"{most:,}, so all its answers will be new ones. Set replay to less, or train "
                "longer."
            )

    def _put_kept(self, micro: list[list[list[Row]]], step: int, columns: list[str]) -> None:
        """Put kept rows in the places of a step's, as far as they fit there."""
        counts = gather_objects([sum(map(len, bins)) for bins in micro])
        order = [
            (number, rank) for number in range(max(map(len, counts))) for rank in range(len(counts))
        ]
        total = sum(map(sum, counts))
        drawn = self.replay.drawn(total, self.config.seed, step)
        at, mine = 0, []
        for number, rank in order:
            count = counts[rank][number] if number < len(counts[rank]) else 0
            rows, at = drawn[at : at + count], at + count
            if rank == self.run.rank and count:
                self.placing.kept(micro[number], rows, columns)
                mine += rows
        if self.run.memory is not None:
            self.run.memory.fetch(mine)

    # ---- what is told and said -----------------------------------------------------------------

    def evaluated(self, metrics: dict[str, float], step: int) -> None:
        """Let an adaptive share follow the validation loss.

        Raises:
            ValueError: the evaluation did not give one.
        """
        if not self.schedule.is_adaptive:
            return
        if VALIDATION_LOSS not in metrics:
            raise ValueError(
                f"dskd.samples.share: adaptive needs {VALIDATION_LOSS} of every evaluation, but "
                "one had no supervised token."
            )
        before = self.schedule.share
        self.schedule.evaluated(metrics[VALIDATION_LOSS], step)
        if self.schedule.share != before:
            LOG.info(
                f"The validation loss rose to {metrics[VALIDATION_LOSS]:.4f}: the student now "
                f"answers in {self.schedule.share:.0%} of the steps"
            )

    def metrics(self) -> dict[str, float]:
        """See `Samples`."""
        means = self.tally.metrics(self.run.device)
        if self.schedule.is_adaptive:
            means["dskd/share"] = self.schedule.share
        if means.get("dskd/answers_refused", 0.0) > 0.5 and not self._said_of_refused:
            self._said_of_refused = True
            LOG.warning(
                "More than half of the student's answers cannot be used, so the data set's rows "
                f"stand in their places: {dict(self.tally.refused)} on this rank. Check "
                "max_new_tokens against sequence_len, and that the student was fine-tuned on this "
                "chat template."
            )
        return means

    # ---- checkpoints ---------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """See `Samples`."""
        if self.replay.capacity:
            self.replay.save(folder / _REPLAY)
        part = folder / f"{_STATE}.part"
        part.write_text(json.dumps(self.schedule.state()) + "\n")
        part.replace(folder / _STATE)

    def load(self, folder: Path) -> None:
        """See `Samples`."""
        try:
            self.schedule.restore(json.loads((folder / _STATE).read_text()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{folder / _STATE} cannot be read ({error}). The checkpoint was written without "
                "dskd.samples.from: student, or is damaged: resume from another one."
            ) from error
        if self.replay.capacity:
            gone = list(self.replay.rows)
            self.replay.load(folder / _REPLAY)
            if self.run.memory is not None:  # what is known of them is not in the checkpoint
                self.run.memory.turn(self.replay.rows, gone)


def _columns(micro: list[list[list[Row]]]) -> list[str]:
    """Those that the rows of a step have beside the answer's."""
    first = next((row for bins in micro for bin in bins for row in bin), {})
    return [name for name in ("attention_mask", "position_ids") if name in first]
