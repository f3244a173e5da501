"""One contract over all objectives: what holds whatever is learned (cases in support/contract)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from axolotl_dskd.config import DSKDConfig
from axolotl_dskd.objectives import Objective, sinkhorn
from axolotl_dskd.types import LossOutput, Written
from tests.support import toy_objective
from tests.support.contract import CASES, TOY, Case
from tests.support.inputs import HEADS, Inputs

cases = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


def leaves(inputs: Inputs, objective: Objective[Any]) -> dict[str, Tensor]:
    """All that a loss may train: the student's states, sample by sample, its head, the module."""
    found = {f"states {k}": ours for k, (ours, _) in enumerate(inputs.states)}
    found |= {f"head {name}": tensor for name, tensor in inputs.trained.items()}
    if objective.module is not None:
        found |= {f"module {n}": p for n, p in objective.module.named_parameters()}
    return found


def gradients(loss: Tensor, inputs: Inputs, objective: Objective[Any]) -> dict[str, Tensor]:
    trained = leaves(inputs, objective)
    found = torch.autograd.grad(
        loss, list(trained.values()), allow_unused=True, materialize_grads=True
    )
    return dict(zip(trained, found, strict=True))


def assert_equal(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9
) -> None:
    """Relative to the whole of each tensor, and to the largest of all where one is nearly 0 (a
    bias of the query moves all scores of a row alike)."""
    assert found.keys() == expected.keys()
    largest = max(float(x.norm()) for x in expected.values())
    assert largest > 0
    for name, x in expected.items():
        allowed = tolerance * max(float(x.norm()), 1e-3 * largest)
        assert float((found[name] - x).norm()) <= allowed, name


