"""Make the two sides of a row supervise the same text, or drop the row; count both.

Student and teacher may cut a long row at different places, add a BOS or not, trim white space or
not. What one side supervises and the other does not is left unsupervised on both. Text that
differs in the middle cannot be mended: such rows are dropped, and too many of them stop the run.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from axolotl.utils.logging import get_logger
from datasets import Dataset

from axolotl_dskd import __version__
from axolotl_dskd.types import IGNORE_INDEX

LOG = get_logger(__name__)

#: More than this share of rows with different texts means that something is wrong with the pair
#: of tokenizers or templates, not with the rows.
MAX_DIFFERING_SHARE = 0.1

KEPT, CUT, EMPTY, TOO_LONG, DIFFERENT = "kept", "cut", "empty", "teacher too long", "different text"
_STATUS = "dskd_status"


@dataclass(frozen=True)
class _Run:
    """Supervised tokens in a row without a gap: their positions and where each ends in `text`."""

    positions: list[int]
    ends: list[int]
    text: bytes

    def variants(self) -> list[_Run]:
        """The run, and if its text starts with a space the run without that space.

        A sentencepiece tokenizer writes a space before a text that has none, so one leading space
        on one side alone is no difference.
        """
        if not self.text.startswith(b" "):
            return [self]
        return [self, _Run(self.positions, [max(e - 1, 0) for e in self.ends], self.text[1:])]

    def within(self, offset: int, low: int, high: int) -> list[int]:
        """Positions of the tokens inside [low, high], both counted from `offset` in the text.

        A token that stands for no text (an end token) is kept where its place is inside; at the
        very end only if the run's text ends there too.
        """
        ends_there = offset + high == len(self.text)
        kept, start = [], -offset
        for position, end in zip(self.positions, (e - offset for e in self.ends), strict=True):
            textless_at_cut = start == end == high and not ends_there
            if start >= low and end <= high and not textless_at_cut:
                kept.append(position)
            start = end
        return kept


def _supervised_runs(ids: list[int], labels: list[int], table: list[bytes]) -> list[_Run]:
    """Runs of supervised tokens; the first token of a row is predicted by nothing."""
    runs: list[_Run] = []
    positions: list[int] = []
    for i in range(1, len(labels) + 1):
        if i < len(labels) and labels[i] != IGNORE_INDEX:
            positions.append(i)
        elif positions:
            pieces = [table[ids[p]] for p in positions]
            ends, total = [], 0
            for piece in pieces:
                total += len(piece)
                ends.append(total)
            runs.append(_Run(positions, ends, b"".join(pieces)))
            positions = []
    return runs


def _joined(runs: list[_Run]) -> _Run:
    positions, ends, text = [], [], b""
    for run in runs:
        positions += run.positions
        ends += [len(text) + end for end in run.ends]
        text += run.text
    return _Run(positions, ends, text)


def _offset(text: bytes, other: bytes) -> int | None:
    """Where `other` begins inside `text` such that they agree as far as both go, or None."""
    at = text.find(other[:64]) if other else -1
    while at >= 0:
        shared = min(len(text) - at, len(other))
        if text[at : at + shared] == other[:shared]:
            return at
        at = text.find(other[:64], at + 1)
    return None


def _common(a: _Run, b: _Run) -> tuple[list[int], list[int]] | None:
    """Positions on both sides that spell one and the same text, or None if the texts differ."""
    variants = [(x, y) for x in a.variants() for y in b.variants()]
    if any(x.text == y.text for x, y in variants):
        return a.positions, b.positions
    for x, y in variants:
        at_x, at_y = _offset(x.text, y.text), _offset(y.text, x.text)
        if at_x is None and at_y is None:
            continue
        at_x, at_y = (at_x, 0) if at_x is not None else (0, at_y)
        assert at_x is not None and at_y is not None
        length = min(len(x.text) - at_x, len(y.text) - at_y)
        bounds = {e - at_x for e in [0, *x.ends]} & {e - at_y for e in [0, *y.ends]}
        shared = sorted(e for e in bounds if 0 <= e <= length)
        if len(shared) < 2:
            return [], []  # no place but one where both have a token's edge
        low, high = shared[0], shared[-1]
        return x.within(at_x, low, high), y.within(at_y, low, high)
    return None


@dataclass(frozen=True)
class Reconcile:
    """Maps a two-sided row to one whose sides supervise the same text, with its status.

    Attributes:
        student_bytes, teacher_bytes: bytes of each id (`token_bytes`).
        teacher_limit: longest teacher side, in tokens.
        truncate_teacher: cut longer ones instead of dropping the row.
        same_ids: additionally require the same ids (position-wise alignment).
    """

    student_bytes: list[bytes]
    teacher_bytes: list[bytes]
    teacher_limit: int
    truncate_teacher: bool
    same_ids: bool
    version: str = __version__  # part of the fingerprint under which rows are cached

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with its labels cut to the shared text and a `dskd_status` column."""
        labels, teacher_labels = list(row["labels"]), list(row["teacher_labels"])
        teacher_ids = list(row["teacher_input_ids"])
        too_long = len(teacher_ids) > self.teacher_limit
        if too_long:
            teacher_ids = teacher_ids[: self.teacher_limit]
            teacher_labels = teacher_labels[: self.teacher_limit]
        status = TOO_LONG
        if not too_long or self.truncate_teacher:
            status, labels, teacher_labels = self._cut(
                row["input_ids"], labels, teacher_ids, teacher_labels
            )
        # A causal teacher need not read on after its last supervised token.
        last = max((i for i, y in enumerate(teacher_labels) if y != IGNORE_INDEX), default=0) + 1
        return {
            "labels": labels,
            "teacher_input_ids": teacher_ids[:last],
            "teacher_labels": teacher_labels[:last],
            _STATUS: status,
        }

    def _cut(
        self, ids: list[int], labels: list[int], teacher_ids: list[int], teacher_labels: list[int]
    ) -> tuple[str, list[int], list[int]]:
        ours = _supervised_runs(ids, labels, self.student_bytes)
        theirs = _supervised_runs(teacher_ids, teacher_labels, self.teacher_bytes)
        ours = [run for run in ours if run.text] or ours
        theirs = [run for run in theirs if run.text] or theirs
        if not ours or not theirs:
            return EMPTY, labels, teacher_labels
        if len(ours) != len(theirs):
            ours, theirs = [_joined(ours)], [_joined(theirs)]
        keep: list[int] = []
        keep_teacher: list[int] = []
        for a, b in zip(ours, theirs, strict=True):
            common = _common(a, b)
            if common is None:
                return DIFFERENT, labels, teacher_labels
            if all(common):
                keep += common[0]
                keep_teacher += common[1]
        if not keep:
            return EMPTY, labels, teacher_labels
        before = sum(len(r.positions) for r in ours), sum(len(r.positions) for r in theirs)
        status = KEPT if before == (len(keep), len(keep_teacher)) else CUT
        labels = _only(labels, keep)
        teacher_labels = _only(teacher_labels, keep_teacher)
        if self.same_ids and [labels[i] for i in keep] != [teacher_labels[i] for i in keep_teacher]:
            return DIFFERENT, labels, teacher_labels
        return status, labels, teacher_labels


