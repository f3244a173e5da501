"""Make the two sides of a row supervise the same text, or drop the row; count both.

Student and teacher may cut a long row at different places, add a BOS or not, trim white space or
not. What one side supervises and the other does not is left unsupervised on both. Text that
differs in the middle cannot be mended: such rows are dropped, and too many of them stop the run.

The rows that are kept carry which bytes of that text each supervised token stands for
(`byte_spans`). Nothing here knows what is to be learned from them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from axolotl.utils.logging import get_logger
from datasets import Dataset
from numpy.typing import NDArray

from axolotl_dskd import __version__
from axolotl_dskd.data.byte_spans import IntArray, give_textless_tokens_room
from axolotl_dskd.data.outcomes import CUT, DIFFERENT, EMPTY, KEPT, TOO_LONG, refusal
from axolotl_dskd.data.runs import NO_TOKENS, Part, Run, joined, lay_out, supervised_runs
from axolotl_dskd.data.shared_text import common_text
from axolotl_dskd.types import IGNORE_INDEX

LOG = get_logger(__name__)

#: Column with a row's status until rows are dropped.
STATUS = "dskd_status"

#: Raised when prepared rows change, so that none prepared by an older version is taken for them.
ROW_FORMAT = 5

#: Columns of a prepared row: the spans of its supervised tokens, in order, as `Spans.to_bytes`.
SPANS, TEACHER_SPANS = "dskd_byte_spans", "dskd_teacher_byte_spans"
#: Column of a row that asks one of several teachers: its number, in the configuration's order.
TEACHER = "dskd_teacher"


@dataclass(frozen=True)
class Half:
    """One side of a row: what of it is supervised, and which of that is compared by its text.

    Attributes:
        ids, labels: of the tokens of the side.
        table: bytes of each id.
        runs: all runs of supervised tokens.
        matched: those that are matched with the other side's, or one that joins them.
    """

    ids: Sequence[int]
    labels: Sequence[int]
    table: list[bytes]
    runs: list[Run]
    matched: list[Run]

    @classmethod
    def of(
        cls, ids: Sequence[int], labels: Sequence[int], table: list[bytes], dummy_spaces: bool
    ) -> Half:
        """A side with the runs that have text to be matched (all, where none has any)."""
        runs = supervised_runs(ids, labels, table, dummy_spaces)
        return cls(ids, labels, table, runs, [run for run in runs if run.text] or runs)

    def as_one_run(self) -> Half:
        """The side with one run to be matched: the texts of all turns as one."""
        return replace(self, matched=[joined(self.matched)])

    def matches_whole(self, parts: list[Part]) -> bool:
        """Whether `parts` are all tokens of the matched runs."""
        return sum(map(len, parts)) == sum(len(run.positions) for run in self.matched)

    def apart(self, before: int | None) -> IntArray:
        """Positions of the runs without text that no text was matched with: end tokens.

        Args:
            before: only those before this position; None for all.
        """
        supervised, matched = (
            np.concatenate([run.positions for run in runs]) for runs in (self.runs, self.matched)
        )
        positions = supervised[~np.isin(supervised, matched, assume_unique=True)]
        return positions if before is None else positions[positions < before]

    def keeps_all(self, part: Part) -> bool:
        """Whether `part` is everything that the side supervises."""
        return len(part) == sum(len(run.positions) for run in self.runs)

    def textless(self, part: Part) -> NDArray[np.bool_]:
        """[n] which tokens of a part stand for no text."""
        return np.array([not self.table[self.labels[i]] for i in part.positions.tolist()], bool)

    def labels_of(self, part: Part) -> list[int]:
        """The side's labels, with all but the part's unsupervised."""
        kept = [IGNORE_INDEX] * len(self.labels)
        for i in part.positions.tolist():
            kept[i] = self.labels[i]
        return kept


@dataclass(frozen=True)
class Reconcile:
    """Maps a two-sided row to one whose sides supervise the same text, with its status.

    A row may come from anywhere: from a prepared data set, or from an answer that a model has just
    written, with the ids that it wrote.

    Attributes:
        student_bytes, teacher_bytes: bytes of each id (`token_bytes`).
        teacher_limit: longest teacher side, in tokens.
        truncate_teacher: cut longer ones instead of dropping the row.
        student_dummy_spaces, teacher_dummy_spaces: see `writes_dummy_space`.
    """

    student_bytes: list[bytes]
    teacher_bytes: list[bytes]
    teacher_limit: int
    truncate_teacher: bool
    student_dummy_spaces: bool = False
    teacher_dummy_spaces: bool = False
    version: str = (
        f"{__version__}/{ROW_FORMAT}"  # part of the fingerprint under which rows are cached
    )

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What changes in one row: labels cut to the shared text, a shorter teacher's side, spans.

        Args:
            row: `input_ids`, `labels`, `teacher_input_ids` and `teacher_labels`, sequences of
                integers; labels are the ids themselves or -100. What else it has is not read.

        Returns:
            `labels`, `teacher_input_ids`, `teacher_labels`, the columns of both sides' spans, and
            the status, which says whether the row can be used (`KEPT`, `CUT`). Updated with these,
            a usable row is one that `DualCollator` takes.
        """
        ids, labels, teacher_ids, teacher_labels = (
            list(row[column])
            for column in ("input_ids", "labels", "teacher_input_ids", "teacher_labels")
        )
        too_long = len(teacher_ids) > self.teacher_limit
        teacher_ids = teacher_ids[: self.teacher_limit]
        teacher_labels = teacher_labels[: self.teacher_limit]
        status, shared, teacher_shared = TOO_LONG, NO_TOKENS, NO_TOKENS
        if not too_long or self.truncate_teacher:
            student = Half.of(ids, labels, self.student_bytes, self.student_dummy_spaces)
            teacher = Half.of(
                teacher_ids, teacher_labels, self.teacher_bytes, self.teacher_dummy_spaces
            )
            status, shared, teacher_shared = _share(student, teacher)
            if status in (KEPT, CUT):
                labels = student.labels_of(shared)
                teacher_labels = teacher.labels_of(teacher_shared)
        # A causal teacher need not read on after its last supervised token.
        last = len(teacher_labels)
        while last > 1 and teacher_labels[last - 1] == IGNORE_INDEX:
            last -= 1
        return {
            "labels": labels,
            "teacher_input_ids": teacher_ids[:last],
            "teacher_labels": teacher_labels[:last],
            SPANS: shared.spans.to_bytes(),
            TEACHER_SPANS: teacher_shared.spans.to_bytes(),
            STATUS: status,
        }


