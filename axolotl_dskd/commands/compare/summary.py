"""From the results of all runs to what is said of each method, and of each against the first.

Knows numbers; nothing of how runs are made or shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from axolotl_dskd.commands.compare.outcome import Outcome, Point

#: Relative differences below this are no difference.
SAME = 0.001
_RESAMPLES = 2000
#: Rows that are held at once: some 25 bytes each.
_DRAWN_AT_ONCE = 1 << 22

Moment = Literal["best", "last"]
MOMENTS: tuple[Moment, Moment] = ("best", "last")


@dataclass(frozen=True)
class Difference:
    """A method's bits per byte against another's.

    Attributes:
        relative: mean over seeds, divided by the other's, less 1; negative: fewer bits.
        low, high: 95% interval of it, by bootstrap over the held-out rows.
        wins: seeds in which the method has fewer.
        seeds: that both have.
    """

    relative: float
    low: float
    high: float
    wins: int
    seeds: int

    @property
    def verdict(self) -> str:
        """`fewer`, `more`, or `no difference` where the interval holds 0 or is next to it."""
        if self.low <= 0 <= self.high or abs(self.relative) < SAME:
            return "no difference"
        return "fewer" if self.relative < 0 else "more"


@dataclass(frozen=True)
class Method:
    """What the runs of one method have found, over seeds.

    Attributes:
        bits, accuracy: means at the best and at the last evaluation.
        spread: largest less smallest bits per byte over seeds.
        rouge_l: mean of the last answers that each run wrote; None where one wrote none.
        teacher_kl: from the teacher, mean at the last evaluation; None where it was not asked.
        teacher_agreement: how often both have one first choice; likewise.
        against: the first method, at both moments; none for the first method itself.
    """

    name: str
    seeds: list[int]
    bits: dict[Moment, float]
    accuracy: dict[Moment, float]
    spread: dict[Moment, float]
    rouge_l: float | None
    teacher_kl: float | None
    teacher_agreement: float | None
    against: dict[Moment, Difference]
    seconds: float
    host_bytes: int
    gpu_bytes: int


def summarise(outcomes: Sequence[Outcome]) -> list[Method]:
    """All methods, in the order in which they come first."""
    names = list(dict.fromkeys(outcome.method for outcome in outcomes))
    by_name = {name: [o for o in outcomes if o.method == name] for name in names}
    return [_method(name, by_name[name], by_name[names[0]]) for name in names]


def compared(
    method: Sequence[Outcome], other: Sequence[Outcome], moment: Moment
) -> Difference | None:
    """The paired difference of two methods on the same held-out rows; None without common seeds.

    Bits of a row are averaged over the seeds that measured it; rows are drawn with replacement.
    """
    seeds = sorted({o.seed for o in method} & {o.seed for o in other})
    if not seeds:
        return None
    pairs = [
        tuple(getattr(next(o for o in runs if o.seed == seed), moment) for runs in (method, other))
        for seed in seeds
    ]
    nats, sizes = _row_sums(pairs)
    draw, at_once = np.random.default_rng(0), max(1, _DRAWN_AT_ONCE // len(sizes))
    drawn = np.concatenate(  # [resamples, 2]
        [
            nats[draw.integers(len(sizes), size=(min(at_once, _RESAMPLES - k), len(sizes)))].sum(1)
            for k in range(0, _RESAMPLES, at_once)
        ]
    )
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1] - 1, [0.025, 0.975])
    total = nats.sum(0)
    wins = sum(ours.bits_per_byte < theirs.bits_per_byte for ours, theirs in pairs)
    return Difference(float(total[0] / total[1] - 1), float(low), float(high), wins, len(seeds))


def _row_sums(pairs: Sequence[tuple[Point, ...]]) -> tuple[np.ndarray, np.ndarray]:
    """[n, 2] nats of both methods and [n] bytes of each row, summed over seeds."""
    keys = sorted(set().union(*(ours.rows for ours, _ in pairs)))
    number = {key: k for k, key in enumerate(keys)}
    nats, sizes = np.zeros((len(keys), 2)), np.zeros(len(keys))
    for ours, theirs in pairs:
        for key, row in ours.rows.items():
            nats[number[key]] += (row.nats, theirs.rows[key].nats)
            sizes[number[key]] += row.text_bytes
    return nats, sizes


def _method(name: str, runs: list[Outcome], first: list[Outcome]) -> Method:
    bits: dict[Moment, list[float]] = {m: [_at(o, m).bits_per_byte for o in runs] for m in MOMENTS}
    right = {m: [_at(o, m).metrics["dskd/accuracy"] for o in runs] for m in MOMENTS}
    answered = [point for o in runs if (point := o.answered) is not None]
    rouge = [point.metrics["dskd/rouge_l"] for point in answered]

    def of_last(metric: str) -> float | None:
        found = [o.last.metrics[metric] for o in runs if metric in o.last.metrics]
        return float(np.mean(found)) if len(found) == len(runs) else None

    found = {m: compared(runs, first, m) for m in MOMENTS} if runs[0] is not first[0] else {}
    return Method(
        name=name,
        seeds=[o.seed for o in runs],
        bits={m: float(np.mean(bits[m])) for m in MOMENTS},
        accuracy={m: float(np.mean(right[m])) for m in MOMENTS},
        spread={m: max(bits[m]) - min(bits[m]) for m in MOMENTS},
        rouge_l=float(np.mean(rouge)) if len(rouge) == len(runs) else None,
        teacher_kl=of_last("dskd/teacher_kl"),
        teacher_agreement=of_last("dskd/teacher_agreement"),
        against={m: difference for m, difference in found.items() if difference is not None},
        seconds=float(np.mean([o.seconds for o in runs])),
        host_bytes=max(o.host_bytes for o in runs),
        gpu_bytes=max(o.gpu_bytes for o in runs),
    )


def _at(outcome: Outcome, moment: Moment) -> Point:
    return outcome.best if moment == "best" else outcome.last


def verdict(method: Method, first: Method) -> str:
    """One sentence on a method against the first, computed from the numbers alone."""
    said = []
    for moment, difference in method.against.items():
        ours, theirs = method.bits[moment], first.bits[moment]
        numbers = f"({ours:.4f} and {theirs:.4f})"
        if difference.verdict == "no difference":
            text = f"no difference at the {moment} evaluation {numbers}"
        else:
            more = "below" if difference.relative < 0 else "above"
            text = (
                f"{abs(difference.relative):.1%} {more} at the {moment} evaluation {numbers}, "
                f"interval {difference.low:+.1%} to {difference.high:+.1%}"
            )
        if difference.seeds > 1:
            text += f", lower in {difference.wins} of {difference.seeds} seeds"
        said.append(text)
    return f"{method.name} against {first.name}: {'; '.join(said)}."


def as_dict(outcomes: Sequence[Outcome], methods: Sequence[Method]) -> dict[str, Any]:
    """What `results.json` says of runs and methods; rows stay in the runs' own files."""

    def point(found: Point) -> dict[str, Any]:
        return {"step": found.step, "epoch": found.epoch, **found.metrics}

    return {
        "methods": [asdict(method) for method in methods],
        "verdicts": [verdict(method, methods[0]) for method in methods[1:]],
        "runs": [
            {
                "method": o.method,
                "seed": o.seed,
                "best": point(o.best),
                "last": point(o.last),
                "evaluations": [point(found) for found in o.points],
                "learned_tokens": o.learned_tokens,
                "seconds": o.seconds,
                "host_bytes": o.host_bytes,
                "gpu_bytes": o.gpu_bytes,
            }
            for o in outcomes
        ],
    }
