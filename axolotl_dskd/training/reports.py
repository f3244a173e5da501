"""What a trainer says of a run: means in the log, evaluations, and its record.

Counts batches in as the trainer finds their sums; knows no forward, teacher or optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from axolotl.utils.logging import get_logger

from axolotl_dskd.data.token_bytes import token_bytes
from axolotl_dskd.evaluation import answers
from axolotl_dskd.evaluation.agreement import TeacherAgreement
from axolotl_dskd.evaluation.measure import TextBytes
from axolotl_dskd.evaluation.rows import means
from axolotl_dskd.evaluation.scores import RowScores, row_keys
from axolotl_dskd.objectives import Objective
from axolotl_dskd.objectives.cross_entropy import TERMS as CROSS_ENTROPY
from axolotl_dskd.objectives.own_text import TERMS as OF_OWN_TEXT
from axolotl_dskd.training.answering import Answering, evaluations_before
from axolotl_dskd.training.attending import Attending
from axolotl_dskd.training.metrics import MetricSums, RowSums
from axolotl_dskd.training.recorder import Recorder
from axolotl_dskd.training.step import Step
from axolotl_dskd.types import IGNORE_INDEX, LossOutput, Per, View

LOG = get_logger(__name__)

#: Where a smaller share of the tokens takes part, the log warns.
LITTLE = 0.25


class Reports:
    """See the module. Every rank must call it alike.

    Args:
        trainer: whose run it is, constructed, with its `student` and its `dskd` keys.
    """

    def __init__(self, trainer: Any) -> None:
        self.device = trainer.accelerator.device
        self._state = lambda: trainer.state  # another one once training begins
        tokenizer, config = trainer.processing_class, trainer.dskd.evaluation
        table = token_bytes(tokenizer)
        self._table, self._kd_ratio = table, trainer.dskd.kd_ratio
        self._text_bytes = TextBytes(table)
        self._answering = Answering(config, trainer.student, tokenizer, table, trainer.args.seed)
        records = config.record or trainer.dskd.virtual_attention is not None
        self._recorder = Recorder(trainer) if records else None
        self._objectives: dict[str, Objective[Any]] = {}
        self._attending: Attending | None = None
        self._compared: list[str] = []
        self._rows = RowScores()
        self._share_is_said = False
        self.forget()

    def begin(self, objectives: Mapping[str, Objective[Any]], attending: Attending | None) -> None:
        """Training begins.

        Args:
            objectives: whose terms the sums are from here on, by the teacher's name; none: the
                cross-entropy alone.
            attending: virtual attention, where there is one.
        """
        self._objectives, self._attending = dict(objectives), attending
        if attending is not None and self._recorder is not None:
            about = attending.groups(self._table)
            self._recorder.say({"virtual_attention": about, "kd_ratio": self._kd_ratio})
        self.forget()

    def compare(self, teachers: Iterable[str]) -> None:
        """Evaluations alone ask these teachers, by name."""
        self._compared = list(teachers)

    def record_rows(self) -> None:
        """Note the rows that training begins with, before others take their place."""
        if self._recorder is not None:
            self._recorder.rows()

    def forget(self) -> None:
        """Drop what was counted."""
        if self._recorder is not None:
            self._recorder.learned_tokens = 0
        self._train, self._eval = self._no_sums(), self._no_row_sums()

    def count(self, step: Step, out: LossOutput) -> None:
        """Add a batch.

        Args:
            step: that went through the student's forward.
            out: what it found.
        """
        batch, measured = step.batch, step.measured
        side = batch.student_side()
        text_bytes = self._text_bytes(batch.matches.spans, side.labels)
        known = View(side, written=batch.written).references != IGNORE_INDEX
        known_bytes = text_bytes * known
        if step.evaluates:
            keys = row_keys(batch)
            self._eval[""].add(out, keys, side.sample_ids, known, known_bytes)
            for name, (part, found) in step.found.items():
                mine, theirs = part.tokens, [keys[sample] for sample in part.samples.tolist()]
                samples = part.numbers[side.sample_ids[mine]]
                self._eval[name].add(found, theirs, samples, known[mine], known_bytes[mine])
            if measured is not None and len(side):
                self._rows.add(keys, side.sample_ids, measured, text_bytes)
            return
        self._train[""].add(out, known_bytes.sum())
        for name, (part, found) in step.found.items():
            self._train[name].add(found, known_bytes[part.tokens].sum())
        if self._recorder is not None:
            self._recorder.learned_tokens += out.tokens

    def log(self, logs: dict[str, float]) -> None:
        """Add the means since the last log to training logs, and say what follows from them."""
        sums, self._train = self._train, self._no_sums()
        found = {name: of_rows.means(self.device) for name, of_rows in sums.items()}
        for means_of_rows in found.values():
            logs |= means_of_rows
        self._report_share(logs)
        for name, objective in self._objectives.items():
            terms = {term.rpartition("/")[2]: mean for term, mean in found[name].items()}
            if remark := objective.remark(terms):
                LOG.warning(f"{name}: {remark}" if name else remark)
        if self._recorder is not None:
            self._recorder.log(logs, self._attending)

    def _report_share(self, logs: dict[str, float]) -> None:
        """Say once, at the first log, how much of the data the objective learns from."""
        if self._share_is_said or "dskd/aligned" not in logs:
            return
        self._share_is_said = True
        share = logs["dskd/aligned"]
        text = f"{share:.1%} of the student's supervised tokens take part in the distillation"
        (LOG.warning if share < LITTLE else LOG.info)(
            text + (", the others have cross-entropy alone" if share < 1 else "")
        )

    def begin_evaluation(self) -> None:
        """The batches to come are of one evaluation."""
        self._eval, self._rows = self._no_row_sums(), RowScores()
        if self._attending is not None:
            self._attending.begin_evaluation()
        if not self._objectives:
            there = "The teacher is there to compare" if self._compared else "No teacher is loaded"
            LOG.info(f"{there}: the loss is the student's cross-entropy")

    def end_evaluation(self, prefix: str, dataset: Any, metrics: dict[str, float]) -> None:
        """Let the student answer, where it is time, and add everything found to the metrics.

        Args:
            prefix: of the metrics' names.
            dataset: that was evaluated.
            metrics: added to.
        """
        found: dict[str, float] = {}
        for sums in self._eval.values():
            found |= sums.means(self.device)
        number = evaluations_before(self._state(), prefix)
        rows, answered = self._rows.gathered(), self._answering(number, dataset)
        found |= means(rows) | answers.means(answered)
        metrics.update({f"{prefix}_{name}": value for name, value in found.items()})
        if self._recorder is not None:
            self._recorder.evaluation(prefix, metrics, rows, answered, self._attending)

    def _no_sums(self) -> dict[str, MetricSums]:
        """Of all rows, under an empty name, and of those of each of several teachers."""
        return {name: MetricSums(terms, name) for name, terms in self._terms(()).items()}

    def _no_row_sums(self) -> dict[str, RowSums]:
        """The same for an evaluation."""
        return {name: RowSums(terms, name) for name, terms in self._terms(self._compared).items()}

    def _terms(self, compared: Iterable[str]) -> dict[str, dict[str, Per]]:
        """What is counted, by the teacher's name.

        Args:
            compared: teachers that evaluations alone ask.
        """
        first = next(iter(self._objectives.values()), None)
        terms: dict[str, Per] = dict(CROSS_ENTROPY if first is None else first.terms)
        names = [*self._objectives, *compared]
        if names:
            terms |= {**TeacherAgreement.terms, **OF_OWN_TEXT}
        beside = self._attending.terms if self._attending else {}
        return {"": terms | beside, **{name: terms for name in names if name}}
