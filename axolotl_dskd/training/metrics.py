"""The distillation metrics of a logging window or an evaluation. Knows sums, rows' keys and ranks;
nothing of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from axolotl_dskd.evaluation.rows import bits_per_byte
from axolotl_dskd.ranks import gather_objects, rank, sum_over_ranks
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
        return _means(self.per, self.prefix, sum_over_ranks(packed).tolist())


class RowSums:
    """Those of one evaluation, row by row: a row counts once, as in `RowScores`, also one that a
    distributed sampler repeats to fill its last batch.

    Args:
        per, teacher: see `MetricSums`.
    """

    def __init__(self, per: Mapping[str, Per], teacher: str = "") -> None:
        self.per = dict(per)
        self.prefix = f"dskd/{teacher}/" if teacher else "dskd/"
        self._seen: set[str] = set()
        #: Numbers of a row in the order of `_means`, without whether a term was seen.
        self._rows: dict[str, np.ndarray] = {}

    def add(
        self,
        out: LossOutput,
        keys: Sequence[str],
        sample_ids: Tensor,
        known: Tensor,
        text_bytes: Tensor,
    ) -> None:
        """Count one batch in; the host waits for it.

        Args:
            keys: of its rows, by the number of the sample.
            sample_ids: [N] of its supervised tokens.
            known: [N] bool, which of them have a reference.
            text_bytes: [N] of the text of those.
        """
        assert out.terms.keys() <= self.per.keys(), out.terms.keys() - self.per.keys()

        def by_row(values: Tensor, ids: Tensor) -> Tensor:
            sums = sample_ids.new_zeros(len(keys), dtype=torch.float64)
            return sums.index_add_(0, ids, values.to(sums))

        columns = [by_row(v, sample_ids) for v in (torch.ones_like(known), known, text_bytes)]
        for name in self.per:
            term = out.terms.get(name)
            if term is None:
                columns += [torch.zeros_like(columns[0])] * 2
                continue
            self._seen.add(name)
            columns += [
                by_row(values, term.sample_ids)
                for values in (term.values, torch.ones_like(term.values))
            ]
        self._rows.update(zip(keys, torch.stack(columns, 1).cpu().numpy(), strict=True))

    def means(self, device: torch.device) -> dict[str, float]:
        """See `MetricSums`."""
        before = gather_objects(list(self._rows))[: rank()]
        others = {key for keys in before for key in keys}
        mine = [numbers for key, numbers in self._rows.items() if key not in others]
        nothing = np.zeros(3 + 2 * len(self.per))
        sums = np.stack([nothing, *mine]).sum(0).tolist()
        numbers = sums[:3]
        for k, name in enumerate(self.per):
            numbers += (*sums[3 + 2 * k : 5 + 2 * k], float(name in self._seen))
        packed = torch.tensor(numbers, dtype=torch.float64, device=device)
        return _means(self.per, self.prefix, sum_over_ranks(packed).tolist())


def _means(per: Mapping[str, Per], prefix: str, numbers: Sequence[float]) -> dict[str, float]:
    """Means by name.

    Args:
        numbers: supervised tokens, those with a reference, bytes of their text; of each term its
            sum, how many values it has, and 0 where nobody has seen it.
    """
    tokens, references, text_bytes, *rest = numbers
    if not tokens:
        return {}
    means = {}
    for k, (name, counted_by) in enumerate(per.items()):
        total, count, seen = rest[3 * k : 3 * k + 3]
        by = {"value": count, "student_token": tokens, "reference_token": references}
        if seen and by[counted_by]:
            means[f"{prefix}{name}"] = total / by[counted_by]
            if name == "ce" and text_bytes:
                means[f"{prefix}bits_per_byte"] = bits_per_byte(total, text_bytes)
    return means | {f"{prefix}supervised_tokens": tokens}
