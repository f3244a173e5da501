"""The projectors' start: it follows a head that trains, and its report says what is true."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from axolotl_dskd.config import DSKDConfig
from axolotl_dskd.objectives import Facts, Pair, build_objective
from axolotl_dskd.objectives.dual_space.follow import HeadFollower
from axolotl_dskd.objectives.dual_space.projectors import Projectors, start_from_shared_tokens
from axolotl_dskd.objectives.dual_space.report import StartReport
from axolotl_dskd.objectives.dual_space.start import SharedIds, shared_rows, start_projectors
from axolotl_dskd.output_head import OutputHead
from tests.support import contract, tiny
from tests.support.dual_space import met_as_pairs

d, D, k = 8, 12, 60


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parts():
    heads = OutputHead(randn(70, d, seed=0)), OutputHead(randn(90, D, seed=1))
    ids = SharedIds(torch.arange(k), torch.arange(k).flip(0) + 20)
    projectors = Projectors(d, D, with_query=False, seed=0)
    embeddings = heads[0].weight, heads[1].weight
    start_from_shared_tokens(projectors, shared_rows(ids, heads, embeddings))
    return heads, ids, projectors


def solution(student: OutputHead, teacher: OutputHead, ids: SharedIds) -> torch.Tensor:
    ours, theirs = student.rows(ids.student)[0], teacher.rows(ids.teacher)[0]
    return (torch.linalg.pinv(theirs.double()) @ ours.double()).float()


def test_s2t_is_the_pseudo_inverse_start_of_the_head_as_it_is_now():
    (student, teacher), ids, projectors = parts()
    follower = HeadFollower(projectors, ids, teacher)
    for seed in (3, 4):
        changed = OutputHead(student.weight + randn(70, d, seed=seed))
        follower.follow(changed)
        torch.testing.assert_close(
            projectors.s2t.weight.detach(), solution(changed, teacher, ids), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("with_query", [False, True])
def test_the_start_reads_the_shared_rows_block_by_block(with_query: bool):
    heads = tuple(
        OutputHead(randn(n, width, seed=width), bias=randn(n, seed=n))
        for n, width in ((70, d), (90, D))
    )
    ids = SharedIds(torch.arange(k), torch.arange(k).flip(0) + 20)
    embeddings = randn(70, d, seed=8), randn(90, D, seed=9)
    weights = []
    for rows_at_once in (k, 7):
        projectors = Projectors(d, D, with_query=with_query, seed=0)
        blocks = list(shared_rows(ids, heads, embeddings, rows_at_once))
        assert [len(b.student_head) for b in blocks][:-1] == [rows_at_once] * (len(blocks) - 1)
        assert sum(len(b.teacher_embedding) for b in blocks) == k
        start_from_shared_tokens(projectors, iter(blocks))
        weights.append(dict(projectors.named_parameters()))
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)
    expected = torch.linalg.pinv(heads[0].rows(ids.student)[0].double()).float()
    expected @= heads[1].rows(ids.teacher)[0]
    if with_query:  # the keys and values of cross-model attention are divided by this
        expected *= embeddings[1][ids.teacher].std()
    torch.testing.assert_close(weights[0]["t2s.weight"].detach(), expected, rtol=1e-4, atol=1e-5)


def test_what_training_added_to_s2t_stays_when_it_follows():
    (student, teacher), ids, projectors = parts()
    follower = HeadFollower(projectors, ids, teacher)
    trained = randn(D, d, seed=5)
    with torch.no_grad():
        projectors.s2t.weight += trained
    changed = OutputHead(student.weight * 2)
    follower.follow(changed)
    torch.testing.assert_close(
        projectors.s2t.weight.detach(),
        solution(changed, teacher, ids) + trained,
        rtol=1e-5,
        atol=1e-5,
    )


def test_a_lora_on_the_head_and_its_scale_are_followed():
    (student, teacher), ids, projectors = parts()
    follower = HeadFollower(projectors, ids, teacher)
    lora = {"lora_A": randn(2, d, seed=6), "lora_B": randn(70, 2, seed=7), "lora_scale": 0.5}
    changed = OutputHead(student.weight, scale=3.0, **lora)
    follower.follow(changed)
    whole = 3.0 * (student.weight + 0.5 * lora["lora_B"] @ lora["lora_A"])
    torch.testing.assert_close(
        projectors.s2t.weight.detach(),
        solution(OutputHead(whole), teacher, ids),
        rtol=1e-4,
        atol=1e-4,
    )


def test_the_report_finds_an_exact_projection_exact_and_a_random_one_poor():
    student, ids = OutputHead(randn(70, d, seed=0)), SharedIds(torch.arange(70), torch.arange(70))
    teacher = OutputHead(student.weight @ randn(d, D, seed=1))
    hidden, teacher_hidden = randn(40, d, seed=2), randn(40, D, seed=3)
    pairs = torch.arange(40)[:, None].expand(-1, 2)
    for exact in (True, False):
        projectors = Projectors(d, D, with_query=False, seed=0)
        if exact:
            rows = shared_rows(ids, (student, teacher), (student.weight, teacher.weight))
            start_from_shared_tokens(projectors, rows)
        report = StartReport(ids)
        met = met_as_pairs(hidden, teacher_hidden, pairs, projectors)
        report.add(pairs, met, (hidden, teacher_hidden), (student, teacher))
        agreement, divergence = report.means()["t2s"]
        assert (agreement == 1.0) == exact
        assert (divergence < 1e-6) == exact
        assert (report.warning() is None) == exact
        assert "on 40 exact pairs over 70 shared tokens" in report.text()


def test_the_report_measures_each_pair_by_its_own_states():
    heads = OutputHead(randn(70, d, seed=0)), OutputHead(randn(90, D, seed=1))
    ids = SharedIds(torch.arange(k), torch.arange(k) + 20)
    hidden, teacher_hidden = randn(30, d, seed=2), randn(40, D, seed=3)
    theirs = torch.randperm(40, generator=torch.Generator().manual_seed(4))[:30]
    pairs = torch.stack([torch.arange(30), theirs], dim=1)
    projectors = Projectors(d, D, with_query=False, seed=0)
    met = met_as_pairs(hidden, teacher_hidden, pairs, projectors)
    report = StartReport(ids)
    report.add(pairs, met, (hidden, teacher_hidden), heads)

    def log_p(which: int, states: torch.Tensor) -> torch.Tensor:
        index = (ids.student, ids.teacher)[which]
        return (states @ heads[which].weight[index].T).log_softmax(-1)

    student, teacher = log_p(0, hidden), log_p(1, teacher_hidden[theirs])
    with torch.no_grad():
        compared = {
            "t2s": (teacher, log_p(0, projectors.t2s(teacher_hidden[theirs]))),
            "s2t": (student, log_p(1, projectors.s2t(hidden))),
            "as it is": (teacher, student),
        }
    for name, (p, q) in compared.items():
        agreement = (p.argmax(1) == q.argmax(1)).float().mean()
        divergence = F.kl_div(q, p, log_target=True, reduction="batchmean")
        assert report.means()[name] == pytest.approx((float(agreement), float(divergence)), 1e-5)


@pytest.mark.parametrize(
    ("init", "enough", "solved"),
    [("auto", False, False), ("auto", True, True), ("lstsq", False, True), ("random", True, False)],
)
def test_auto_takes_least_squares_where_enough_tokens_are_shared(
    init: str, enough: bool, solved: bool
):
    (student, teacher), ids, expected = parts()
    if not enough:
        ids = SharedIds(ids.student[: D - 1], ids.teacher[: D - 1])
    projectors = Projectors(d, D, with_query=False, seed=0)
    embeddings = student.weight, teacher.weight
    start_projectors(projectors, init, ids, (student, teacher), embeddings)
    random = Projectors(d, D, with_query=False, seed=0)
    assert torch.equal(projectors.t2s.weight, random.t2s.weight) != solved
    if enough and solved:
        assert torch.equal(projectors.t2s.weight, expected.t2s.weight)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_projectors_that_nothing_teaches_are_said(share: float, caplog: pytest.LogCaptureFixture):
    samples = {"from": "student", "share": share}
    config = DSKDConfig.model_validate({"teacher": {"base_model": "x"}, "samples": samples})
    student, teacher = tiny.byte_level_tokenizer(), tiny.sentencepiece_tokenizer()
    sizes = len(student), len(teacher)
    heads = OutputHead(randn(sizes[0], d)), OutputHead(randn(sizes[1], D))
    objective = build_objective(config, Facts(student, teacher, sizes), memory=1 << 30, seed=0)
    objective.begin(Pair(heads, (heads[0].weight, heads[1].weight), torch.device("cpu")))
    said = "it stays as it starts, from least squares" in caplog.text
    assert said == (share == 1.0)


def test_a_head_that_trains_is_followed_in_every_sixteenth_step(monkeypatch: pytest.MonkeyPatch):
    case = contract.dual_space("cma", alignment="cma")
    inputs = case.inputs("trained")
    objective, followed = case.objective(inputs), []
    monkeypatch.setattr(HeadFollower, "follow", lambda self, head: followed.append(step))
    for step in range(40):
        objective.follow(step, inputs.heads[0])
    assert followed == [1, 17, 33]
