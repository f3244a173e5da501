"""The projected teacher is caught when it recites the training answers."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from axolotl_dskd.objectives.dual_space.watch import ONE_IN, RECITES, RecitalWatch
from tests.support.contract import dual_space
from tests.support.inputs import Inputs


def test_both_losses_are_of_labels_at_pairs_that_their_text_chooses():
    inputs = Inputs(one_vocabulary=False)
    student, teacher, matches = inputs.batch()
    for alignment in ("cma", "eta"):
        objective = dual_space("watched", alignment=alignment).objective(inputs)
        terms = objective(student, teacher, matches).terms
        exchanged, _ = objective.exchange(student, teacher, matches)
        rows = exchanged.student_rows
        expected: dict[str, list[float]] = {"teacher_nll": [], "projected_nll": []}
        for i, j in matches.exact.tolist():
            if matches.spans[i, 0] % ONE_IN:
                continue
            at = i if rows is None else int((rows == i).nonzero())
            for name, head, state, label in (
                ("teacher_nll", teacher.head, teacher.hidden[j], teacher.tokens.labels[j]),
                ("projected_nll", student.head, exchanged.t2s[at], student.tokens.labels[i]),
            ):
                logits = head.logits(state.unsqueeze(0))
                loss = F.cross_entropy(logits, label.unsqueeze(0))
                expected[name].append(float(loss.detach()))
        assert 0 < len(expected["teacher_nll"]) < len(matches.exact)
        for name, values in expected.items():
            torch.testing.assert_close(
                terms[name].values, torch.tensor(values, dtype=torch.float64), rtol=1e-9, atol=1e-9
            )


def remarks(projected: list[float], teacher: float = 2.0) -> list[str]:
    watch = RecitalWatch()
    means = [{"ce": 1.0, "teacher_nll": teacher, "projected_nll": x} for x in projected]
    return [text for m in means if (text := watch.remark(m)) is not None]


def test_a_projected_teacher_that_recites_is_told_of_once():
    assert remarks([2.5] * 40) == []
    assert remarks([2.0 * RECITES + 0.01] * 40) == []
    (text,) = remarks([2.0 * RECITES - 0.05] * 40)
    assert "projector.learning_rate" in text
    assert remarks([2.5] * 20 + [0.5] * 40) == remarks([2.5] * 20 + [0.5] * 80) != []


def test_one_log_of_few_tokens_says_nothing():
    assert remarks([0.0]) == []
    assert remarks([2.5] * 20 + [0.0] + [2.5] * 20) == []


def test_logs_without_a_pair_are_not_counted():
    watch = RecitalWatch()
    assert all(watch.remark({"ce": 1.0}) is None for _ in range(40))
