"""Numbers of MiniLLM's and TRL's code, and of the corrected form where we depart from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from axolotl_dskd.config import PolicyConfig, TokenKDConfig
from axolotl_dskd.data.byte_spans import Spans, group_numbers
from axolotl_dskd.losses import Budget
from axolotl_dskd.objectives import Facts, Pair, Setting
from axolotl_dskd.objectives.policy import Policy
from axolotl_dskd.objectives.policy.rollout import Rollout
from axolotl_dskd.objectives.token_kd import TokenKD
from axolotl_dskd.output_head import OutputHead
from axolotl_dskd.types import LossOutput, Matches, Side, View, Written
from tests.support import tiny
from tests.support.golden_methods import files

#: What masked logits become: -inf would be NaN in a product with 0.
_OUT = -1e4

Numbers = dict[str, Tensor]
by_file = lambda method: pytest.mark.parametrize(  # noqa: E731
    "path", files(method), ids=lambda p: p.stem
)


def read(path: Path) -> Numbers:
    return {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(path).items()}


def facts(one_vocabulary: bool = True) -> Facts:
    student = tiny.byte_level_tokenizer()
    teacher = student if one_vocabulary else tiny.sentencepiece_tokenizer()
    return Facts(student, teacher, (len(student), len(teacher)))


def policy(one_vocabulary: bool = True, **keys: Any) -> Policy:
    """In chunks of a few tokens; distils only."""
    config = PolicyConfig(**{"reward_clip": 100.0, "whiten": "none", **keys})
    objective = Policy(config, facts(one_vocabulary), Setting(1.0, Budget(4), written=True))
    head = OutputHead(torch.eye(2))
    objective.begin(Pair((head, head), (head.weight, head.weight), torch.device("cpu")))
    return objective


class Answers:
    """The supervised tokens of a file, whose states are their logits, token by token on both sides.

    Attributes:
        mask: [B, L]. logits: the student's, a leaf.
    """

    def __init__(
        self,
        mask: Tensor,
        labels: Tensor,
        student_logits: Tensor,
        teacher_logits: Tensor,
        old: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> None:
        self.mask = mask.bool()
        self.logits = student_logits.double().requires_grad_()
        rows = torch.arange(len(mask))[:, None].expand_as(mask)[self.mask]
        tokens = Side(torch.zeros_like(rows), labels[self.mask], rows)
        head = OutputHead(torch.eye(student_logits.shape[-1], dtype=torch.float64))
        written = None
        if old is not None:
            everyone = torch.ones(len(mask), dtype=torch.bool)
            some = None if weights is None else weights[self.mask]
            written = Written(everyone, old[self.mask], some)
        self.student = View(tokens, head, self.logits[self.mask], written=written)
        self.teacher = View(tokens, head, teacher_logits.double()[self.mask])
        each = torch.arange(len(rows))
        spans, pairs = torch.stack([each, each + 1], 1), each[:, None].expand(-1, 2)
        self.matches = Matches(spans, spans, pairs, pairs, each, each)

    @classmethod
    def of(cls, z: Numbers) -> Answers:
        """Of MiniLLM's files."""
        names = "response_ids", "student_logits", "teacher_logits", "out_old_logprobs", "out_w"
        return cls(z["out_mask"], *(z[n] for n in names))

    def run(self, objective: Any) -> LossOutput:
        return objective(self.student, self.teacher, self.matches)

    def rollout(self, objective: Policy) -> Rollout:
        return rollout_of(objective, self.student, self.teacher, self.matches)

    def mean(self, out: LossOutput, name: str) -> float:
        return float(out.sums()[name]) / out.tokens

    def gradient(self, out: LossOutput) -> Tensor:
        """Of the mean over tokens."""
        return torch.autograd.grad(out.loss / out.tokens, self.logits)[0]


def rollout_of(objective: Policy, student: View, teacher: View, matches: Matches) -> Rollout:
    """As the objective makes it; nothing is counted in."""
    with torch.no_grad():
        return Rollout.of(
            student,
            teacher,
            matches,
            config=objective.config,
            single_step=objective.single_step,
            budget=objective.setting.budget,
            whiten=objective._whitened,
        )


def know(objective: Policy, values: Tensor) -> None:
    """Let advantages be whitened by the statistics of some values."""
    x = values.double()
    moments = torch.stack([torch.tensor(float(len(x))).double(), x.sum(), x.square().sum()])
    assert objective.module is not None
    objective.module.sums.copy_(moments)


def assert_near(found: Tensor, published: Tensor, atol: float = 1e-6) -> None:
    torch.testing.assert_close(found, published, atol=atol, rtol=1e-6, check_dtype=False)


def test_the_golden_files_are_there():
    for method in ("mix", "pure", "warm", "pt"):
        assert len(files(f"minillm-{method}")) >= 3
    for method in ("trl-minillm", "derived-chunk-rewards", "derived-minillm-corrected"):
        assert len(files(method)) >= 3


