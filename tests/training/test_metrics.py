"""The means that are logged."""

from __future__ import annotations

import pytest
import torch

from axolotl_dskd.training.metrics import MetricSums
from axolotl_dskd.types import LossOutput, Term

CPU = torch.device("cpu")


def output(tokens: int, **values: list[float]) -> LossOutput:
    terms = {
        name: Term(torch.tensor(numbers), torch.zeros(len(numbers), dtype=torch.long))
        for name, numbers in values.items()
    }
    return LossOutput(torch.tensor(0.0), tokens, terms)


def test_a_term_is_divided_by_what_it_counts():
    sums = MetricSums({"ce": "reference_token", "kl": "student_token", "watched": "value"})
    sums.add(output(3, ce=[1.0, 2.0, 3.0], kl=[6.0, 0.0, 0.0], watched=[5.0]), 6)
    sums.add(output(1, ce=[2.0], kl=[2.0], watched=[]), 2)
    means = sums.means(CPU)
    assert means["dskd/ce"] == 2.0
    assert means["dskd/kl"] == 2.0
    assert means["dskd/watched"] == 5.0
    assert means["dskd/bits_per_byte"] == pytest.approx(1 / torch.tensor(2.0).log().item())
    assert means["dskd/supervised_tokens"] == 4


def test_of_what_no_token_has_nothing_is_said():
    """A mean of no values is not 0: a reader, and what watches the means, would take it for one."""
    sums = MetricSums({"kl": "student_token", "watched": "value"})
    sums.add(output(2, kl=[1.0, 3.0], watched=[]), 4)
    assert sums.means(CPU) == {"dskd/kl": 2.0, "dskd/supervised_tokens": 2}
