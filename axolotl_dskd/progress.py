"""Progress of a long step: a bar with rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

_PLAIN_SECONDS = 10.0
#: Steps shorter than this say nothing on the way.
_QUIET_SECONDS = 1.0


class Progress:
    """Use as a context manager and call `advance`.

    Args:
        what: the step, as users call it.
        total: of `unit` in the whole step.
        unit: "tokens", "bytes", "samples", …
    """

    def __init__(self, what: str, total: int, unit: str) -> None:
        self.what, self.total, self.unit = what, max(total, 1), unit
        self.done = 0
        self._bar: Any = None

    def __enter__(self) -> Progress:
        self._began = self._said = time.monotonic()
        if sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.TextColumn("{task.percentage:>3.0f}%  {task.fields[rate]}"),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(self.what, total=self.total, rate="")
        return self

    def advance(self, count: int) -> None:
        """Count some more as done."""
        self.done += count
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, rate=self._rate())
        elif now - self._said >= _PLAIN_SECONDS and self.done < self.total:
            self._said = now
            left = (now - self._began) * (self.total - self.done) / max(self.done, 1)
            self._print(f"{self._rate()}, {duration(left)} left")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None and time.monotonic() - self._began >= _QUIET_SECONDS:
            self._print(f"{self._rate()}, took {duration(time.monotonic() - self._began)}")

    def _print(self, rest: str) -> None:
        done, total = quantity(self.done, self.unit), quantity(self.total, self.unit)
        done = done.removesuffix(f" {self.unit}")
        share = self.done / self.total
        print(f"{self.what}: {done} of {total} ({share:.0%}), {rest}", file=sys.stderr, flush=True)

    def _rate(self) -> str:
        seconds = max(time.monotonic() - self._began, 1e-9)
        return f"{quantity(round(self.done / seconds), self.unit)}/s"


def duration(seconds: float) -> str:
    """As people say it: 42 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def quantity(count: float, unit: str) -> str:
    """With thousands separated; bytes in units of 1000."""
    if unit != "bytes":
        return f"{count:,.0f} {unit}"
    size, name = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, name = size / 1000, larger
    return f"{size:.0f} B" if name == "B" else f"{size:.1f} {name}"
