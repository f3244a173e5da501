"""Make the two sides of a row supervise the same text, or drop the row; count both.

Student and teacher may cut a long row at different places, add a BOS or not, trim white space or
not. What one side supervises and the other does not is left unsupervised on both. Text that
differs in the middle cannot be mended: such rows are dropped, and too many of them stop the run.

The rows that are kept carry which bytes of that text each supervised token stands for
(`byte_spans`). Nothing here knows what is to be learned from them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from axolotl.utils.logging import get_logger
from datasets import Dataset

from axolotl_dskd import __version__
from axolotl_dskd.data.byte_spans import IntArray, give_textless_tokens_room
from axolotl_dskd.data.shared_text import (
    NO_TOKENS,
    Part,
    Run,
    common_text,
    joined,
    lay_out,
    supervised_runs,
)
from axolotl_dskd.types import IGNORE_INDEX

LOG = get_logger(__name__)

#: More than this share of rows with different texts means that something is wrong with the pair
#: of tokenizers or templates, not with the rows.
MAX_DIFFERING_SHARE = 0.1

KEPT, CUT, EMPTY, TOO_LONG, DIFFERENT = "kept", "cut", "empty", "teacher too long", "different text"
#: Column with a row's status until rows are dropped.
STATUS = "dskd_status"

#: Raised when prepared rows change, so that none prepared by an older version is taken for them.
ROW_FORMAT = 3

#: Columns of a prepared row: the spans of its supervised tokens, in order, as `Spans.to_bytes`.
SPANS, TEACHER_SPANS = "dskd_byte_spans", "dskd_teacher_byte_spans"


@dataclass(frozen=True)
class Reconcile:
    """Maps a two-sided row to one whose sides supervise the same text, with its status.

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

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with its labels cut to the shared text, its spans, and a status."""
        labels, teacher_labels = list(row["labels"]), list(row["teacher_labels"])
        teacher_ids = list(row["teacher_input_ids"])
        too_long = len(teacher_ids) > self.teacher_limit
        if too_long:
            teacher_ids = teacher_ids[: self.teacher_limit]
            teacher_labels = teacher_labels[: self.teacher_limit]
        status, sides = TOO_LONG, (NO_TOKENS, NO_TOKENS)
        if not too_long or self.truncate_teacher:
            status, sides = self._share(row["input_ids"], labels, teacher_ids, teacher_labels)
        if status in (KEPT, CUT):
            labels = _only(labels, sides[0].positions)
            teacher_labels = _only(teacher_labels, sides[1].positions)
        # A causal teacher need not read on after its last supervised token.
        last = len(teacher_labels)
        while last > 1 and teacher_labels[last - 1] == IGNORE_INDEX:
            last -= 1
        return {
            "labels": labels,
            "teacher_input_ids": teacher_ids[:last],
            "teacher_labels": teacher_labels[:last],
            SPANS: sides[0].spans.to_bytes(),
            TEACHER_SPANS: sides[1].spans.to_bytes(),
            STATUS: status,
        }

    def _share(
        self, ids: list[int], labels: list[int], teacher_ids: list[int], teacher_labels: list[int]
    ) -> tuple[str, tuple[Part, Part]]:
        """Status of the row, and the tokens of both sides that stay supervised."""
        our_runs = supervised_runs(ids, labels, self.student_bytes, self.student_dummy_spaces)
        their_runs = supervised_runs(
            teacher_ids, teacher_labels, self.teacher_bytes, self.teacher_dummy_spaces
        )
        ours = [run for run in our_runs if run.text] or our_runs
        theirs = [run for run in their_runs if run.text] or their_runs
        nothing = NO_TOKENS, NO_TOKENS
        if not ours or not theirs:
            return EMPTY, nothing
        if len(ours) != len(theirs):
            ours, theirs = [joined(ours)], [joined(theirs)]
        parts = []
        for a, b in zip(ours, theirs, strict=True):
            common = common_text(a, b)
            if common is None:
                return DIFFERENT, nothing
            parts.append(common if all(map(len, common)) else nothing)
        kept = [sum(len(common[side]) for common in parts) for side in (0, 1)]
        if not any(kept):
            return EMPTY, nothing
        whole = kept == [_count(ours), _count(theirs)]
        # End tokens that stand apart from any text: all of them, or those before a cut.
        apart = [
            _apart(runs, matched, [common[side] for common in parts], whole)
            for side, (runs, matched) in enumerate(((our_runs, ours), (their_runs, theirs)))
        ]
        sides = lay_out(parts, (ours, theirs), (apart[0], apart[1]))
        before = _count(our_runs), _count(their_runs)
        status = KEPT if before == (len(sides[0]), len(sides[1])) else CUT
        found, expected = (
            [side_labels[i] for i in side.positions]
            for side, side_labels in zip(sides, (labels, teacher_labels), strict=True)
        )
        spans = give_textless_tokens_room(
            sides[0].spans,
            np.array([not self.student_bytes[y] for y in found], bool),
            sides[1].spans,
            np.array([not self.teacher_bytes[y] for y in expected], bool),
        )
        return status, (replace(sides[0], spans=spans[0]), replace(sides[1], spans=spans[1]))


def _count(runs: list[Run]) -> int:
    return sum(len(run.positions) for run in runs)


def _apart(runs: list[Run], matched: list[Run], parts: list[Part], whole: bool) -> IntArray:
    """Positions of the runs without text that no text was matched with."""
    places = np.concatenate([run.positions for run in runs])
    taken = np.concatenate([run.positions for run in matched])
    places = places[~np.isin(places, taken, assume_unique=True)]
    last = max(int(part.positions[-1]) for part in parts if len(part))
    return places if whole else places[places < last]


def _only(labels: list[int], positions: IntArray) -> list[int]:
    kept = [IGNORE_INDEX] * len(labels)
    for i in positions.tolist():
        kept[i] = labels[i]
    return kept


def reconcile_dataset(
    dataset: Dataset, reconcile: Reconcile, *, num_proc: int | None, raise_if_long: bool
) -> Dataset:
    """Apply `reconcile` to all rows, drop what cannot be used, and log how many and why.

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
    total = sum(counts.values())
    if raise_if_long and counts[TOO_LONG]:
        raise ValueError(
            f"excess_length_strategy is raise, and {counts[TOO_LONG]} of {total} rows have more "
            f"than {reconcile.teacher_limit} teacher tokens. Shorten them, raise "
            "dskd.teacher.sequence_len, or use drop or truncate."
        )
    if counts[DIFFERENT] > MAX_DIFFERING_SHARE * total:
        at = [i for i, status in enumerate(statuses) if status == DIFFERENT][:3]
        examples = "\n".join(differing_example(dataset[i], reconcile) for i in at)
        raise ValueError(
            f"{counts[DIFFERENT]} of {total} rows do not have the same supervised text for "
            "student and teacher. Check chat_template, dskd.teacher.chat_template, and that both "
            "tokenizers keep the text as it is (no lower-casing or Unicode normalisation).\n"
            f"{examples}"
        )
    kept = dataset.select([i for i, s in enumerate(statuses) if s in (KEPT, CUT)])
    if not len(kept):
        raise ValueError(
            f"none of the {total} rows can be distilled on: {dict(counts)}. `empty` means that "
            "the template marks nothing to train on; see roles_to_train and train_on_inputs."
        )
    log = LOG.info if counts[KEPT] == total else LOG.warning
    log(
        f"Distillation rows: {len(kept)} of {total} kept, {counts[CUT]} of them cut to the text "
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
