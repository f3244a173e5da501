"""What there is to say of written answers: how many, how long, how they end."""

from __future__ import annotations

from collections import Counter

import torch

from axolotl_dskd.generation import Answer
from axolotl_dskd.ranks import sum_over_ranks, world_size

#: Tokens of the sequences whose repetition is counted.
_N = 4
#: A token with less weight was drawn at twice the student's own probability, or more.
_LIGHT = 0.5


class Tally:
    """Counts since it was last asked, on this rank."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        #: Why answers were not taken, since the start.
        self.refused: Counter[str] = Counter()

    def count(self, name: str, number: float = 1) -> None:
        """Add to one of the numbers."""
        self._counts[name] += number  # type: ignore[assignment]

    def answer(self, answer: Answer) -> None:
        """Count an answer in."""
        ids = answer.ids
        self.count("answers")
        self.count("tokens", len(ids))
        self.count("ended", float(answer.ended))
        if answer.weights is not None:
            self.count("mixed", len(ids))
            self.count("weight", sum(answer.weights))
            self.count("light", sum(weight < _LIGHT for weight in answer.weights))
        grams = [tuple(ids[k : k + _N]) for k in range(len(ids) - _N + 1)]
        self.count("grams", len(grams))
        self.count("repeated", len(grams) - len(set(grams)))

    def metrics(self, device: torch.device) -> dict[str, float]:
        """Means over all ranks; nothing where nothing was written or taken. Starts anew."""
        names = ("answers", "tokens", "ended", "grams", "repeated", "refused", "seconds", "rows",
                 "written", "kept", "cut", "mixed", "weight", "light")  # fmt: skip
        numbers = torch.tensor([float(self._counts[n]) for n in names], dtype=torch.float64)
        self._counts.clear()
        found = dict(zip(names, sum_over_ranks(numbers.to(device)).tolist(), strict=True))
        means = {}
        if found["rows"]:
            means["dskd/written_rows"] = found["written"] / found["rows"]
            means["dskd/kept_rows"] = found["kept"] / found["rows"]
        if found["answers"]:
            means["dskd/answer_tokens"] = found["tokens"] / found["answers"]
            means["dskd/answers_ended"] = found["ended"] / found["answers"]
            means["dskd/answers_refused"] = found["refused"] / found["answers"]
            means["dskd/answers_cut_to_fit"] = found["cut"] / found["answers"]
            means["dskd/repeated_4grams"] = found["repeated"] / max(found["grams"], 1.0)
        if found["mixed"]:
            means["dskd/mixed_weight"] = found["weight"] / found["mixed"]
            means["dskd/mixed_below_half"] = found["light"] / found["mixed"]
        if found["seconds"]:
            # Of all ranks together, which write at the same time.
            each = found["seconds"] / world_size()
            means["dskd/written_tokens_per_second"] = found["tokens"] / each
        return means
