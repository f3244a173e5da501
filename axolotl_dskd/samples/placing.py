"""Puts written rows in the places of a step's rows, within what a row may hold.

A row that finds no room, or of whose answer none can be made, leaves the one that stands there.
Knows rows and places; not what is answered when, or by whom.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from axolotl_dskd.data.answers import AnsweredRows, Prompt, RoutedAnswers
from axolotl_dskd.data.collator import GROUP, fill_columns
from axolotl_dskd.generation import Answer
from axolotl_dskd.samples.asking import NO_ROOM, Place
from axolotl_dskd.samples.fit import longest_that_fit
from axolotl_dskd.samples.tally import Tally

Row = dict[str, Any]


@dataclass
class Placing:
    """See the module.

    Attributes:
        answered: makes rows of answers.
        max_length: of a padded or packed row, in the student's tokens.
        tally: what is counted.
    """

    answered: AnsweredRows | RoutedAnswers
    max_length: int
    tally: Tally

    def answers(
        self, places: Sequence[Place], answers: Sequence[Answer], columns: list[str]
    ) -> list[Row]:
        """Put the answers of a micro-batch in where they can be used; these rows.

        Args:
            places: what was asked.
            answers: to each of them.
            columns: that the rows of the step have beside the answer's.
        """
        for answer in answers:
            self.tally.answer(answer)
        bins: dict[int, list[tuple[Place, Answer]]] = {}
        for place, answer in zip(places, answers, strict=True):
            bins.setdefault(id(place.bin), []).append((place, answer))
        rows: list[Row] = []
        for found in bins.values():
            longest, bin = self._longest(found), found[0][0].bin
            made = {
                place.at: row
                for place, answer in found
                if (row := self._row(place.prompt, answer, longest, columns)) is not None
            }
            lengths = [len(made.get(at, row)["input_ids"]) for at, row in enumerate(bin)]
            if sum(lengths) > max(self.max_length, sum(len(r["input_ids"]) for r in bin)):
                for _ in made:  # beside the data's answers, where others could not be used
                    self._refuse(NO_ROOM)
                continue
            for place, _ in found:
                if (row := made.get(place.at)) is None:
                    continue
                bin[place.at] = row
                if (preferred := place.preferred) is not None:
                    # Never longer than the row whose place it takes.
                    preferred.bin[preferred.at] = preferred.row
                    fill_columns(preferred.row, columns)
                    row[GROUP] = preferred.row[GROUP] = id(preferred.row)
            rows += made.values()
        self.tally.count("written", len(rows))
        return rows

    def kept(self, bins: list[list[Row]], rows: list[Row], columns: list[str]) -> None:
        """Put kept rows in the places of a micro-batch's, as far as they fit there.

        Args:
            bins: packed or padded rows of samples.
            rows: as many as these have samples.
            columns: as above.
        """
        for bin in bins:
            mine, rows = rows[: len(bin)], rows[len(bin) :]
            length = sum(len(row["input_ids"]) for row in bin)
            limit = max(self.max_length, length)
            for at, row in enumerate(mine):
                longer = len(row["input_ids"]) - len(bin[at]["input_ids"])
                if length + longer > limit:
                    self.tally.refused[NO_ROOM] += 1
                    continue
                length += longer
                bin[at] = dict(row)
                fill_columns(bin[at], columns)
                self.tally.count("kept")

    def _longest(self, found: list[tuple[Place, Answer]]) -> int:
        """How long answers may be so that their packed row stays within the limit."""
        bin = found[0][0].bin
        changed = {place.at for place, _ in found}
        fixed = sum(len(row["input_ids"]) for k, row in enumerate(bin) if k not in changed)
        fixed += sum(len(place.prompt["student"].ids) for place, _ in found)
        return longest_that_fit([len(answer.ids) for _, answer in found], self.max_length - fixed)

    def _row(self, prompt: Prompt, answer: Answer, longest: int, columns: list[str]) -> Row | None:
        ids, ended = answer.ids, answer.ended
        if longest <= 0:
            self._refuse(NO_ROOM)
            return None
        if len(ids) > longest:
            ids, ended = ids[:longest], False
            self.tally.count("cut")
        row = self.answered.row(
            prompt, ids, ended=ended, logprobs=answer.logprobs, weights=answer.weights
        )
        if isinstance(row, str):
            self._refuse(row)
            return None
        fill_columns(row, columns)
        return row

    def _refuse(self, why: str) -> None:
        self.tally.refused[why] += 1
        self.tally.count("refused")