def _share(student: Half, teacher: Half) -> tuple[str, Part, Part]:
    """Status of the row, and the tokens of student and teacher that stay supervised."""
    if not student.matched or not teacher.matched:
        return EMPTY, NO_TOKENS, NO_TOKENS
    if len(student.matched) != len(teacher.matched):
        student, teacher = student.as_one_run(), teacher.as_one_run()
    ours: list[Part] = []
    theirs: list[Part] = []
    for run, teacher_run in zip(student.matched, teacher.matched, strict=True):
        common = common_text(run, teacher_run)
        if common is None:
            return DIFFERENT, NO_TOKENS, NO_TOKENS
        # Tokens that only one side has left are none that both share.
        part, teacher_part = common if all(map(len, common)) else (NO_TOKENS, NO_TOKENS)
        ours.append(part)
        theirs.append(teacher_part)
    if not any(map(len, ours)):
        return EMPTY, NO_TOKENS, NO_TOKENS
    # End tokens that stand apart from any text: all of them, or those before a cut.
    whole = student.matches_whole(ours) and teacher.matches_whole(theirs)
    apart, teacher_apart = (
        half.apart(before=None if whole else _last_position(parts))
        for half, parts in ((student, ours), (teacher, theirs))
    )
    shared = lay_out(ours, student.matched, apart)
    teacher_shared = lay_out(theirs, teacher.matched, teacher_apart)
    keeps_all = student.keeps_all(shared) and teacher.keeps_all(teacher_shared)
    spans, teacher_spans = give_textless_tokens_room(
        shared.spans,
        student.textless(shared),
        teacher_shared.spans,
        teacher.textless(teacher_shared),
    )
    return (
        KEPT if keeps_all else CUT,
        replace(shared, spans=spans),
        replace(teacher_shared, spans=teacher_spans),
    )


def _last_position(parts: list[Part]) -> int:
    return max(int(part.positions[-1]) for part in parts if len(part))


def reconcile_dataset(
    dataset: Dataset,
    reconcile: Reconcile,
    *,
    num_proc: int | None,
    raise_if_long: bool,
    teacher: str = "",
) -> Dataset:
    """Apply `reconcile` to all rows, drop what cannot be used, and log how many and why.

    Args:
        teacher: its name, where there are several.

    Raises:
        ValueError: no row is left; more than a tenth of them differ in text (with three
            examples); a teacher side is too long and `raise_if_long`.
    """
    if not len(dataset):
        raise ValueError(
            "no row is left to distil on: Axolotl dropped all of them as longer than sequence_len "
            "or as empty. Raise sequence_len, or set excess_length_strategy: truncate."
        )
    dataset = dataset.map(reconcile, num_proc=num_proc, desc="Matching Teacher and Student Text")
    statuses = dataset[STATUS]
    counts = Counter(statuses)
    total = len(dataset)
    if raise_if_long and counts[TOO_LONG]:
        raise ValueError(
            f"excess_length_strategy is raise, and {counts[TOO_LONG]} of {total} rows have more "
            f"than {reconcile.teacher_limit} teacher tokens. Shorten them, raise "
            "dskd.teacher.sequence_len, or use drop or truncate."
        )
    at = [i for i, status in enumerate(statuses) if status == DIFFERENT][:3]
    if why := refusal(counts, [differing_example(dataset[i], reconcile) for i in at]):
        raise ValueError(why)
    kept = dataset.select([i for i, s in enumerate(statuses) if s in (KEPT, CUT)])
    log = LOG.info if counts[KEPT] == total else LOG.warning
    log(
        f"Distillation rows{f' of {teacher}' if teacher else ''}: {len(kept)} of {total} kept, "
        f"{counts[CUT]} of them cut to the text "
        f"that both sides supervise; dropped: {counts[EMPTY]} without supervised text, "
        f"{counts[TOO_LONG]} longer than {reconcile.teacher_limit} teacher tokens, "
        f"{counts[DIFFERENT]} whose texts differ"
    )
    return kept.remove_columns(STATUS)


def differing_example(row: dict[str, Any], reconcile: Reconcile) -> str:
    """The supervised texts of both sides of a row, in two lines."""

    def spelled(ids: list[int], labels: list[int], table: list[bytes]) -> str:
        run = joined(supervised_runs(ids, labels, table))
        text = run.text.decode(errors="replace")
        return repr(text if len(text) <= 160 else f"{text[:100]} … {text[-50:]}")

    ours = spelled(row["input_ids"], row["labels"], reconcile.student_bytes)
    theirs = spelled(row["teacher_input_ids"], row["teacher_labels"], reconcile.teacher_bytes)
    return f"  student: {ours}\n  teacher: {theirs}"