def _only(labels: list[int], positions: list[int]) -> list[int]:
    kept = [IGNORE_INDEX] * len(labels)
    for i in positions:
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
    dataset = dataset.map(reconcile, num_proc=num_proc, desc="Matching Teacher and Student Text")
    statuses = dataset[_STATUS]
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
        examples = "\n".join(_example(dataset[i], reconcile) for i in at)
        raise ValueError(
            f"{counts[DIFFERENT]} of {total} rows do not have the same supervised "
            f"{'tokens' if reconcile.same_ids else 'text'} for student and teacher. Check "
            "chat_template, dskd.teacher.chat_template, and that both tokenizers keep the text "
            f"as it is (no lower-casing or Unicode normalisation).\n{examples}"
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
    return kept.remove_columns(_STATUS)


def _example(row: dict[str, Any], reconcile: Reconcile) -> str:
    def spelled(ids: list[int], labels: list[int], table: list[bytes]) -> str:
        run = _joined(_supervised_runs(ids, labels, table))
        text = run.text.decode(errors="replace")
        return repr(text if len(text) <= 160 else f"{text[:100]} … {text[-50:]}")

    ours = spelled(row["input_ids"], row["labels"], reconcile.student_bytes)
    theirs = spelled(row["teacher_input_ids"], row["teacher_labels"], reconcile.teacher_bytes)
    return f"  student: {ours}\n  teacher: {theirs}"
