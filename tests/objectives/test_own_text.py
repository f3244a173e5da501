"""The reverse KL on text that the student wrote, whatever it learns there."""

from __future__ import annotations

import pytest
import torch

from axolotl_dskd.losses import Budget
from axolotl_dskd.objectives import own_text
from axolotl_dskd.objectives.own_text import reverse_kl
from axolotl_dskd.types import Term
from tests.support.inputs import SAMPLES, WRITTEN, Inputs
from tests.support.policy_forms import label_logprobs, row_groups

BUDGET = Budget(16)


def found(inputs: Inputs, samples: list[int] | None = None) -> Term:
    return reverse_kl(*inputs.batch(samples), BUDGET)


def expected(inputs: Inputs, one_in: int) -> dict[int, float]:
    """By sample, the sum over its pieces that are looked at, from all of the teacher's logits."""
    student, teacher, matches = inputs.batch()
    assert student.written is not None
    log_p = label_logprobs(inputs.logits(teacher.hidden, 1), teacher.tokens.labels)
    sums: dict[int, float] = {}
    for ours, theirs in row_groups(matches):
        sample = int(student.tokens.sample_ids[ours[0]])
        begin = int(matches.spans[ours[0], 0])
        if student.written.samples[sample] and begin % one_in == 0:
            gap = student.written.logprobs[ours].double().sum() - log_p[theirs].sum()
            sums[sample] = sums.get(sample, 0.0) + float(gap)
    return sums


@pytest.mark.parametrize("one_vocabulary", [False, True])
@pytest.mark.parametrize("one_in", [1, 2, 5])
def test_it_is_the_gap_of_whole_pieces(
    one_vocabulary: bool, one_in: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(own_text, "ONE_IN", one_in)
    inputs = Inputs(one_vocabulary, written=True)
    term, sums = found(inputs), expected(inputs, one_in)
    assert {*sums} == {*term.sample_ids.tolist()} <= {*WRITTEN}
    for sample, gap in sums.items():
        mine = term.values[term.sample_ids == sample]
        assert float(mine.sum()) == pytest.approx(gap, rel=1e-5, abs=1e-5)
    if one_in == 1:  # of all tokens in a piece that the teacher has, too
        _, _, matches = inputs.batch()
        tokens = sum(len(ours) for ours, _ in row_groups(matches) if ours)
        assert 0 < len(term.values) <= tokens


def test_which_pieces_are_looked_at_depends_on_no_batch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(own_text, "ONE_IN", 2)
    inputs = Inputs(False, written=True)
    whole = found(inputs)
    for sample in range(len(SAMPLES)):
        alone = found(inputs, [sample])
        torch.testing.assert_close(alone.values, whole.values[whole.sample_ids == sample])


def test_a_batch_without_tokens_has_none():
    assert len(found(Inputs(False, written=True), []).values) == 0


def test_it_needs_log_probabilities_of_the_teacher_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(own_text, "ONE_IN", 1)
    states, said = (found(Inputs(False, written=True, top=top)) for top in (None, 4))
    torch.testing.assert_close(said.values, states.values, rtol=1e-5, atol=1e-5)
