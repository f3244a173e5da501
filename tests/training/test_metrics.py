"""The means that are logged."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from axolotl_dskd.training.metrics import MetricSums
from axolotl_dskd.training.recorder import best_by_name
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


@pytest.mark.parametrize(
    ("name", "configured", "more"),
    [
        ("eval_dskd/bits_per_byte", None, False),
        ("dskd/ce", None, False),
        ("eval_dskd/teacher_kl", None, False),
        ("eval_dskd/math/bits_per_byte", None, False),
        ("eval_dskd/accuracy", None, True),
        ("eval_dskd/math/teacher_agreement", None, True),
        ("eval_dskd/rouge_l", None, True),
        ("eval_dskd/rouge_l_sampled", None, True),
        ("eval_dskd/accuracy", False, False),
        ("eval_loss", None, "as it was"),
        ("eval_loss", False, False),
    ],
)
def test_the_best_of_a_metric_is_what_its_name_says(name: str, configured: bool | None, more: bool):
    args = SimpleNamespace(metric_for_best_model=name, greater_is_better="as it was")
    best_by_name(args, configured)
    assert args.greater_is_better == more


def test_of_what_no_token_has_nothing_is_said():
    """A mean of no values is not 0: a reader, and what watches the means, would take it for one."""
    sums = MetricSums({"kl": "student_token", "watched": "value"})
    sums.add(output(2, kl=[1.0, 3.0], watched=[]), 4)
    assert sums.means(CPU) == {"dskd/kl": 2.0, "dskd/supervised_tokens": 2}
