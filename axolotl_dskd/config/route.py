"""`dskd.route`: which of several teachers a row asks."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

from pydantic import Field, model_validator

from axolotl_dskd.config.base import Block

#: A teacher's name: it stands in the names of metrics and of tensors in checkpoints.
TeacherName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class RouteConfig(Block):
    """Which teacher a row asks: by a column of the row, or by the data set that it is from."""

    field: str | None = Field(
        None, description="Column of the raw rows that holds the name of the row's teacher."
    )
    datasets: dict[str, TeacherName] | None = Field(
        None,
        description="Teacher of each entry of `datasets:` and `test_datasets:`, by the entry's "
        "`name`, where that is listed here, else by its `path`.",
    )

    @model_validator(mode="after")
    def _one_way(self) -> RouteConfig:
        if (self.field is None) == (self.datasets is None):
            raise ValueError(
                "dskd.route needs one of both: `field:`, a column that names each row's teacher, "
                "or `datasets: {path: teacher}`."
            )
        return self

    def of_dataset(self, entry: Mapping[str, Any]) -> str | None:
        """The teacher of all rows of an entry of `datasets:`; None: each row names its own.

        Raises:
            ValueError: the entry has no teacher.
        """
        if self.datasets is None:
            return None
        for key in ("name", "path"):
            if (found := self.datasets.get(str(entry.get(key)))) is not None:
                return found
        raise ValueError(
            f"dskd.route.datasets has no teacher for the data set {entry.get('path')!r}. Add\n"
            f"    {entry.get('path')}: <teacher>"
        )

    def check_datasets(self, entries: Collection[Mapping[str, Any]]) -> None:
        """Refuse data sets without teacher, and names of data sets that are not there.

        Args:
            entries: of `datasets:` and `test_datasets:`, as they stand in the YAML.

        Raises:
            ValueError: see above.
        """
        if self.datasets is None:
            return
        known: set[str] = set()
        for entry in entries:
            names = entry.get("name")
            for name in names if isinstance(names, list) else [names]:
                self.of_dataset({**entry, "name": name})
                known |= {str(name), str(entry.get("path"))}
        if unknown := sorted(self.datasets.keys() - known):
            raise ValueError(
                f"dskd.route.datasets names {', '.join(unknown)}, which is neither the path nor "
                "the name of a data set. Correct it; the data sets are "
                f"{', '.join(str(entry.get('path')) for entry in entries)}."
            )


@contextmanager
def about_teacher(name: str) -> Iterator[None]:
    """Say of which of several teachers an error is; `name` is empty where there is only one.

    Raises:
        ValueError: with the name in front.
    """
    try:
        yield
    except ValueError as error:
        if not name:
            raise
        raise ValueError(f"dskd.teachers.{name}: {error}") from error