def outcome(
    objective: Objective[Any], inputs: Inputs, samples: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """Loss, sums of terms and gradients of a batch."""
    out = objective(*inputs.batch(samples))
    sums = {f"sum of {name}": total for name, total in out.sums().items()}
    return {"loss": out.loss.detach()} | sums | gradients(out.loss, inputs, objective)


@pytest.mark.parametrize("head", HEADS)
@cases
def test_loss_and_gradients_equal_the_plain_form(case: Case, head: str):
    inputs = case.inputs(head)
    objective, batch = case.objective(inputs, kd_ratio=0.4), inputs.batch()
    out = objective(*batch)
    terms = case.plain(objective, inputs, batch)
    expected = case.weighted(terms, 0.4)
    sums = out.sums()
    for name, total in terms.items():
        torch.testing.assert_close(sums[name], total.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(out.loss.detach(), expected.detach(), rtol=1e-9, atol=1e-9)
    assert_equal(*(gradients(loss, inputs, objective) for loss in (out.loss, expected)))


@cases
def test_the_chunk_size_does_not_change_loss_or_gradients(case: Case):
    inputs = case.inputs()
    whole = outcome(case.objective(inputs, chunk_tokens=4096), inputs)
    for chunk in (1, 3, 16):
        assert_equal(outcome(case.objective(inputs, chunk_tokens=chunk), inputs), whole)


@cases
def test_the_order_of_the_samples_does_not_change_loss_or_gradients(case: Case):
    inputs = case.inputs()
    objective = case.objective(inputs)
    expected = outcome(objective, inputs)
    assert_equal(outcome(objective, inputs, [5, 2, 7, 0, 3, 6, 1, 4]), expected)


@cases
def test_a_batch_of_eight_is_the_sum_of_eight_batches_of_one(case: Case):
    """Where two samples are a pair, of batches of two."""
    inputs = case.inputs()
    objective = case.objective(inputs)
    assert len(inputs.pairs) == 8
    alone = [outcome(objective, inputs, samples) for samples in case.together()]
    expected = {name: sum(found[name] for found in alone) for name in alone[0]}
    assert_equal(outcome(objective, inputs), expected)


#: Of objectives that learn from any rows; those that need written ones have their own in `inputs`.
of_any_rows = pytest.mark.parametrize(
    "case", [case for case in CASES if not case.written], ids=lambda c: c.name
)


def with_written(batch: Any, samples: Sequence[int]) -> tuple[Any, Any, Any]:
    """A batch of which the student wrote some answers."""
    student, teacher, matches = batch
    ids = student.tokens.sample_ids
    marked = torch.zeros(int(ids.max()) + 1, dtype=torch.bool)
    marked[list(samples)] = True
    written = Written(marked, torch.zeros(len(student)))
    return replace(student, written=written), teacher, matches


@of_any_rows
def test_an_answer_that_was_written_is_compared_but_is_no_reference(case: Case):
    inputs = case.inputs()
    objective, batch = case.objective(inputs, kd_ratio=0.4), inputs.batch([1, 4, 6])
    out = objective(*with_written(batch, range(3)))
    if hasattr(objective, "weights") and hasattr(objective.weights, "mask_wrong"):
        objective.weights = replace(objective.weights, mask_wrong=False)
    terms = case.plain(objective, inputs, batch)
    for name in ("ce", "projector_ce"):
        terms.pop(name, None)
    expected = 0.4 * sum(case.weights.get(name, 1.0) * x for name, x in terms.items())
    sums = out.sums()
    assert float(sums["ce"]) == float(sums.get("projector_ce", 0.0)) == 0.0
    torch.testing.assert_close(out.loss.detach(), expected.detach(), rtol=1e-9, atol=1e-9)
    assert_equal(*(gradients(loss, inputs, objective) for loss in (out.loss, expected)))


@of_any_rows
def test_written_answers_do_not_touch_what_the_data_say(case: Case):
    inputs = case.inputs()
    objective = case.objective(inputs)

    def found(rows: Sequence[int], written: Sequence[int]) -> dict[str, Tensor]:
        out = objective(*with_written(inputs.batch(rows), written))
        return {"loss": out.loss.detach()} | gradients(out.loss, inputs, objective)

    parts = found([0, 1, 2], []), found([5, 6, 7], [0, 1, 2])
    assert_equal(
        found([5, 0, 6, 1, 7, 2], [0, 2, 4]), {n: parts[0][n] + parts[1][n] for n in parts[0]}
    )


@pytest.mark.parametrize("chunk_tokens", [2, 16])
@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.config["name"] in ("token_kd", "dual_space")],
    ids=lambda c: c.name,
)
def test_written_answers_may_have_a_divergence_of_their_own(case: Case, chunk_tokens: int):
    """In one batch with others: all is as if each kind had been alone with its own."""
    inputs = case.inputs()

    def found(rows: Sequence[int], written: Sequence[int], **keys: Any) -> dict[str, Tensor]:
        kind = replace(case, config={**case.config, **keys})
        objective = kind.objective(inputs, chunk_tokens=chunk_tokens)
        out = objective(*with_written(inputs.batch(rows), written))
        return {"loss": out.loss.detach()} | gradients(out.loss, inputs, objective)

    ours, theirs = "skewed_forward_kl", "reverse_kl"
    parts = [found([0, 1, 2], [], divergence=ours), found([5, 6, 7], [0, 1, 2], divergence=theirs)]
    both = found([5, 0, 6, 1, 7, 2], [0, 2, 4], divergence=ours, divergence_written=theirs)
    assert_equal(both, {n: parts[0][n] + parts[1][n] for n in parts[0]})
    with pytest.raises(AssertionError):
        assert_equal(both, found([5, 0, 6, 1, 7, 2], [0, 2, 4], divergence=ours))


@cases
def test_no_supervised_token_gives_a_loss_of_zero_with_a_gradient_for_all_that_trains(case: Case):
    inputs = case.inputs()
    objective, batch = case.objective(inputs), inputs.batch([])
    out = objective(*batch)
    assert float(out.loss.detach()) == out.tokens == 0
    assert all(len(term.values) == 0 for term in out.terms.values())
    named = leaves(inputs, objective)
    tensors = [t for name, t in named.items() if not name.startswith("states")]
    # Part of a module may be for a term that the objective has not.
    learned = torch.autograd.grad(objective(*inputs.batch()).loss, tensors, allow_unused=True)
    trained = [t for t, gradient in zip(tensors, learned, strict=True) if gradient is not None]
    assert trained
    for gradient in torch.autograd.grad(out.loss, [batch.student.hidden, *trained]):
        assert not gradient.any()


