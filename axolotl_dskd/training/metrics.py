"""The distillation metrics of a logging window. Knows sums and ranks; nothing of models."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from axolotl_dskd.evaluation.rows import bits_per_byte
from axolotl_dskd.ranks import sum_over_ranks
from axolotl_dskd.types import LossOutput, Per


class MetricSums:
    """Term sums and counts since the last log, divided once, over all ranks.

    Args:
        per: what each term's mean is counted by; the same on every rank, whatever it has seen.
        teacher: whose rows alone are counted; empty: all rows are.
    """

    def __init__(self, per: Mapping[str, Per], teacher: str = "") -> None:
        self.per = dict(per)
        self.prefix = f"dskd/{teacher}/" if teacher else "dskd/"
        self.sums: dict[str, Tensor] = {}
        self.counts = dict.fromkeys(self.per, 0)
        self.tokens = self.references = 0
        self.text_bytes: Tensor | int = 0

    def add(self, out: LossOutput, text_bytes: Tensor | int) -> None:
        """Count one batch in.

        Args:
            text_bytes: of its supervised text. A tensor is read at the next log: for one on a GPU
                the host would wait.
        """
        assert out.terms.keys() <= self.per.keys(), out.terms.keys() - self.per.keys()
        for name, value in out.sums().items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value
            self.counts[name] += len(out.terms[name].values)
        self.tokens += out.tokens
        self.references += out.tokens if out.references is None else out.references
        self.text_bytes = self.text_bytes + text_bytes

    def means(self, device: torch.device) -> dict[str, float]:
        """Every term's mean, by its name with `dskd/` (and the teacher) in front; nothing where
        there is no token."""
        numbers = [float(self.tokens), float(self.references), float(self.text_bytes)]
        for name in self.per:  # the same layout on every rank
            total = float(self.sums.get(name, 0.0))
            numbers += (total, float(self.counts[name]), float(name in self.sums))
        packed = torch.tensor(numbers, dtype=torch.float64, device=device)
        tokens, references, text_bytes, *rest = sum_over_ranks(packed).tolist()
        if not tokens:
            return {}
        means = {}
        for k, (name, per) in enumerate(self.per.items()):
            total, count, seen = rest[3 * k : 3 * k + 3]
            by = {"value": count, "student_token": tokens, "reference_token": references}
            if seen and by[per]:
                means[f"{self.prefix}{name}"] = total / by[per]
                if name == "ce" and text_bytes:
                    means[f"{self.prefix}bits_per_byte"] = bits_per_byte(total, text_bytes)
        return means | {f"{self.prefix}supervised_tokens": tokens}
