"""Which kept rows' teachers are told of them, and of those that are kept no more."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from axolotl_dskd.data.reconcile import TEACHER
from axolotl_dskd.teacher.kept import KeepingTeacher, row_key

Row = dict[str, Any]


class TeachersMemory:
    """Tells each teacher of the rows that ask it.

    Args:
        teachers: by their numbers; one alone is asked by all rows.
    """

    def __init__(self, teachers: Sequence[KeepingTeacher]) -> None:
        self.teachers = teachers

    def turn(self, kept: Iterable[Row], gone: Iterable[Row]) -> None:
        """Rows that are kept from now on, and those that are kept no more."""
        for row in kept:
            self._of(row).keep([row_key(row)])
        for row in gone:
            self._of(row).forget([row_key(row)])

    def fetch(self, rows: Sequence[Row]) -> None:
        """Have at hand what is known of kept rows that this rank will see now; on every rank."""
        for teacher in self.teachers:
            teacher.fetch([row_key(row) for row in rows if self._of(row) is teacher])

    def _of(self, row: Row) -> KeepingTeacher:
        return self.teachers[row.get(TEACHER, 0)]