class Largest(TorchDispatchMode):
    """Remembers the most numbers that an operation's result had."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.numbers = max(self.numbers, leaf.numel())
        return result


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@cases
def test_no_tensor_holds_logits_of_all_tokens(
    case: Case, training: bool, monkeypatch: pytest.MonkeyPatch
):
    # Its own scratch has a size of its own, by default larger than all of this batch.
    monkeypatch.setattr(sinkhorn, "_NUMBERS", 4096)
    inputs = case.inputs(dtype=torch.float32, copies=5)
    objective, batch = case.objective(inputs, chunk_tokens=32), inputs.batch()
    sizes = zip((batch.student, batch.teacher), inputs.facts.vocab_sizes, strict=True)
    logits = min(len(view) * vocabulary for view, vocabulary in sizes)
    with torch.set_grad_enabled(training), Largest() as seen:
        out = objective(*batch)
        if training:
            out.loss.backward()
    assert inputs.facts.vocab_sizes[0] <= seen.numbers < logits / 8


def bfloat16_errors(case: Case, seed: int) -> tuple[dict[str, float], dict[str, float]]:
    """What the objective and its plain form in bfloat16 are off by, relative to float64 over the
    same numbers."""
    narrow = case.inputs("trained", torch.bfloat16, seed=seed)
    wide = case.inputs("trained", rounded=torch.bfloat16, seed=seed)
    objective, exact = case.objective(narrow), case.objective(wide)
    if objective.module is not None:  # solved from heads of two dtypes
        exact.module.load_state_dict(objective.module.state_dict())

    def numbers(loss: Tensor, inputs: Inputs, which: Objective[Any]) -> dict[str, Tensor]:
        found = {n: g.double() for n, g in gradients(loss, inputs, which).items()}
        states = [found.pop(n) for n in list(found) if n.startswith("states")]
        return {"loss": loss.detach().double(), "states": torch.cat(states)} | found

    def plain(inputs: Inputs, which: Objective[Any]) -> dict[str, Tensor]:
        loss = case.weighted(case.plain(which, inputs, inputs.batch()), 0.4)
        return numbers(loss, inputs, which)

    truth = plain(wide, exact)
    largest = max(float(x.norm()) for name, x in truth.items() if name != "loss")

    def errors(found: dict[str, Tensor]) -> dict[str, float]:
        return {
            name: float((found[name] - x).norm()) / max(float(x.norm()), 1e-3 * largest)
            for name, x in truth.items()
        }

    ours = numbers(objective(*narrow.batch()).loss, narrow, objective)
    return errors(ours), errors(plain(narrow, objective))


@cases
def test_bfloat16_errs_no_more_than_the_plain_form_in_bfloat16(case: Case):
    """In the root mean square over some seeds."""
    rounds = [bfloat16_errors(case, seed) for seed in case.seeds]
    for name in rounds[0][0]:
        ours, plain = (sum(r[k][name] ** 2 for r in rounds) ** 0.5 for k in (0, 1))
        # Gradients come out in bfloat16, which alone is off by up to 2^-9.
        assert ours <= max(plain, 2**-8 * len(rounds) ** 0.5) * (1.5 if case.jumps else 1.1), name


@cases
def test_without_gradients_nothing_is_differentiated(case: Case):
    inputs = case.inputs()
    objective, batch = case.objective(inputs), inputs.batch()
    with FlopCounterMode(display=False) as with_gradients:
        expected = objective(*batch)
    with torch.no_grad(), FlopCounterMode(display=False) as without:
        out = objective(*batch)
    assert not out.loss.requires_grad
    # Two products of three are for gradients, one of two for a stream that learns nothing.
    assert without.get_total_flops() < 0.75 * with_gradients.get_total_flops()
    assert float(out.loss) == pytest.approx(float(expected.loss.detach()), rel=1e-12)
    torch.testing.assert_close(dict(out.sums()), dict(expected.sums()), rtol=1e-12, atol=1e-12)
    assert all(tensor.grad is None for tensor in leaves(inputs, objective).values())


@cases
def test_every_term_is_declared_and_knows_its_samples(case: Case):
    inputs = case.inputs(dtype=torch.float32)
    objective = case.objective(inputs)
    out = objective(*inputs.batch())
    assert out.terms.keys() == objective.terms.keys() - case.absent
    assert case.absent <= objective.terms.keys()
    assert set(objective.terms.values()) <= {"student_token", "reference_token", "value"}
    assert out.tokens == len(inputs.batch().student)
    for name, term in out.terms.items():
        assert term.values.shape == term.sample_ids.shape, name
        assert not term.values.requires_grad, name
        assert term.values.dtype in (torch.float32, torch.float64), name
        assert set(term.sample_ids.tolist()) <= set(range(8)), name
        assert len(set(term.sample_ids.tolist())) > 2, name


def whole_terms(case: Case, out: LossOutput) -> dict[str, Tensor]:
    """Sums of those terms that the loss is made of."""
    inputs = case.inputs()
    learned = case.plain(case.objective(inputs), inputs, inputs.batch())
    return {name: total for name, total in out.sums().items() if name in learned}


@pytest.mark.parametrize("kd_ratio", [0.25, 1.0])
@cases
def test_the_loss_is_the_weighted_sum_of_its_terms(case: Case, kd_ratio: float):
    inputs = case.inputs()
    out = case.objective(inputs, kd_ratio)(*inputs.batch())
    expected = case.weighted(whole_terms(case, out), kd_ratio)
    assert float(out.loss.detach()) == pytest.approx(float(expected), rel=1e-12)


@cases
def test_a_kd_ratio_of_zero_is_the_cross_entropy(case: Case):
    inputs = case.inputs()
    objective, batch = case.objective(inputs, kd_ratio=0.0), inputs.batch()
    out = objective(*batch)
    logits = inputs.logits(batch.student.hidden, 0)
    expected = torch.nn.functional.cross_entropy(logits, case.ce_labels(batch), reduction="sum")
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=0)
    assert_equal(*(gradients(loss, inputs, objective) for loss in (out.loss, expected)))


# ---- the inputs and the toy -----------------------------------------------------------------


@pytest.mark.parametrize("one_vocabulary", [False, True])
def test_the_samples_hold_every_kind_of_match(one_vocabulary: bool):
    """Else the contract would pass for what never happens."""
    batch = Inputs(one_vocabulary).batch()
    student, teacher, matches = batch
    N, M, P, Q = len(student), len(teacher), len(matches.exact), len(matches.starts)
    labels = student.tokens.labels[matches.exact[:, 0]], teacher.tokens.labels[matches.exact[:, 1]]
    if one_vocabulary:
        assert N == M == P == Q
        assert 0 < int((labels[0] != labels[1]).sum()) < 4
    else:
        assert 0.1 * N < P < Q < 0.95 * N
        groups = torch.stack([g.bincount() for g in (matches.groups, matches.teacher_groups)])
        assert (groups > 1).all(0).any()
        assert (groups[0] > 1).any()
        assert (groups[1] > 1).any()
    for pairs in (matches.exact, matches.starts):
        assert (pairs.diff(dim=0) > 0).all()
    assert {tuple(p) for p in matches.exact.tolist()} <= {tuple(p) for p in matches.starts.tolist()}


def test_an_objective_of_ones_own_is_one_short_file():
    """Configuration, method and docstring; named in a config by its dotted path."""
    path = Path(toy_objective.__file__)
    assert len(path.read_text().splitlines()) < 60
    block = {"teacher": {"base_model": "x"}, "objective": {"name": TOY, "weight": 0.25}}
    config = DSKDConfig.model_validate(block).objective
    assert isinstance(config, toy_objective.ToyConfig)
    assert config.weight == 0.25
    with pytest.raises(ValueError, match="wieght"):
        DSKDConfig.model_validate(block | {"objective": {"name": TOY, "wieght": 1}})
