"""What a running comparison says: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

#: Seconds between two plain lines of a run.
_PLAIN_SECONDS = 15.0


class Reporter:
    """Use as a context manager.

    Args:
        console: where to.
        names: of all runs.
    """

    def __init__(self, console: Console, names: Sequence[str]) -> None:
        self.console = console
        self.plain = not console.is_terminal
        self.width = max(map(len, names), default=0)
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            console=console,
            disable=self.plain,
        )
        self.tasks = {
            name: self.bar.add_task(name.ljust(self.width), total=1.0, note="waiting", start=False)
            for name in names
        }
        self.said: dict[str, float] = {}

    def __enter__(self) -> Reporter:
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def update(self, name: str, share: float, note: str) -> None:
        """Where a run is."""
        task = self.tasks[name]
        if not self.bar.tasks[task].started:
            self.bar.start_task(task)
        changed = self.bar.tasks[task].fields["note"] != note
        self.bar.update(task, completed=share, note=note)
        now = time.monotonic()
        if self.plain and changed and now - self.said.get(name, 0.0) > _PLAIN_SECONDS:
            self.said[name] = now
            self.say(f"{name}: {note}")

    def finished(self, name: str, note: str) -> None:
        """A run ended well."""
        self.bar.update(self.tasks[name], completed=1.0, note=note)
        self.bar.stop_task(self.tasks[name])
        if self.plain:
            self.say(f"{name}: {note}")

    def failed(self, name: str, tail: str, log: Path) -> None:
        """A run ended badly: what it said last."""
        self.bar.update(self.tasks[name], note="failed")
        self.bar.stop_task(self.tasks[name])
        self.say(f"{tail}\n{name} failed; its whole log: {log}")

    def say(self, text: str) -> None:
        """A line of plain text."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
