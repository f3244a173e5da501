"""Groups of tokens, as objectives on groups use them."""

from __future__ import annotations

import torch

from axolotl_dskd.losses import Budget, Stream, grouped_parts, over_logprobs, set_logprobs
from axolotl_dskd.objectives.groups import STUDENT, TEACHER, Groups
from tests.support.groups import problem, row_groups


def test_groups_are_those_in_which_both_sides_have_a_row():
    made = problem(end_tokens=(1, 2))
    groups = Groups.of(made.matches)
    expected = row_groups(made.matches)
    assert groups.first.tolist() == [[ours[0], theirs[0]] for ours, theirs in expected]
    assert groups.last.tolist() == [[ours[-1], theirs[-1]] for ours, theirs in expected]
    sizes = {(len(ours), len(theirs)) for ours, theirs in expected}
    assert {(1, 1), (1, 2), (2, 1), (2, 2)} & sizes and any(max(s) > 2 for s in sizes)
    # Each answer's second end token has no counterpart.
    assert len(groups.rows(TEACHER, len(made.teacher))) == len(made.teacher) - 8


def test_sums_are_over_the_rows_of_a_group_alone():
    made = problem()
    groups = Groups.of(made.matches)
    values = torch.arange(len(made.teacher)).double()
    expected = [float(sum(theirs)) for _, theirs in row_groups(made.matches)]
    assert groups.sums(TEACHER, values).tolist() == expected


def test_chunks_hold_every_group_once():
    made = problem()
    groups = Groups.of(made.matches)
    both = {"student": made.matches.groups, "teacher": made.matches.teacher_groups}
    values = torch.randn(len(made.student))
    pieces = []
    for part in grouped_parts(both, 5):
        rows = part["student"]
        pieces.append(groups.within(part).sums(STUDENT, values[rows]))
    torch.testing.assert_close(torch.cat(pieces), groups.sums(STUDENT, values))


def test_a_loss_over_log_probabilities_equals_that_on_full_logits():
    made = problem(head="full")
    view, labels = made.student, made.student.tokens.labels
    members = torch.rand(400) < 0.1
    factor = torch.randn(len(view))

    def loss(label: torch.Tensor, within: torch.Tensor) -> torch.Tensor:
        return (factor * label).sin().sum() + (label.roll(1) * within.exp()).sum()

    log_q = made.logits()[0].log_softmax(-1)
    label, within = log_q.gather(-1, labels[:, None])[:, 0], log_q[:, members].logsumexp(-1)
    expected = loss(label, within)
    stream = Stream(view.hidden, view.head, trains_head=True)
    for size in (1, 16, 1000):
        found = over_logprobs(stream, labels, Budget(size), members, loss)
        torch.testing.assert_close(found, expected)
        for a, b in zip(
            torch.autograd.grad(found, made.leaves()),
            torch.autograd.grad(expected, made.leaves(), retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(set_logprobs(stream, labels, Budget(16), members)[1], within)