# ---- MiniLLM -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", [*files("minillm-mix"), *files("minillm-pure")], ids=lambda p: p.stem
)
def test_rewards_and_returns_are_the_published_ones(path: Path):
    z = read(path)
    answers = Answers.of(z)
    rollout = answers.rollout(policy(single_step=False))
    assert_near(-rollout.gap / 0.5, z["out_rewards"][answers.mask])
    assert_near(rollout.advantage, z["out_norm_returns"][answers.mask], atol=3e-6)


@by_file("minillm-warm")
def test_returns_of_clipped_rewards_are_the_published_ones(path: Path):
    """Drawn at a temperature and from nine tokens: rewards compare two kinds of distributions
    there, which we refuse to do; what follows from them is the same."""
    z = read(path)
    answers = Answers.of(z)
    keys = {"gamma": float(z["gamma"]), "reward_clip": float(z["cliprange_reward"])}
    rollout = answers.rollout(policy(single_step=False, **keys))
    assert_near(rollout.advantage, z["out_norm_returns"][answers.mask], atol=3e-6)
    assert float((rollout.gap.abs() / 0.5).max()) > keys["reward_clip"]


@by_file("minillm-pure")
def test_the_policy_term_is_the_published_one_where_its_statistics_are_taken(path: Path):
    """Padding is part of them there. Without weights the two ways to clip are one."""
    z = read(path)
    answers, objective = Answers.of(z), policy(single_step=False, whiten="running")
    know(objective, z["out_norm_returns"].flatten())
    assert_near(answers.rollout(objective).advantage, z["out_advantages"][answers.mask], 1e-5)
    out = answers.run(objective)
    assert answers.mean(out, "policy") == pytest.approx(float(z["out_pg_loss"]), abs=1e-6)
    assert_near(answers.gradient(out), z["grad_pg_loss"])


@pytest.mark.parametrize(
    "path", [*files("minillm-mix"), *files("minillm-pure")], ids=lambda p: p.stem
)
def test_the_single_step_term_is_the_published_one(path: Path):
    z = read(path)
    answers, objective = Answers.of(z), policy(whiten="running")
    out = answers.run(objective)  # nothing is known yet to whiten by: no policy term
    assert answers.mean(out, "policy") == 0
    assert answers.mean(out, "single_step") == pytest.approx(float(z["out_reg_loss"]), abs=1e-6)
    assert_near(answers.gradient(out), z["grad_reg_loss"])


@by_file("minillm-warm")
def test_the_single_step_term_over_nine_tokens_is_the_published_one(path: Path):
    z, T = read(path), 2.0
    both = (
        (z[f"{side}_logits"] / T).masked_fill(z["inf_mask"], _OUT)
        for side in ("student", "teacher")
    )
    answers = Answers(z["out_mask"], z["response_ids"], *both, z["out_old_logprobs"])
    out = answers.run(policy(whiten="running"))
    assert answers.mean(out, "single_step") == pytest.approx(float(z["out_reg_loss"]), abs=1e-6)
    assert_near(answers.gradient(out) / T, z["grad_reg_loss"])


@by_file("derived-minillm-corrected")
@pytest.mark.parametrize("form", ["next", "current"])
def test_the_policy_term_is_the_corrected_one(path: Path, form: str):
    """A token's own reward once, ratios clipped without their weight, statistics of supervised
    tokens: what the first pass over the answers sees is what the second one is whitened by."""
    derived = read(path)
    published = read(path.with_name(path.name.replace("derived-minillm-corrected", "minillm-mix")))
    answers = Answers.of(published)
    objective = policy(single_step=form == "next", whiten="running")
    answers.run(objective)
    objective.end_step()
    rollout = answers.rollout(objective)
    assert_near(rollout.advantage, derived[f"out_advantages_{form}"][answers.mask], 1e-6)
    out = answers.run(objective)
    found = answers.mean(out, "policy")
    assert found == pytest.approx(float(derived[f"out_pg_loss_{form}"]), abs=1e-6)
    assert abs(found - float(published["out_pg_loss"])) > 0.1
    gradient = derived[f"grad_pg_loss_{form}"].double()
    if form == "next":
        gradient = gradient + published["grad_reg_loss"]
    assert_near(answers.gradient(out), gradient)


@by_file("minillm-pt")
def test_the_loss_on_plain_text_is_ours_of_token_kd(path: Path):
    """Which subtracts the teacher's entropy."""
    z = read(path)
    answers = Answers(z["labels"] != -100, z["labels"], z["student_logits"], z["teacher_logits"])
    k = float(z["kd_ratio"])
    config = TokenKDConfig(divergence="forward_kl", temperature=1.0)
    out = answers.run(TokenKD(config, facts(), Setting(k, Budget(4))))
    log_p = z["teacher_logits"][answers.mask].double().log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1).mean()
    assert answers.mean(out, "ce") == pytest.approx(float(z["out_lm_loss"]), abs=1e-6)
    found = answers.mean(out, "kd") + float(entropy)
    assert found == pytest.approx(float(z["out_kd_loss"]), abs=1e-6)
    assert_near(answers.gradient(out), z["grad_pt_loss"])


