"""Objectives on an accelerator: all that they make is there, too; and within autocast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from axolotl_dskd.config import VirtualAttentionConfig
from axolotl_dskd.evaluation.agreement import TeacherAgreement
from axolotl_dskd.evaluation.measure import TextBytes, measure
from axolotl_dskd.losses import Budget
from axolotl_dskd.objectives import own_text
from axolotl_dskd.types import Written
from axolotl_dskd.virtual_attention import VirtualAttention, block_margins
from tests.support.contract import CASES, Case, dual_space, token_kd
from tests.support.inputs import Inputs
from tests.support.pretend import CPU, OtherDevice, accelerator, moved
from tests.support.waits import Waits

#: Of a batch: two pairs of samples that belong together where answers are written.
SAMPLES = [1, 0, 3, 2]


def some_written(case: Case) -> Case:
    """With answers in it that the student wrote, which have a divergence of their own."""
    config = {**case.config, "divergence_written": "reverse_kl"}
    return replace(case, name=f"{case.name}, some written", config=config)


ALL = [
    *CASES,
    dual_space("cma of a share", alignment="cma", teacher_space_share=0.25),
    some_written(dual_space("eta", alignment="eta")),
    some_written(token_kd("forward_kl")),
]


def batch(case: Case, inputs: Inputs) -> tuple[Any, Any, Any]:
    student, teacher, matches = inputs.batch(SAMPLES)
    if "divergence_written" in case.config:
        written = Written(torch.tensor([True, False] * 2), torch.zeros(len(student)))
        student = replace(student, written=written)
    return student, teacher, matches


def step(case: Case, device: torch.device) -> dict[str, Tensor]:
    """Loss, terms and gradients of a second step, all on a device."""
    inputs = case.inputs("gate", dtype=torch.float32)
    objective = case.objective(inputs, device=device, chunk_tokens=64)
    for number in range(2):
        objective.follow(number, moved(inputs.heads[0], device))
        out = objective(*moved(batch(case, inputs), device))
        objective.end_step()
    named = {f"states {k}": ours for k, (ours, _) in enumerate(inputs.states)}
    named |= {f"head {name}": tensor for name, tensor in inputs.trained.items()}
    if objective.module is not None:
        named |= {f"module {n}": p for n, p in objective.module.named_parameters()}
    found = torch.autograd.grad(
        out.loss, list(named.values()), allow_unused=True, materialize_grads=True
    )
    numbers = {"loss": out.loss.detach()}
    for name, term in out.terms.items():
        numbers |= {f"values of {name}": term.values, f"samples of {name}": term.sample_ids}
    numbers |= {f"sum of {name}": total for name, total in out.sums().items()}
    assert {x.device for x in numbers.values()} == {device}
    return numbers | {f"gradient of {n}": g for n, g in zip(named, found, strict=True)}


def assert_same(function: Callable[[torch.device], dict[str, Tensor]]) -> None:
    """What a function finds on an accelerator is what it finds on the CPU."""
    expected = function(CPU)
    with accelerator() as device:
        found = moved(function(device), CPU)
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert type(found[name]) is Tensor, name
        assert torch.equal(found[name], x), name


@pytest.mark.parametrize("case", ALL, ids=lambda c: c.name)
def test_an_objective_computes_the_same_on_an_accelerator(case: Case):
    assert_same(lambda device: step(case, device))


def test_an_objective_that_keeps_a_table_on_the_cpu_is_seen(monkeypatch: pytest.MonkeyPatch):
    """Else the tests above would say nothing."""
    case = next(case for case in CASES if case.name == "gold hybrid")
    begin = Case.objective

    def forgetful(*args: Any, **keys: Any) -> Any:
        objective = begin(*args, **keys)
        objective.columns = moved(tuple(objective.columns), CPU)
        return objective

    monkeypatch.setattr(Case, "objective", forgetful)
    with accelerator() as device, pytest.raises(OtherDevice, match="index"):
        step(case, device)


def test_what_is_measured_is_the_same_on_an_accelerator():
    case = next(case for case in CASES if case.name == "policy two tokenizers")
    inputs, budget = case.inputs("gate", dtype=torch.float32), Budget(16)
    ids, ends = inputs.facts.shared_ids, inputs.facts.shared_ends
    spelled = [b"x"] * inputs.facts.vocab_sizes[0]

    def measured(device: torch.device) -> dict[str, Tensor]:
        student, teacher, matches = moved(batch(case, inputs), device)
        terms = TeacherAgreement(ids, budget, ends)(student, teacher, matches.starts)
        terms["reverse_kl"] = own_text.reverse_kl(student, teacher, matches, budget)
        return {
            **{name: term.values for name, term in terms.items()},
            **measure(student, budget)._asdict(),
            "margins": block_margins(student, 4, budget),
            "bytes": TextBytes(spelled)(matches.spans, student.tokens.labels),
        }

    assert_same(measured)


@pytest.mark.parametrize("groups", ["classes", "kmeans", "scrambled"])
def test_virtual_attention_is_the_same_on_an_accelerator(groups: str):
    case = dual_space("cma", alignment="cma")
    inputs = case.inputs("trained", dtype=torch.float32)
    config = VirtualAttentionConfig(blocks=4, groups=groups)

    def attended(device: torch.device) -> dict[str, Tensor]:
        student, teacher, matches = moved(tuple(inputs.batch(SAMPLES)), device)
        assert student.head is not None
        head, (vocabulary, _) = student.head, inputs.facts.vocab_sizes
        module = VirtualAttention(config, inputs.facts.student, vocabulary, head, device, 3)
        gate = module.gate(0.7)
        objective = case.objective(inputs, device=device, chunk_tokens=64)
        view = replace(student, head=replace(head, gate=gate))
        loss = objective(view, teacher, matches).loss + module.entropy()
        (gradient,) = torch.autograd.grad(loss, [module.logits])
        return {"loss": loss.detach(), "gradient": gradient, "groups": gate.groups()}

    assert_same(attended)


@pytest.mark.parametrize("case", ALL, ids=lambda c: c.name)
def test_autocast_changes_nothing(case: Case):
    """What mixed precision hands on are states in bfloat16 before a head in float32."""

    def found(enabled: bool) -> dict[str, Tensor]:
        inputs = case.inputs("gate", dtype=torch.float32)
        student, teacher, matches = batch(case, inputs)
        states = student.hidden.bfloat16()
        objective = case.objective(inputs, chunk_tokens=64)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            for number in range(2):
                objective.follow(number, inputs.heads[0])
                out = objective(replace(student, hidden=states), teacher, matches)
                objective.end_step()
        tensors = [states, *inputs.trained.values()]
        if objective.module is not None:
            tensors += objective.module.parameters()
        gradients = torch.autograd.grad(
            out.loss, tensors, allow_unused=True, materialize_grads=True
        )
        numbers = {f"gradient {k}": g for k, g in enumerate(gradients)}
        return numbers | {"loss": out.loss.detach()} | dict(out.sums())

    plain, cast = found(False), found(True)
    assert plain.keys() == cast.keys()
    for name, x in plain.items():
        assert torch.equal(x, cast[name]), name


#: How often the host may wait in one call; of objectives whose chunks it does not wait for.
WAITS = {
    **dict.fromkeys(("dual_space", "token_kd", "uld", "min_edit"), 3),
    **{"chunk_likelihood": 8, "preference": 6, "policy": 10},
}


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.config["name"] in WAITS and case.top is None],
    ids=lambda c: c.name,
)
def test_an_objective_does_not_wait_more_often(case: Case):
    inputs, counts = case.inputs("trained", dtype=torch.float32), []
    with accelerator() as device:
        for chunk_tokens in (4096, 16):
            objective = case.objective(inputs, device=device, chunk_tokens=chunk_tokens)
            objective.follow(0, moved(inputs.heads[0], device))
            objective.follow(1, moved(inputs.heads[0], device))  # what the start reports is past
            views = moved(batch(case, inputs), device)
            for view in views[:2]:
                known = tuple(view.tokens.sample_ids.bincount().tolist())
                object.__setattr__(view.tokens, "counts", known)
            with Waits() as waits:
                objective(*views)
            counts.append(waits.count)
    assert counts[0] == counts[1] <= WAITS[case.config["name"]]
