"""Exact token alignment: the losses against a slow form, targets, translation, causal attention."""

from __future__ import annotations

import copy

import pytest
import torch
from tokenizers import AddedToken

from axolotl_dskd.data.token_bytes import shared_tokens, token_bytes, translation
from axolotl_dskd.losses import Budget, Stream
from axolotl_dskd.objectives.dual_space.align import (
    Exchanged,
    exchange_by_attention,
    exchange_pairs,
)
from axolotl_dskd.objectives.dual_space.projectors import Projectors
from axolotl_dskd.objectives.dual_space.spaces import Terms, student_space, teacher_space
from axolotl_dskd.objectives.dual_space.targets import greedy_tokens, teacher_targets
from axolotl_dskd.output_head import OutputHead
from axolotl_dskd.types import IGNORE_INDEX, LossOutput, Matches, Side, View
from tests.support import naive, tiny
from tests.support.dual_space import settings

d, D, V, U = 6, 10, 17, 23
PAIRS = [(0, 0), (1, 2), (3, 3), (5, 4), (6, 7)]
N, M = 8, 9


class Case:
    """Random states and labels; every third teacher token has no equal in the student's words."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.student_hidden = self.randn(N, d).requires_grad_()
        self.student_head = self.randn(V, d).requires_grad_()
        self.teacher_hidden, self.teacher_head = self.randn(M, D), self.randn(U, D)
        self.projectors = Projectors(d, D, with_query=False, seed=seed)
        self.table = [-100 if u % 3 == 2 else u % V for u in range(U)]
        self.labels = torch.randint(V, (N,), generator=self.generator)
        self.teacher_labels = torch.randint(U, (M,), generator=self.generator)
        said = (self.teacher_hidden @ self.teacher_head.T).argmax(-1)
        self.teacher_labels[3] = said[3]  # here the teacher says its label
        for i, j in PAIRS:  # the labels of a pair stand for the same bytes
            if self.table[self.teacher_labels[j]] != -100:
                self.labels[i] = self.table[self.teacher_labels[j]]
        nothing = torch.zeros(max(N, M), dtype=torch.long)
        student = Side(nothing[:N], self.labels, nothing[:N])
        teacher = Side(nothing[:M], self.teacher_labels, nothing[:M])
        self.student = View(student, OutputHead(self.student_head), self.student_hidden)
        self.teacher = View(teacher, OutputHead(self.teacher_head), self.teacher_hidden)

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def tensors(self) -> dict[str, torch.Tensor]:
        named = {"student_hidden": self.student_hidden, "student_head": self.student_head}
        return named | dict(self.projectors.named_parameters())

    def gradients(self) -> dict[str, torch.Tensor]:
        out = {k: t.grad.clone() for k, t in self.tensors().items() if t.grad is not None}
        for tensor in self.tensors().values():
            tensor.grad = None
        return out

    def loss(self, settings: tuple[Terms, Budget], pairs: list[tuple[int, int]]) -> LossOutput:
        index = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
        exchanged = exchange_pairs(self.student, self.teacher, index, self.projectors)
        (terms, budget), student, teacher = settings, self.student, self.teacher
        greedy = greedy_tokens(teacher.head, self.teacher_hidden[index[:, 1]], budget.tokens)
        table = torch.tensor(self.table)
        targets = teacher_targets(greedy, index, student.tokens, teacher.tokens, table)
        out = student_space(
            Stream(self.student_hidden, student.head, trains_head=True),
            student.tokens,
            exchanged.t2s,
            exchanged.student_rows,
            targets,
            terms,
            budget,
        )
        loss, values = teacher_space(
            Stream(self.teacher_hidden, teacher.head),
            teacher.tokens,
            exchanged.s2t,
            exchanged.teacher_rows,
            terms,
            budget,
        )
        return LossOutput(out.loss + loss, out.tokens, out.terms | values)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "adaptive_kl"])
@pytest.mark.parametrize("chunk", [3, 256])
def test_terms_and_gradients_equal_the_slow_form(mask: bool, name: str, chunk: int) -> None:
    case = Case(seed=1)
    out = case.loss(settings(name, chunk, temperature=1.5, kd_ratio=0.3, mask_wrong=mask), PAIRS)
    out.loss.backward()
    found = case.gradients()
    terms = naive.exact_token_alignment(
        case.student_hidden,
        case.labels.tolist(),
        case.student_head,
        case.teacher_hidden,
        case.teacher_labels.tolist(),
        case.teacher_head,
        case.projectors.t2s,
        case.projectors.s2t,
        PAIRS,
        {u: v for u, v in enumerate(case.table) if v != -100},
        name=name,
        temperature=1.5,
        mask_wrong=mask,
    )
    expected = 0.7 * terms["ce"] + 0.3 * sum(v for k, v in terms.items() if k != "ce")
    expected.backward()
    sums = out.sums()
    for term, value in terms.items():
        assert float(sums[term]) == pytest.approx(float(value.detach()), rel=1e-5), term
    torch.testing.assert_close(found, case.gradients(), rtol=1e-4, atol=1e-5)


def test_no_pair_leaves_the_cross_entropy_alone() -> None:
    case = Case(seed=2)
    out = case.loss(settings("forward_kl", kd_ratio=0.5), [])
    out.loss.backward()
    ce = torch.nn.functional.cross_entropy(
        case.student_hidden @ case.student_head.T, case.labels, reduction="sum"
    )
    torch.testing.assert_close(out.loss, 0.5 * ce)


# ---- targets -------------------------------------------------------------------------------


def targets(greedy: int, label: int, teacher_label: int, table: list[int]) -> int:
    side = [Side(*(torch.tensor([x]) for x in (0, y, 0))) for y in (label, teacher_label)]
    pairs = torch.tensor([[0, 0]])
    return int(teacher_targets(torch.tensor([greedy]), pairs, *side, torch.tensor(table)))


def test_the_target_is_the_teachers_first_choice_in_the_students_words() -> None:
    table = [5, 6, -100]
    assert targets(1, label=5, teacher_label=0, table=table) == 6
    assert targets(2, label=5, teacher_label=0, table=table) == IGNORE_INDEX
    assert targets(0, label=5, teacher_label=0, table=table) == 5


def test_where_the_teacher_says_its_label_the_target_is_the_students_label() -> None:
    """End-of-turn tokens have no bytes, so nothing translates them but their place."""
    assert targets(2, label=9, teacher_label=2, table=[5, 6, -100]) == 9


def test_a_label_with_a_space_too_much_gives_no_target_but_the_label() -> None:
    table = [5, 6, 7]  # teacher 0 is " x", which is the student's 5; but here it stands for 8, "x"
    assert targets(1, label=8, teacher_label=0, table=table) == IGNORE_INDEX
    assert targets(0, label=8, teacher_label=0, table=table) == 8


# ---- translation ---------------------------------------------------------------------------


def test_every_translated_id_has_the_same_bytes_and_the_rest_has_none() -> None:
    source, target = tiny.sentencepiece_tokenizer(), tiny.byte_level_tokenizer()
    for a, b in ((source, target), (target, source)):
        table, ours, theirs = translation(a, b), token_bytes(a), token_bytes(b)
        assert len(table) == len(ours)
        for i, j in enumerate(table):
            if i == a.eos_token_id:
                assert j == b.eos_token_id
            elif j == -100:
                assert not ours[i] or ours[i] not in theirs
            else:
                assert ours[i] == theirs[j]
                assert j not in b.all_special_ids
        assert table[a.convert_tokens_to_ids("e")] == b.convert_tokens_to_ids("e")


def test_shared_tokens_have_the_same_bytes_once_each_and_the_end_tokens_are_a_pair() -> None:
    source, target = tiny.sentencepiece_tokenizer(), tiny.byte_level_tokenizer()
    ours, theirs = token_bytes(source), token_bytes(target)
    for a, b, tables in ((source, target, (ours, theirs)), (target, source, (theirs, ours))):
        *pairs, ends = zip(*shared_tokens(a, b), strict=True)
        assert ends == (a.eos_token_id, b.eos_token_id)
        spelled = [(tables[0][i], tables[1][j]) for i, j in pairs]
        assert all(x == y and x for x, y in spelled)
        assert {x for x, _ in spelled} == set(ours) & set(theirs) - {b""}
        assert len(pairs) == len({x for x, _ in spelled})
    # Of a letter and its byte token, the letter, whichever side it is on.
    letter, byte = source.convert_tokens_to_ids("e"), source.convert_tokens_to_ids("<0x65>")
    for ids in (shared_tokens(source, target)[0], shared_tokens(target, source)[1]):
        assert letter in ids
        assert byte not in ids


def test_added_tokens_translate_by_their_text() -> None:
    source, target = (
        copy.deepcopy(t) for t in (tiny.sentencepiece_tokenizer(), tiny.byte_level_tokenizer())
    )
    for tokenizer in (source, target):
        tokenizer.add_tokens([AddedToken("<größe>", normalized=False)])
    source.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    table = translation(source, target)
    assert table[source.convert_tokens_to_ids("<größe>")] == target.convert_tokens_to_ids("<größe>")
    assert table[source.convert_tokens_to_ids("<|tool|>")] == -100
    assert table[source.unk_token_id] == -100


# ---- causal attention ----------------------------------------------------------------------

# Two samples. "a b" as tokens of 1+2 and 3 bytes; in the second the teacher's token is the longer.
SPANS = torch.tensor([[1, 2], [2, 4], [4, 5], [1, 3], [3, 4]])
TEACHER_SPANS = torch.tensor([[1, 4], [4, 5], [1, 2], [2, 3], [3, 4]])
SAMPLES = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 0, 1, 1, 1])


def attention(states: dict[str, torch.Tensor], causal: bool) -> Exchanged:
    nothing = torch.zeros(5, dtype=torch.long)
    student, teacher = (
        View(
            Side(nothing, nothing, ids),
            hidden=states[name],
            embedded=(states[f"x_{name[0]}"], states[f"y_{name[0]}"]),
        )
        for name, ids in zip(("student", "teacher"), SAMPLES, strict=True)
    )
    spans = Matches(SPANS, TEACHER_SPANS, *(nothing[:0],) * 4)
    return exchange_by_attention(
        student,
        teacher,
        Projectors(d, D, with_query=True, seed=0),
        causal=spans if causal else None,
        std=lambda states, _: torch.ones(len(states), 1),
    )


def states(seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    sizes = {"student": d, "x_s": d, "y_s": d, "teacher": D, "x_t": D, "y_t": D}
    return {name: torch.randn(5, n, generator=g) for name, n in sizes.items()}


def test_causal_attention_sees_no_byte_that_is_not_read_yet() -> None:
    base, other = states(0), states(1)
    before = attention(base, causal=True)
    for j, (_, end) in enumerate(TEACHER_SPANS.tolist()):
        changed = {k: v.clone() for k, v in base.items()}
        for k in ("teacher", "x_t", "y_t"):
            changed[k][j] = other[k][j]
        moved = (attention(changed, causal=True).t2s - before.t2s).abs().sum(1) > 1e-6
        assert before.student_rows is not None
        for row, i in enumerate(before.student_rows.tolist()):
            same = SAMPLES[0][i] == SAMPLES[1][j]
            assert moved[row] == bool(same and end <= SPANS[i, 1]), (i, j)
    for i, (start, _) in enumerate(SPANS.tolist()):
        changed = {k: v.clone() for k, v in base.items()}
        changed["student"][i] = other["student"][i]
        moved = (attention(changed, causal=True).s2t - before.s2t).abs().sum(1) > 1e-6
        assert before.teacher_rows is not None
        for row, j in enumerate(before.teacher_rows.tolist()):
            same = SAMPLES[0][i] == SAMPLES[1][j]
            assert moved[row] == bool(same and start <= TEACHER_SPANS[j, 0]), (i, j)


def test_a_token_that_may_see_nothing_is_left_out_and_gives_no_nan() -> None:
    out = attention(states(0), causal=True)
    # The first student token ends before the first teacher token does.
    assert out.student_rows.tolist() == [1, 2, 3, 4]
    assert out.teacher_rows.tolist() == [0, 1, 2, 3, 4]
    assert [len(out.t2s), len(out.s2t)] == [4, 5]
    assert all(torch.isfinite(t).all() for t in (out.t2s, out.s2t))


def test_causal_attention_without_a_future_is_plain_attention() -> None:
    base = states(0)
    plain = attention(base, causal=False)
    causal = attention(base, causal=True)
    # The last token of each sample ends with the sample: nothing is hidden from it.
    for token in (2, 4):
        row = causal.student_rows.tolist().index(token)
        torch.testing.assert_close(causal.t2s[row], plain.t2s[token])