# ---- TRL -----------------------------------------------------------------------------------


def of_trl(z: Numbers, mask: Tensor) -> Answers:
    """Answers of this moment: the student that writes is the one that learns."""
    ids = z["completion_ids"]
    old = z["student_logits"].double().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    return Answers(mask, ids, z["student_logits"], z["teacher_logits"], old)


@by_file("trl-minillm")
def test_trls_single_step_term_counts_padding_too(path: Path):
    z = read(path)
    published = float(z["out_single_step_loss"])
    for mask, equal in (
        (torch.ones_like(z["completion_mask"]), True),
        (z["completion_mask"], False),
    ):
        answers = of_trl(z, mask)
        out = answers.run(policy(whiten="running"))
        found = answers.mean(out, "single_step")
        assert (abs(found - published) < 1e-6) == equal
        if equal:
            assert_near(answers.gradient(out), z["grad_single_step_loss"])


@by_file("trl-minillm")
def test_trls_policy_term_differs_by_a_baseline(path: Path):
    """At γ = 0, where its advantages are a token's own reward and are differentiated themselves:
    that takes 1 from each."""
    z = read(path)
    answers = of_trl(z, z["completion_mask"])
    keys = {"gamma": 0.0, "length_norm": False, "reward_scale": 1.0, "single_step": False}
    objective = policy(**keys)
    found = answers.rollout(objective).advantage
    assert_near(found, z["out_advantages_gamma0_norm"][answers.mask])
    out = answers.run(objective)
    published = float(z["out_policy_loss_gamma0_norm"])
    assert answers.mean(out, "policy") == pytest.approx(published, abs=1e-6)
    log_q = answers.logits.log_softmax(-1)
    labels = z["completion_ids"][..., None]
    baseline = log_q.gather(-1, labels)[..., 0][answers.mask].mean()
    shift = torch.autograd.grad(baseline, answers.logits)[0]
    assert_near(answers.gradient(out) + shift, z["grad_policy_loss_gamma0_norm"])
    assert float(shift.norm()) > 0.1


# ---- chunks --------------------------------------------------------------------------------


@by_file("derived-chunk-rewards")
def test_a_chunk_is_rewarded_at_its_last_token(path: Path):
    z = read(path)
    ends = [z[f"{side}_ends"].numpy() for side in ("student", "teacher")]
    spans = [Spans(np.concatenate([[0], e[:-1]]), e) for e in ends]
    groups = [torch.from_numpy(g) for g in group_numbers(*spans)]
    if ends[0][-1] != ends[1][-1]:  # nothing is supervised behind the last byte that both end at
        assert not z["out_mask"].all()
        groups[1] = torch.where(groups[1] == groups[1][-1], groups[1][-1] + 1, groups[1])
    views = [column(z[f"{side}_logprobs"]) for side in ("student", "teacher")]
    count = len(ends[0])
    written = Written(torch.ones(1, dtype=torch.bool), z["student_logprobs"].float())
    student = View(views[0].tokens, views[0].head, views[0].hidden, written=written)
    pairs = torch.zeros((0, 2), dtype=torch.long)
    bytes_ = [torch.from_numpy(np.stack([s.starts, s.ends], 1)) for s in spans]
    matches = Matches(bytes_[0], bytes_[1], pairs, pairs, groups[0], groups[1])
    objective = policy(one_vocabulary=False, reward_clip=float(z["cliprange_reward"]))
    rollout = rollout_of(objective, student, views[1], matches)
    assert torch.equal(rollout.acts, z["out_mask"].bool())
    clip = objective.config.reward_clip
    assert_near((-rollout.gap / 0.5).clamp(-clip, clip), z["out_rewards"])
    assert_near(rollout.advantage[rollout.acts], z["out_norm_returns"][rollout.acts])
    assert count == len(rollout.acts)


def column(logprobs: Tensor) -> View:
    """Tokens of one sample over two ids, which say id 0 with these log-probabilities."""
    nothing = torch.zeros(len(logprobs), dtype=torch.long)
    other = torch.log1p(-logprobs.exp())
    head = OutputHead(torch.eye(2, dtype=torch.float64))
    return View(Side(nothing, nothing, nothing), head, torch.stack([logprobs, other], 1))


@by_file("gold-chunks")
def test_chunks_are_cut_where_trl_cuts_them(path: Path):
    z = read(path)
    sides = [Spans(*z[f"{side}_offsets"].numpy().T) for side in ("student", "teacher")]
    for side, found in zip(("student", "teacher"), group_numbers(*sides), strict=True):
        assert found.tolist() == z[f"{side}_group"].tolist()
