"""Prepared rows with another answer: prompts taken out of them, and rows made of what was written.

The writer's side keeps the very ids that it wrote; the bytes of these go into the other side's own
template, in place of the row's answer there, and both through the same `Reconcile` as data.
Knows rows and tokenizers; not who writes, when, or what is learned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from axolotl_dskd.data.collator import LOGPROBS, WEIGHTS
from axolotl_dskd.data.outcomes import CUT, KEPT
from axolotl_dskd.data.reconcile import SPANS, STATUS, TEACHER, TEACHER_SPANS, Reconcile
from axolotl_dskd.data.runs import supervised_runs
from axolotl_dskd.data.text_in_place import TextInPlace
from axolotl_dskd.types import IGNORE_INDEX

Row = dict[str, Any]
Who = Literal["student", "teacher"]
#: Ids behind an answer up to the last supervised one, and their labels.
End = tuple[tuple[int, ...], tuple[int, ...]]

#: Why there is no row of an answer, beside what `Reconcile` says.
NOTHING_WRITTEN = "nothing written"

_SIDES: tuple[Who, Who] = ("student", "teacher")
_IDS = {"student": "input_ids", "teacher": "teacher_input_ids"}
_LABELS = {"student": "labels", "teacher": "teacher_labels"}


@dataclass(frozen=True)
class HalfPrompt:
    """One side of a row without one of its supervised answers.

    Attributes:
        ids: up to the answer, what the template writes before it included.
        text: of the row's own answer.
        end: what followed it.
        stop: where that begins in the row.
    """

    ids: list[int]
    text: bytes
    end: End
    stop: int

    @classmethod
    def each(
        cls, ids: Sequence[int], labels: Sequence[int], table: list[bytes]
    ) -> list[HalfPrompt]:
        """One up to each run of supervised tokens that has text, in order."""
        runs = supervised_runs(ids, labels, table)
        answers = [k for k, run in enumerate(runs) if run.text]
        halves = []
        for k, following in zip(answers, [*answers, len(runs)][1:], strict=True):
            positions = runs[k].positions.tolist()
            stop = 1 + max(i for i in positions if table[ids[i]])
            # End tokens may stand apart from the text.
            behind = slice(stop, 1 + int(runs[following - 1].positions[-1]))
            end = tuple(ids[behind]), tuple(labels[behind])
            halves.append(cls(list(ids[: positions[0]]), runs[k].text, end, stop))
        return halves

    def same_text(self, other: HalfPrompt) -> bool:
        """Whether the answers are of the same text but for a space that one side begins with."""
        ours, theirs = self.text, other.text
        return ours == theirs or ours == b" " + theirs or b" " + ours == theirs


@dataclass(frozen=True)
class Prompt:
    """A row without its answer; `prompt[side]` is one side of it.

    Attributes:
        halves: by side.
        number: of the row's teacher, where there are several.
    """

    halves: dict[Who, HalfPrompt]
    number: int | None = None

    def __getitem__(self, side: Who) -> HalfPrompt:
        return self.halves[side]


class AnsweredRows:
    """Takes prompts out of rows and puts answers in.

    Args:
        reconcile: of the pair.
        student, teacher: the tokenizers.
        rows: some prepared rows, from which it learns how answers end on each side.
        number: of the teacher, where there are several and the rows are its own.

    Attributes:
        prompts: how many of these rows have a prompt.
        end_ids: by side, the tokens that end an answer: its own end of sequence, and what ends the
            answers of its rows.
    """

    def __init__(
        self,
        reconcile: Reconcile,
        student: Any,
        teacher: Any,
        rows: Iterable[Row],
        number: int | None = None,
    ) -> None:
        self.reconcile = reconcile
        self.number = number
        self._tables = {"student": reconcile.student_bytes, "teacher": reconcile.teacher_bytes}
        tokenizers = {"student": student, "teacher": teacher}
        self._encode = {s: TextInPlace(tokenizers[s], self._tables[s]) for s in _SIDES}
        turns = [found for row in rows if (found := self.turns(row))]
        prompts = [found[-1] for found in turns]
        self.prompts = len(prompts)
        self._usual: dict[str, End] = {}
        self.end_ids: dict[str, list[int]] = {}
        for side in _SIDES:
            eos = tokenizers[side].eos_token_id
            own = () if eos is None else (eos,)
            ends = Counter(prompt[side].end for prompt in prompts if prompt[side].end[0])
            self._usual[side] = ends.most_common(1)[0][0] if ends else (own, own)
            first = {turn[side].end[0][0] for found in turns for turn in found if turn[side].end[0]}
            self.end_ids[side] = sorted({i for i in first if not self._tables[side][i]} | {*own})

    @property
    def teachers_own_ends(self) -> dict[int, int]:
        """Over one vocabulary: ids that end an answer in the teacher's template and not in the
        student's, and the one there that stands for each."""
        ours, theirs = (self.end_ids[side] for side in _SIDES)
        if not ours:
            return {}
        usual = self._usual["student"][0][:1]
        end = usual[0] if {*usual} & {*ours} else ours[0]
        return {index: end for index in theirs if index not in ours}

    def teachers_room(self, prompt: Prompt) -> int:
        """How many tokens the teacher can read behind its own side of a prompt."""
        return self.reconcile.teacher_limit - len(prompt["teacher"].ids)

    def prompt(self, row: Row) -> Prompt | None:
        """The row without its last supervised answer; None where it has none, or nothing before."""
        return self._last(self._halves(row))

    def _last(self, halves: dict[Who, list[HalfPrompt]]) -> Prompt | None:
        found = {side: each[-1] for side, each in halves.items() if each and each[-1].ids}
        return Prompt(found, self.number) if len(found) == len(_SIDES) else None

    def turns(self, row: Row) -> list[Prompt]:
        """The row up to each of its supervised answers, in order: what was said before stays, what
        follows is left out. The last is `prompt`; an earlier one is there only where both sides
        supervise its text as one turn."""
        halves = self._halves(row)
        if (last := self._last(halves)) is None:
            return []
        ours, theirs = (each[:-1] for each in halves.values())
        if len(ours) != len(theirs):
            return [last]
        earlier = [
            Prompt({"student": one, "teacher": other}, self.number)
            for one, other in zip(ours, theirs, strict=True)
            if one.ids and other.ids and one.same_text(other)
        ]
        return [*earlier, last]

    def alone(self, row: Row, prompt: Prompt) -> Row:
        """The row with its own answer to one of its prompts as the only supervised one, and the
        last; never longer. A row that has no other answer, or whose sides do not supervise this
        one's text as one turn, is returned as it is.

        Args:
            row: that the prompt was taken from.
            prompt: one of its turns.
        """
        halves = self._halves(row)
        if all(len(each) == 1 for each in halves.values()):
            return row
        cut = {column: row[column] for column in row if column not in (SPANS, TEACHER_SPANS)}
        for side in _SIDES:
            half = prompt[side]
            start, stop = len(half.ids), half.stop + len(half.end[0])
            cut[_IDS[side]] = _plain(row[_IDS[side]])[:stop]
            labels = _plain(row[_LABELS[side]])[:stop]
            cut[_LABELS[side]] = [IGNORE_INDEX] * start + labels[start:]
        changed = self.reconcile(cut)
        if changed.pop(STATUS) not in (KEPT, CUT):
            return row
        return cut | changed

    def _halves(self, row: Row) -> dict[Who, list[HalfPrompt]]:
        return {
            side: HalfPrompt.each(
                _plain(row[_IDS[side]]), _plain(row[_LABELS[side]]), self._tables[side]
            )
            for side in _SIDES
        }

    def row(
        self,
        prompt: Prompt,
        ids: Sequence[int],
        *,
        ended: bool,
        by: Who = "student",
        logprobs: Sequence[float] | None = None,
        weights: Sequence[float] | None = None,
    ) -> Row | str:
        """The columns of a row with an answer in place of its own, as `DualCollator` takes them;
        or why there is none: nothing was written, or the statuses of `Reconcile`.

        A cut answer supervises what was written. What follows a token that stands for no text, or
        bytes that are no UTF-8, is left out: the other side cannot read it.

        Args:
            prompt: what was answered.
            ids: what the writer wrote, its end token included.
            ended: the last of them is an end token.
            by: whose ids they are.
            logprobs: of each of the ids, where the student wrote them.
            weights: likewise, where the teacher took part in drawing (`Written.weights`).
        """
        other: Who = "teacher" if by == "student" else "student"
        count, text = _readable(ids[: len(ids) - ended], self._tables[by])
        if not text:
            return NOTHING_WRITTEN
        ended = ended and count == len(ids) - 1
        said = tuple(ids[: count + ended])
        answers = {by: (said, said), other: self._translated(prompt, by, other, text, ended)}
        row: Row = {}
        for side in _SIDES:
            before, (tokens, labels) = prompt[side].ids, answers[side]
            row[_IDS[side]] = [*before, *tokens]
            row[_LABELS[side]] = [IGNORE_INDEX] * len(before) + list(labels)
        changed = self.reconcile(row)
        status = changed.pop(STATUS)
        if status not in (KEPT, CUT):
            return str(status)
        row |= changed
        if self.number is not None:
            row[TEACHER] = self.number
        said_of_it = row["labels"][len(prompt["student"].ids) :]
        for column, values in ((LOGPROBS, logprobs), (WEIGHTS, weights)):
            if values is not None:
                kept = [x for x, y in zip(values, said_of_it, strict=False) if y >= 0]
                row[column] = np.array(kept, "<f4").tobytes()
        return row

    def _translated(
        self, prompt: Prompt, by: Who, other: Who, text: bytes, ended: bool
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids and labels of an answer on the side that did not write it."""
        # A space that one side's tokenizer or template writes before an answer, as in the row.
        spaces = {side: prompt[side].text.startswith(b" ") for side in _SIDES}
        if spaces[by] and not spaces[other]:
            text = text.removeprefix(b" ")
        elif spaces[other] and not spaces[by]:
            text = b" " + text
        ids = tuple(self._encode[other](prompt[other].ids, text))
        end, end_labels = ((), ()) if not ended else prompt[other].end
        if ended and not end:  # the row itself was cut
            end, end_labels = self._usual[other]
        return (*ids, *end), (*ids, *end_labels)


class RoutedAnswers:
    """`AnsweredRows` of several teachers: each prompt is answered in its own teacher's template.

    Args:
        each: by the teacher's number.
    """

    def __init__(self, each: Sequence[AnsweredRows]) -> None:
        self.each = each

    @property
    def prompts(self) -> int:
        """See `AnsweredRows`."""
        return sum(answered.prompts for answered in self.each)

    @property
    def end_ids(self) -> dict[str, list[int]]:
        """The tokens that end an answer of the student, which writes to all prompts alike."""
        ends = {i for answered in self.each for i in answered.end_ids["student"]}
        return {"student": sorted(ends)}

    def prompt(self, row: Row) -> Prompt | None:
        """See `AnsweredRows`."""
        return self.each[row[TEACHER]].prompt(row)

    def turns(self, row: Row) -> list[Prompt]:
        """See `AnsweredRows`."""
        return self.each[row[TEACHER]].turns(row)

    def teachers_room(self, prompt: Prompt) -> int:
        """See `AnsweredRows`."""
        return self.each[prompt.number or 0].teachers_room(prompt)

    def alone(self, row: Row, prompt: Prompt) -> Row:
        """See `AnsweredRows`."""
        return self.each[row[TEACHER]].alone(row, prompt)

    def row(self, prompt: Prompt, ids: Sequence[int], **how: Any) -> Row | str:
        """See `AnsweredRows`."""
        assert prompt.number is not None
        return self.each[prompt.number].row(prompt, ids, **how)


def _readable(ids: Sequence[int], table: list[bytes]) -> tuple[int, bytes]:
    """How many tokens of an answer stand for text that the other side can read, and that text."""
    pieces: list[bytes] = []
    for index in ids:
        if index >= len(table) or not table[index]:
            break
        pieces.append(table[index])
    text = b"".join(pieces)
    try:
        text.decode()
    except UnicodeDecodeError as error:
        # The token in which the broken character begins stays: its first bytes may be whole ones.
        text = text[: error.start]
        size = count = 0
        while size < len(text):
            size += len(pieces[count])
            count += 1
        return count, text
    return len(pieces), text


def _plain(values: Any) -> list[int]:
    return list(map(int, values))
