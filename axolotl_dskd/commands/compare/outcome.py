"""What a finished run has found, kept in `result.json` of its folder.

The file appears whole, and only when the run has ended well: it is how a finished run is known.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from axolotl_dskd.commands.compare.plan import Run
from axolotl_dskd.evaluation.record import read_record
from axolotl_dskd.evaluation.rows import Row, means

RESULT = "result.json"


@dataclass(frozen=True)
class Point:
    """One evaluation: when, its metrics by name without `eval_`, rows by key, answers if any."""

    step: int
    epoch: float
    metrics: dict[str, float]
    rows: dict[str, Row]
    answers: list[dict[str, Any]]

    @property
    def bits_per_byte(self) -> float:
        """Of all held-out rows."""
        return self.metrics["dskd/bits_per_byte"]


@dataclass(frozen=True)
class Outcome:
    """A run's result.

    Attributes:
        method, seed: of the run.
        digest: the run's own, when it was made.
        rows: hash of the rows that it trained on, in their order.
        learned_tokens: supervised tokens that it trained on, over all epochs.
        seconds: from the start of its process to its end.
        host_bytes, gpu_bytes: most memory that it held on the host and on one GPU.
        points: its evaluations, before any step, too, unless `eval_on_start: false`.
        log: what the trainer logged.
    """

    method: str
    seed: int
    digest: str
    rows: str
    learned_tokens: int
    seconds: float
    host_bytes: int
    gpu_bytes: int
    points: list[Point]
    log: list[dict[str, float]]

    @property
    def name(self) -> str:
        """As the run's."""
        return f"{self.method}-seed{self.seed}"

    @property
    def last(self) -> Point:
        """The last evaluation."""
        return self.points[-1]

    @property
    def led_to(self) -> list[Point]:
        """The evaluations after a step; all of them where there is none."""
        return [point for point in self.points if point.step] or self.points

    @property
    def best(self) -> Point:
        """The evaluation with the fewest bits per byte among those that training led to."""
        return min(self.led_to, key=lambda point: point.bits_per_byte)

    @property
    def answered(self) -> Point | None:
        """The last evaluation with answers."""
        return next((point for point in reversed(self.points) if point.answers), None)


def finish(run: Run, *, seconds: float, host_bytes: int) -> Outcome:
    """Read what a run that ended well has left, and keep it.

    Raises:
        ValueError: it left no evaluation.
    """
    lines = read_record(run.config["output_dir"])
    evaluations = [line for line in lines if line.get("evaluation") == "eval"]
    if not evaluations:
        raise ValueError(
            f"the run {run.name} ended without an evaluation. Are there eval_strategy, eval_steps "
            "or evals_per_epoch that its length never reaches?"
        )
    outcome = Outcome(
        method=run.method,
        seed=run.seed,
        digest=run.digest,
        rows=next(line["train"]["digest"] for line in lines if "train" in line),
        learned_tokens=evaluations[-1]["learned_tokens"],
        seconds=round(seconds, 1),
        host_bytes=host_bytes,
        gpu_bytes=max(line["gpu_bytes"] for line in evaluations),
        points=[_point(line) for line in evaluations],
        log=[line["log"] | {"step": line["step"]} for line in lines if "log" in line],
    )
    content = asdict(outcome)
    for point, found in zip(content["points"], outcome.points, strict=True):
        point["rows"] = {key: row.as_list() for key, row in found.rows.items()}
    write_json(run.folder / RESULT, content)
    return outcome


def finished(run: Run) -> Outcome | None:
    """The result of a run that has ended well and would be the same today."""
    try:
        content = json.loads((run.folder / RESULT).read_text(encoding="utf-8"))
    except OSError:
        return None
    if content["digest"] != run.digest:
        return None
    points = [
        Point(**point | {"rows": {key: Row(*values) for key, values in point["rows"].items()}})
        for point in content.pop("points")
    ]
    return Outcome(**content, points=points)


def check_same_rows(outcomes: Iterable[Outcome]) -> list[str]:
    """That runs with one seed saw the same rows, and were measured on the same.

    Returns:
        What else differs, in words: how many tokens they learned from.

    Raises:
        ValueError: the rows differ.
    """
    remarks = []
    first: dict[int, Outcome] = {}
    for outcome in outcomes:
        other = first.setdefault(outcome.seed, outcome)
        if (outcome.rows, outcome.last.rows.keys()) != (other.rows, other.last.rows.keys()):
            raise ValueError(
                f"{outcome.name} and {other.name} did not see the same rows, so they cannot be "
                "compared. Delete the folder `prepared` of the comparison and start it again."
            )
        if outcome.learned_tokens != other.learned_tokens:
            remarks.append(
                f"{outcome.name} learned from {outcome.learned_tokens:,} supervised tokens, "
                f"{other.name} from {other.learned_tokens:,}."
            )
    return remarks


def write_json(path: Path, content: Any) -> None:
    """A file that appears whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def _point(line: dict[str, Any]) -> Point:
    rows = {key: Row(*values) for key, values in line["rows"].items()}
    metrics = {name.removeprefix("eval_"): value for name, value in line["metrics"].items()}
    when = line["step"], round(line["epoch"], 3)
    return Point(*when, metrics | means(rows), rows, line["answers"])
