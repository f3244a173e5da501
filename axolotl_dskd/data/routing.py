"""Rows that each ask one of several teachers: who that is, and each row with its own teacher.

With one teacher nothing here is used, and rows carry no number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from axolotl.prompt_tokenizers import PromptTokenizingStrategy
from datasets import Dataset, concatenate_datasets

from axolotl_dskd import __version__
from axolotl_dskd.config import RouteConfig, about_teacher
from axolotl_dskd.data.paired import PairedStrategy
from axolotl_dskd.data.reconcile import TEACHER, Reconcile, reconcile_dataset

#: Column with a row's place until the rows of all teachers are together again.
_PLACE = "dskd_place"


class RoutedStrategy(PromptTokenizingStrategy):
    """Prepares each row for its own teacher.

    Args:
        pairs: strategies by the teacher's name; of one teacher alone where all rows are its own.
        names: of all teachers, in their order.
        field: column that names a row's teacher; None: there is one pair.
    """

    def __init__(
        self, pairs: Mapping[str, PairedStrategy], names: Sequence[str], field: str | None
    ) -> None:
        first = next(iter(pairs.values()))
        super().__init__(None, first.tokenizer)
        self.pairs, self.names, self.field = dict(pairs), list(names), field
        self.version = __version__  # part of the fingerprint under which rows are cached
        self.filter_rows = first.filter_rows

    @property
    def supports_batched(self) -> bool:
        """A raw row may become several."""
        return True

    def tokenize_prompt(self, prompt: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """A batch of raw rows, `{column: values}`, to a batch of two-sided rows with `TEACHER`."""
        made: dict[str, list[Any]] = {}
        for number in range(len(next(iter(prompt.values())))):
            row = {column: values[number : number + 1] for column, values in prompt.items()}
            name = next(iter(self.pairs)) if self.field is None else row[self.field][0]
            columns: dict[str, list[Any]] = {**self.pairs[name].tokenize_prompt(row)}
            columns[TEACHER] = [self.names.index(name)] * len(columns["input_ids"])
            for column, values in columns.items():
                made.setdefault(column, []).extend(values)
        return made


def teachers_of(
    dataset: Any, entry: Mapping[str, Any], route: RouteConfig, names: Sequence[str]
) -> list[str]:
    """The names of the teachers that rows of a raw data set may ask: all, or one.

    Args:
        dataset: its rows.
        entry: of `datasets:`.
        names: of all teachers.

    Raises:
        ValueError: the data set has no teacher, or rows name none, with three examples.
    """
    alone = route.of_dataset(entry)
    if alone is not None:
        return [alone]
    field, path = route.field, entry.get("path")
    if field not in dataset.column_names:
        raise ValueError(
            f"data set {path} has no column {field!r}, in which dskd.route.field looks for each "
            f"row's teacher; it has {', '.join(dataset.column_names)}. Name another column, or "
            "route by `datasets:`."
        )
    nobody = [(k, value) for k, value in enumerate(dataset[field]) if value not in names]
    if nobody:
        examples = "; ".join(f"row {k} has {value!r}" for k, value in nobody[:3])
        raise ValueError(
            f"{len(nobody)} of {len(dataset)} rows of data set {path} name no teacher in their "
            f"column {field!r}: {examples}. The teachers are {', '.join(names)}: correct these "
            "rows, take them out, or add the teacher to dskd.teachers."
        )
    return list(names)


def rows_of_teacher(dataset: Any, number: int) -> Any:
    """The rows of a prepared data set that ask this teacher; all where there is one teacher."""
    if TEACHER not in (getattr(dataset, "column_names", None) or ()):
        return dataset
    return dataset.select(np.flatnonzero(_numbers(dataset) == number))


def reconcile_by_teacher(
    dataset: Dataset, reconciles: Mapping[str, Reconcile], **options: Any
) -> Dataset:
    """`reconcile_dataset` with what each row's own teacher needs; the order of rows stays.

    Args:
        reconciles: by the teacher's name, in their order.
        options: for `reconcile_dataset`.

    Raises:
        ValueError: see there; too many rows of one teacher are enough.
    """
    if TEACHER not in dataset.column_names or not len(dataset):
        return reconcile_dataset(dataset, next(iter(reconciles.values())), **options)
    placed = dataset.add_column(_PLACE, np.arange(len(dataset)))
    parts = []
    for number, (name, reconcile) in enumerate(reconciles.items()):
        rows = rows_of_teacher(placed, number)
        if len(rows):
            with about_teacher(name):
                parts.append(reconcile_dataset(rows, reconcile, teacher=name, **options))
    together = concatenate_datasets(parts)
    order = np.argsort(together.with_format("numpy")[_PLACE][:])
    return together.select(order).remove_columns(_PLACE)


def in_their_places(parts: Sequence[Any], dataset: Any) -> Any:
    """Rows that were taken apart by teacher, changed but none dropped, as they were before.

    Args:
        parts: `rows_of_teacher` for each number, changed.
        dataset: of which they are the parts.
    """
    order = np.argsort(np.argsort(_numbers(dataset), kind="stable"), kind="stable")
    return concatenate_datasets([part for part in parts if len(part)]).select(order)


def _numbers(dataset: Any) -> np.ndarray:
    numbers: np.ndarray = dataset.with_format("numpy")[TEACHER][:]
    return numbers
