"""The means that are logged."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from axolotl_dskd.evaluation.record import read_record
from axolotl_dskd.training.metrics import MetricSums, RowSums
from axolotl_dskd.training.recorder import Recorder, best_by_name
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


def test_a_record_counts_the_tokens_of_a_long_training_exactly(tmp_path: Path):
    """float32 has whole numbers up to 2^24 only."""
    trainer = SimpleNamespace(
        state=SimpleNamespace(global_step=1, epoch=1.0),
        accelerator=SimpleNamespace(device=CPU),
        args=SimpleNamespace(process_index=0, output_dir=str(tmp_path)),
    )
    recorder = Recorder(trainer)
    recorder.learned_tokens = 2**24 + 1
    recorder.evaluation("eval", {}, {}, [])
    assert read_record(tmp_path)[0]["learned_tokens"] == 2**24 + 1


def test_a_row_that_an_evaluation_sees_again_counts_once():
    """As a distributed sampler repeats rows to fill its last batch."""
    per = {"ce": "reference_token", "kl": "student_token", "watched": "value", "unseen": "value"}

    def add(sums: RowSums, *rows: tuple[str, list[float], list[float]]) -> None:
        ids = torch.tensor([k for k, (_, ce, _) in enumerate(rows) for _ in ce])
        watched_ids = torch.tensor([k for k, (*_, watched) in enumerate(rows) for _ in watched])
        ce = torch.tensor([x for _, ce, _ in rows for x in ce])
        watched = torch.tensor([x for *_, watched in rows for x in watched])
        terms = {"ce": Term(ce, ids), "kl": Term(2 * ce, ids)}
        terms["watched"] = Term(watched, watched_ids.long())
        out = LossOutput(torch.tensor(0.0), len(ids), terms)
        known = torch.ones(len(ids), dtype=torch.bool)
        sums.add(out, [key for key, *_ in rows], ids, known, 3 * known.long())

    a, b, c = ("a", [1.0, 2.0], [5.0]), ("b", [9.0], []), ("c", [4.0, 4.0, 1.0], [1.0, 3.0])
    once, again = RowSums(per), RowSums(per)
    add(once, a, b, c)
    add(again, c, a)
    add(again, b, c)
    assert again.means(CPU) == pytest.approx(once.means(CPU))
    assert once.means(CPU) == pytest.approx(
        {
            "dskd/ce": 21 / 6,
            "dskd/bits_per_byte": 21 / 18 / torch.tensor(2.0).log().item(),
            "dskd/kl": 42 / 6,
            "dskd/watched": 9 / 3,
            "dskd/supervised_tokens": 6,
        }
    )
    assert RowSums(per).means(CPU) == {}
