"""What the configuration says of the loss reaches the loss."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch

from axolotl_dskd.config import DSKDConfig
from axolotl_dskd.losses import Budget, Distribution, Stream
from axolotl_dskd.objectives import Facts, build_objective
from axolotl_dskd.objectives.base import Pair
from axolotl_dskd.objectives.dual_space import DualSpace
from axolotl_dskd.output_head import OutputHead
from tests.support import tiny

MEMORY = 24 << 30


def resolved(block: dict[str, Any] | None = None, **objective: Any) -> DualSpace:
    """Dual space as a run builds it, with keys of the block and of the objective."""
    keys = {"alignment": "cma", **objective}
    whole = {"teacher": {"base_model": "x"}, "objective": {"name": "dual_space", **keys}}
    config = DSKDConfig.model_validate(whole | (block or {}))
    tokenizers = tiny.byte_level_tokenizer(), tiny.sentencepiece_tokenizer()
    facts = Facts(*tokenizers, (len(tokenizers[0]), len(tokenizers[1])))
    built = build_objective(config, facts, memory=MEMORY, seed=11)
    assert isinstance(built, DualSpace)
    return built


@pytest.mark.parametrize(
    ("key", "value"),
    [("temperature", 1.5), ("student_space_weight", 0.75), ("teacher_space_weight", 0.0)],
)
def test_a_number_of_the_objective_is_taken_as_it_is(key: str, value: float):
    assert getattr(resolved(**{key: value}).weights, key) == value


def test_a_number_of_the_run_is_taken_as_it_is():
    built = resolved({"kd_ratio": 0.25, "chunk_tokens": 48})
    assert built.weights.kd_ratio == built.setting.kd_ratio == 0.25
    assert built.setting.budget == Budget(48, MEMORY)
    assert built.setting.seed == 11


@pytest.mark.parametrize(
    ("key", "value"), [("learning_rate", 0.02), ("weight_decay", 0.3), ("warmup_steps", 7)]
)
def test_a_number_of_the_projectors_is_taken_as_it_is(key: str, value: float):
    assert getattr(resolved(projector={key: value}).beside, key) == value


MIXED = {"from": "student", "teacher_mix": 0.2}


def of_one_vocabulary(objective: dict[str, Any], samples: dict[str, Any]) -> Any:
    block = {"teacher": {"base_model": "x"}, "objective": objective, "samples": samples}
    tokenizer = tiny.byte_level_tokenizer()
    facts = Facts(tokenizer, tokenizer, (len(tokenizer),) * 2)
    return build_objective(DSKDConfig.model_validate(block), facts, memory=MEMORY, seed=0)


@pytest.mark.parametrize(
    ("objective", "samples"),
    [
        ({"name": "token_kd"}, {"from": "dataset"}),
        ({"name": "policy", "single_step": True}, {"from": "student"}),
        ({"name": "dual_space"}, MIXED),
        ({"name": "dual_space", "alignment": "positions"}, {"from": "dataset"}),
    ],
    ids=str,
)
def test_what_differs_between_two_vocabularies_of_one_size_is_said(
    objective: dict[str, Any], samples: dict[str, Any]
):
    ours, theirs = (copy.deepcopy(tiny.byte_level_tokenizer()) for _ in range(2))
    for tokenizer, token in ((ours, "<|padding|>"), (theirs, "<|tool|>")):
        tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    block = {"teacher": {"base_model": "x"}, "objective": objective, "samples": samples}
    facts = Facts(ours, theirs, (len(ours), len(theirs)))
    with pytest.raises(ValueError, match=rf"differ in 1 ids, such as id {len(ours) - 1} \('<\|"):
        build_objective(DSKDConfig.model_validate(block), facts, memory=MEMORY, seed=0)


def test_a_teacher_draws_along_over_one_vocabulary_only():
    with pytest.raises(ValueError, match=r"teacher_mix.*have different ones.*teacher_mix: 0"):
        resolved({"samples": MIXED})
    assert of_one_vocabulary({"name": "dual_space"}, MIXED).facts.one_vocabulary


def test_what_a_teacher_has_helped_to_write_is_nobodys_own_answer():
    with pytest.raises(ValueError, match="preference holds the student's own answer against"):
        of_one_vocabulary({"name": "preference"}, MIXED)
    for objective in ({"name": "policy"}, {"name": "preference", "form": "token"}):
        assert of_one_vocabulary(objective, MIXED).config.name == objective["name"]
    assert of_one_vocabulary({"name": "preference"}, {"from": "student"})


def test_the_projectors_rate_goes_by_how_they_start():
    """A start in least squares is worth keeping; it is known for good once they have started."""
    from tests.support.inputs import Inputs

    inputs = Inputs(one_vocabulary=False, dtype=torch.float32)
    rates = {}
    for init in ("lstsq", "random", "auto"):
        built = resolved(projector={"init": init})
        built.facts = inputs.facts
        built.begin(Pair(inputs.heads, inputs.embeddings, torch.device("cpu")))
        rates[init] = built.beside.learning_rate
    assert rates["lstsq"] < rates["random"] == 1e-3
    assert rates["auto"] in (rates["lstsq"], rates["random"])
    fixed = resolved(projector={"learning_rate": 0.5})
    fixed.facts = inputs.facts
    fixed.begin(Pair(inputs.heads, inputs.embeddings, torch.device("cpu")))
    assert fixed.beside.learning_rate == 0.5


@pytest.mark.parametrize(
    ("divergence", "key"),
    [
        ("skewed_forward_kl", "skew_lambda"),
        ("skewed_reverse_kl", "skew_lambda"),
        ("adaptive_kl", "adaptive_alpha"),
        ("js_divergence", "js_beta"),
    ],
)
def test_a_divergence_is_the_named_one_with_its_parameter(divergence: str, key: str):
    generator = torch.Generator().manual_seed(0)
    p, q = (Distribution.of(torch.randn(4, 30, generator=generator)) for _ in range(2))
    built = [resolved(**{"divergence": divergence, key: x}) for x in (0.2, 0.4)]
    values = [b.weights.divergence(p, q)[0] for b in (*built, resolved())]
    assert not any(torch.allclose(a, b) for a, b in itertools.pairwise(values))


def test_automatic_values_are_resolved():
    assert resolved().weights.mask_wrong
    assert not resolved(alignment="eta").weights.mask_wrong
    assert resolved(alignment="eta", agreement_mask=True).weights.mask_wrong
    assert not resolved(agreement_mask=False).weights.mask_wrong
    assert resolved().needs.embeddings
    assert not resolved(alignment="eta").needs.embeddings


def test_automatic_chunks_go_by_the_logits_that_both_sides_have():
    budget = resolved().setting.budget
    assert budget == Budget(None, MEMORY)

    def size(dtype: torch.dtype) -> int:
        streams = (
            Stream(
                torch.empty((5, 1), device="meta", dtype=dtype),
                OutputHead(torch.empty((vocabulary, 1), device="meta")),
            )
            for vocabulary in (32_000, 152_000)
        )
        return budget.size(*streams)

    assert size(torch.bfloat16) == 2 * size(torch.float32)


def test_without_a_teacher_the_loss_is_the_cross_entropy():
    config = DSKDConfig.model_validate({"teacher": {"base_model": "x"}, "kd_ratio": 0})
    assert not config.uses_teacher
    assert resolved({"kd_ratio": 0}).weights.kd_ratio == 0
