"""Objectives whose teacher says log-probabilities and gives no states."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from axolotl_dskd.config import DSKDConfig
from axolotl_dskd.objectives import Facts, Pair, build_objective
from axolotl_dskd.types import LossOutput
from tests.support import contract, tiny
from tests.support.contract import Case

#: Objectives that take log-probabilities of the labels alone, with the keys for it.
OF_LABELS = [
    contract.chunk_likelihood("labels", merge=False, debias=False),
    contract.policy("labels", one_vocabulary=True, single_step=False),
    contract.policy("labels of two tokenizers"),
    contract.preference("labels"),
]


@pytest.mark.parametrize("case", OF_LABELS, ids=lambda case: case.name)
def test_the_labels_log_probabilities_do_what_states_do(case: Case):
    inputs = case.inputs()
    student, teacher, matches = inputs.batch()
    said = inputs.logprobs(teacher.hidden, teacher.tokens)
    alone = replace(
        teacher, head=None, hidden=None, embedded=None, logprobs=replace(said, ids=None, top=None)
    )
    objective = case.objective(inputs)
    assert objective.needs.of_teacher == "labels"
    expected = objective(student, teacher, matches)
    without = replace(case, top=0).objective(inputs)
    without.begin(Pair(inputs.heads[:1], inputs.embeddings[:1], torch.device("cpu")))
    if case.prepare is not None:
        case.prepare(without)
    if without.module is not None:
        without.module.double()
    found = without(student, alone, matches)

    def numbers(out: LossOutput) -> list[torch.Tensor]:
        leaves = [ours for ours, _ in inputs.states]
        return [out.loss.detach(), *torch.autograd.grad(out.loss, leaves)]

    for a, b in zip(numbers(found), numbers(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(dict(found.sums()), dict(expected.sums()))


SERVER = {"url": "http://a", "gives": "logprobs"}


def built(objective: Any, one_vocabulary: bool, writes: bool = False) -> Any:
    """As a run builds it, of a teacher that gives log-probabilities."""
    ours = tiny.byte_level_tokenizer()
    theirs = ours if one_vocabulary else tiny.sentencepiece_tokenizer()
    block: dict[str, Any] = {
        "teacher": {"base_model": "x", "server": SERVER},
        "objective": objective,
        "samples": {"from": "student" if writes else "dataset"},
    }
    facts = Facts(ours, theirs, (len(ours), len(theirs)))
    return build_objective(DSKDConfig.model_validate(block), facts, memory=1 << 30, seed=0)


@pytest.mark.parametrize(
    ("objective", "one_vocabulary", "writes", "instead"),
    [
        *((name, False, False, "") for name in ("dual_space", "uld", "gold", "min_edit")),
        *((name, False, False, "") for name in ("sinkhorn", "span_support")),
        ("tests.support.toy_objective", False, False, ""),
        ("token_kd", True, False, ", or temperature: 1.0"),
        ("chunk_likelihood", False, False, ", or merge: false and debias: false"),
        ({"name": "policy", "single_step": True}, True, True, ", or single_step: false"),
        ({"name": "preference", "form": "token"}, True, False, ", or form: sequence"),
    ],
    ids=str,
)
def test_an_objective_that_needs_states_is_refused_in_words(
    objective: Any, one_vocabulary: bool, writes: bool, instead: str
):
    name = objective if isinstance(objective, str) else objective["name"]
    words = f"{name} needs the teacher's hidden states.*server.gives: states{instead}"
    with pytest.raises(ValueError, match=words):
        built(objective, one_vocabulary, writes)


def test_what_is_needed_goes_by_the_keys():
    assert built({"name": "token_kd", "temperature": 1.0}, True).needs.of_teacher == "top"
    policy = built("policy", one_vocabulary=True, writes=True)  # single_step: auto is off
    assert policy.needs.of_teacher == "labels"
    assert built("preference", False, writes=True).needs.of_teacher == "labels"


def test_a_cache_of_log_probabilities_is_refused():
    teacher = {"base_model": "x", "server": SERVER, "cache": {"path": "y"}}
    with pytest.raises(ValueError, match="keeps hidden states"):
        DSKDConfig.model_validate({"teacher": teacher})


def test_the_kept_mass_is_reported_of_tokens_that_meet():
    case = contract.token_kd_top("forward_kl")
    inputs = case.inputs()
    student, teacher, matches = inputs.batch()
    out = case.objective(inputs)(student, teacher, matches)
    labels = student.tokens.labels[matches.exact[:, 0]], teacher.tokens.labels[matches.exact[:, 1]]
    rows = matches.exact[labels[0] == labels[1]][:, 1]
    expected = inputs.logits(teacher.hidden, 1).softmax(-1).topk(7).values.sum(-1)[rows]
    torch.testing.assert_close(out.terms["kept_mass"].values, expected)
    assert 0.1 < float(expected.mean()) < 0.9
