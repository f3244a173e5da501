"""One raw row through a dataset's prompt strategy twice: student's side and teacher's side."""

from __future__ import annotations

import copy
from typing import Any

from axolotl.prompt_strategies.completion import CompletionPromptTokenizingStrategy
from axolotl.prompt_tokenizers import PromptTokenizingStrategy

from axolotl_dskd import __version__
from axolotl_dskd.types import IGNORE_INDEX

Row = dict[str, list[int]]

#: A row that a strategy could make nothing of; Axolotl drops it as too short.
_NOTHING: Row = {"input_ids": [0], "labels": [IGNORE_INDEX]}


class PairedStrategy(PromptTokenizingStrategy):
    """Joins a dataset's strategy for the student with the same dataset's for the teacher.

    Every row comes out with `input_ids`, `attention_mask`, `labels` as Axolotl makes them, and
    `teacher_input_ids`, `teacher_labels`. Picklable, so it works in any of Axolotl's workers.
    """

    def __init__(
        self, student: PromptTokenizingStrategy, teacher: PromptTokenizingStrategy
    ) -> None:
        # The base class wants a prompter for itself; both strategies have their own.
        super().__init__(None, student.tokenizer)
        self.student = student
        self.teacher = teacher
        self.version = __version__  # part of the fingerprint under which rows are cached
        self.filter_rows = student.filter_rows

    @property
    def supports_batched(self) -> bool:
        """A raw row may become several (completion cuts long texts into chunks)."""
        return True

    def tokenize_prompt(self, prompt: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        """A batch of raw rows, `{column: values}`, to a batch of two-sided rows."""
        columns = list(prompt)
        pairs: list[tuple[Row, Row]] = []
        for values in zip(*prompt.values(), strict=True):
            row = dict(zip(columns, values, strict=True))
            if isinstance(self.student, CompletionPromptTokenizingStrategy):
                pairs += self._completion_chunks(row)
            else:
                # Some strategies change the row they are given.
                ours = _single(self.student, copy.deepcopy(row))
                theirs = _single(self.teacher, copy.deepcopy(row))
                pairs.append((ours, theirs) if ours and theirs else (_NOTHING, _NOTHING))
        return {
            "input_ids": [ours["input_ids"] for ours, _ in pairs],
            "attention_mask": [[1] * len(ours["input_ids"]) for ours, _ in pairs],
            "labels": [ours["labels"] for ours, _ in pairs],
            "teacher_input_ids": [theirs["input_ids"] for _, theirs in pairs],
            "teacher_labels": [theirs["labels"] for _, theirs in pairs],
        }

    def _completion_chunks(self, row: dict[str, Any]) -> list[tuple[Row, Row]]:
        """Axolotl cuts a text every `sequence_len` student tokens; the teacher gets the text of
        each piece, so that both sides of a chunk spell the same."""
        strategy, teacher = self.student, self.teacher
        assert isinstance(strategy, CompletionPromptTokenizingStrategy)
        assert isinstance(teacher, CompletionPromptTokenizingStrategy)
        text = strategy._build_full_prompt(strategy.parse_instruction_fields(row)[0], None, None)
        ids = list(strategy._tokenize(text)["input_ids"]) if text else []
        if not ids:
            return [(_NOTHING, _NOTHING)]
        spans = strategy.tokenizer(
            text, truncation=True, max_length=strategy.max_length, return_offsets_mapping=True
        )["offset_mapping"]
        # Special tokens, also an end token that Axolotl appended, have no place in the text.
        spans += [(0, 0)] * (len(ids) - len(spans))
        pairs = []
        for start in range(0, len(ids), strategy.sequence_len):
            end = min(start + strategy.sequence_len, len(ids))
            inside = [span for span in spans[start:end] if span[0] < span[1]]
            piece = text[inside[0][0] : inside[-1][1]] if inside else ""
            theirs = _plain(teacher._tokenize(piece, add_eos_token=end == len(ids)))
            chunk = {"input_ids": ids[start:end], "labels": ids[start:end]}
            pairs.append((chunk, theirs) if theirs else (_NOTHING, _NOTHING))
        return pairs


def _single(strategy: PromptTokenizingStrategy, row: dict[str, Any]) -> Row | None:
    """One row's ids and labels, or None where the strategy makes nothing of it.

    Raises:
        ValueError: the strategy makes several rows of one (other than completion).
    """
    if not strategy.supports_batched:
        out = strategy.tokenize_prompt(row)
        return _plain(out) if out and out.get("input_ids") else None
    out = strategy.tokenize_prompt({key: [value] for key, value in row.items()})
    if not out or not out.get("input_ids"):
        return None
    if len(out["input_ids"]) != 1:
        raise ValueError(
            f"{type(strategy).__name__} makes {len(out['input_ids'])} rows of one, so it is not "
            "clear which parts of the two sides belong together. Split the rows beforehand."
        )
    return _plain({key: values[0] for key, values in out.items()})


def _plain(out: Any) -> Row | None:
    if not len(out["input_ids"]):
        return None
    return {"input_ids": list(out["input_ids"]), "labels": list(out["labels"])}
