"""Virtual attention: published and derived numbers, groups of tokens, and how it leaves."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from axolotl_dskd.config import DSKDConfig, TokenKDConfig, VirtualAttentionConfig
from axolotl_dskd.data.token_bytes import token_bytes
from axolotl_dskd.losses import Budget
from axolotl_dskd.objectives import Setting
from axolotl_dskd.objectives.cross_entropy import cross_entropy
from axolotl_dskd.objectives.token_kd import TokenKD
from axolotl_dskd.output_head import Gate, OutputHead
from axolotl_dskd.types import Side, View
from axolotl_dskd.virtual_attention import VirtualAttention, block_margins
from axolotl_dskd.virtual_attention.groups import CLASSES, by_class, by_clusters, token_class
from tests.support import tiny
from tests.support.golden_methods import files
from tests.support.inputs import HEADS, Inputs

CPU = torch.device("cpu")
BUDGET = Budget(4)


def read(path: Path) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(path).items()}


def attention(d: int = 16, seed: int = 3, **keys: Any) -> VirtualAttention:
    tokenizer = tiny.byte_level_tokenizer()
    head = OutputHead(torch.randn(len(tokenizer), d, generator=torch.Generator().manual_seed(1)))
    config = VirtualAttentionConfig(**{"blocks": 4, **keys})
    return VirtualAttention(config, tokenizer, len(tokenizer), head, CPU, seed)


def golden_attention(z: dict[str, Tensor]) -> VirtualAttention:
    """With a file's gate and groups."""
    keys = {"temperature": float(z["gate_temperature"]), "strength": float(z["strength"])}
    found = attention(12, **keys)
    found.logits = torch.nn.Parameter(z["gate_logits"].clone())
    found.group_of_token, found._ids = z["group_of_token"], ()
    return found


# ---- numbers -------------------------------------------------------------------------------


def test_the_golden_files_are_there():
    assert len(files("vam-proposal")) >= 3
    assert len(files("kdexplainer")) >= 3


@pytest.mark.parametrize("path", files("kdexplainer"), ids=lambda p: p.stem)
@pytest.mark.parametrize("t", ["10.0", "1.0", "0.1"])
def test_attention_equals_the_published_gate_of_kdexplainer(path: Path, t: str):
    """Its temperature is halved there, by a softmax that a second softmax undoes."""
    z = read(path)
    module = attention(16, temperature=0.5 * float(t))
    module.logits = torch.nn.Parameter(z["branch"].double())
    mixed = module.alpha() @ z["expert_outputs"].double()
    torch.testing.assert_close(module.alpha().detach().float(), z[f"gate_t{t}"], rtol=0, atol=1e-5)
    (gradient,) = torch.autograd.grad(mixed.square().sum(), module.logits)
    expected = z[f"grad_branch_t{t}"]
    allowed = 1e-5 * float(expected.abs().max()) + 1e-6
    torch.testing.assert_close(gradient.float(), expected, rtol=0, atol=allowed)


@pytest.mark.parametrize("path", files("vam-proposal"), ids=lambda p: p.stem)
def test_loss_and_gradients_equal_the_closed_form(path: Path):
    z = read(path)
    module, N = golden_attention(z), len(z["labels"])
    hidden, weight = (z[f"student_{name}"].clone().requires_grad_() for name in ("hidden", "head"))
    gate = module.gate(float(z["strength"]))
    torch.testing.assert_close(module.alpha().detach(), z["out_alpha"])
    torch.testing.assert_close(gate.scale.detach(), z["out_scale"])
    tokens = Side(torch.zeros(N).long(), z["labels"], torch.arange(N))
    student = View(tokens, OutputHead(weight, gate=gate), hidden)
    torch.testing.assert_close(student.head.logits(hidden).detach(), z["out_logits"])
    teacher = View(tokens, OutputHead(torch.eye(23, dtype=torch.float64)), z["teacher_logits"])
    inputs = Inputs(True)
    keys = TokenKDConfig(divergence="forward_kl", temperature=float(z["temperature"]))
    objective = TokenKD(keys, inputs.facts, Setting(float(z["kd_ratio"]), BUDGET))
    pairs = torch.arange(N)[:, None].expand(-1, 2)
    out = objective(student, teacher, replace(inputs.batch([0]).matches, exact=pairs))
    sums = out.sums()
    torch.testing.assert_close(sums["ce"], z["out_ce_sum"])
    torch.testing.assert_close(sums["kd"], z["out_kd_sum"])
    torch.testing.assert_close(module.entropy().detach(), z["out_entropy"])
    loss = out.loss + float(z["entropy_weight"]) * N * module.entropy()
    torch.testing.assert_close(loss.detach(), z["out_loss"])
    found = torch.autograd.grad(loss, [hidden, weight, module.logits])
    for gradient, name in zip(
        found, ("student_hidden", "student_head", "gate_logits"), strict=True
    ):
        torch.testing.assert_close(gradient, z[f"grad_{name}"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("path", files("vam-proposal"), ids=lambda p: p.stem)
def test_a_merged_head_and_margins_by_block_equal_the_derived_numbers(path: Path):
    z = read(path)
    module = golden_attention(z)
    gate = module.gate(float(z["strength"]))
    head = OutputHead(z["student_head"], gate=gate)
    merged, _ = head.rows(torch.arange(23))
    torch.testing.assert_close(merged, z["merged_head"])
    tokens = Side(z["labels"], z["labels"], torch.zeros_like(z["labels"]))
    view = View(tokens, head, z["student_hidden"])
    margins = block_margins(view, 4, BUDGET)
    torch.testing.assert_close(margins, z["block_share_of_margin"])
    logits = head.logits(z["student_hidden"]).detach()
    mean = (logits.softmax(-1) * logits).sum(-1)
    own = logits.gather(-1, z["labels"][:, None])[:, 0]
    torch.testing.assert_close(margins.sum(-1), own - mean)
    nothing = View(tokens.at(torch.zeros(0, dtype=torch.long)), head, z["student_hidden"][:0])
    assert block_margins(nothing, 4, BUDGET).shape == (0, 4)


def test_a_gate_on_a_frozen_head_costs_no_product_more():
    """Forward and backward, and with its own gradient."""
    counts = {}
    for name, options in {
        "plain": {},
        "gate": {"gate": True, "trains": ("gate",)},
        "trained": {"trains": ("weight",)},
        "trained gate": {"gate": True, "trains": ("weight", "gate")},
    }.items():
        batch = Inputs(True, options).batch()
        with FlopCounterMode(display=False) as counter:
            cross_entropy(batch.student, BUDGET).loss.backward()
        counts[name] = counter.get_total_flops()
    assert counts["gate"] == counts["plain"]
    assert counts["trained gate"] == counts["trained"]


def test_the_chunk_size_does_not_change_a_gates_gradient():
    inputs = Inputs(True, HEADS["gate"])
    student = inputs.batch().student
    trained = [inputs.states[0][0], *inputs.trained.values()]
    expected = torch.autograd.grad(cross_entropy(student, Budget(4096)).loss, trained)
    for chunk in (1, 7):
        found = torch.autograd.grad(cross_entropy(student, Budget(chunk)).loss, trained)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_a_gate_in_bfloat16_errs_no_more_than_the_plain_form_in_bfloat16():
    errors: dict[str, list[float]] = {"ours": [], "plain": []}
    for seed in (1, 2, 3):
        narrow = Inputs(True, "gate", torch.bfloat16, seed=seed)
        exact = Inputs(True, "gate", rounded=torch.bfloat16, seed=seed)
        exact.trained["gate"].data.copy_(narrow.trained["gate"].data)

        def gradient(inputs: Inputs, plain: bool) -> Tensor:
            batch = inputs.batch()
            loss = cross_entropy(batch.student, BUDGET).loss
            if plain:
                logits = inputs.logits(batch.student.hidden, 0).float()
                labels = batch.student.tokens.labels
                loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            return torch.autograd.grad(loss, inputs.trained["gate"])[0].double()

        truth = gradient(exact, plain=False)
        for name in errors:
            errors[name].append(float((gradient(narrow, name == "plain") - truth).norm()))
    assert sum(errors["ours"]) <= 1.1 * sum(errors["plain"])


# ---- groups --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        (b" the", "word begins, lower case"),
        (b" The", "word begins, capital"),
        (b"ing", "word goes on"),
        (b"New", "capital without space"),
        (b" 7", "digits"),
        (b" (", "punctuation"),
        (b"\n\n", "white space"),
        ("日本".encode(), "other scripts"),
        ("é".encode(), "word goes on"),
        ("日".encode()[:2], "pieces of characters"),
        (b"", "ends and special tokens"),
    ],
)
def test_tokens_have_readable_classes(token: bytes, expected: str):
    assert token_class(token) == expected


@pytest.mark.parametrize("groups", ["classes", "kmeans", "scrambled"])
def test_every_token_is_in_one_group_and_no_group_is_empty(groups: str):
    module = attention(groups=groups, group_count=6)
    gate = module.gate(1.0)
    assert torch.cat(gate.ids).sort().values.tolist() == list(range(len(module.group_of_token)))
    assert min(len(ids) for ids in gate.ids) > 0
    assert len(gate.ids) == len(module.names) == len(module.logits)
    assert torch.equal(gate.groups(), module.group_of_token)


def test_scrambled_groups_have_the_sizes_of_the_classes_and_other_tokens():
    classes, shuffled = (attention(groups=name).group_of_token for name in ("classes", "scrambled"))
    assert torch.equal(classes.bincount(), shuffled.bincount())
    assert (classes == shuffled).float().mean() < 0.6
    assert torch.equal(shuffled, attention(groups="scrambled").group_of_token)
    assert not torch.equal(shuffled, attention(groups="scrambled", seed=4).group_of_token)


def test_clusters_are_rows_of_one_direction():
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(8)[:3]
    own = torch.arange(60) % 3
    rows = centres[own] + 0.05 * torch.randn(60, 8, generator=generator)
    lengths = 0.1 + torch.rand(60, 1, generator=generator)
    found = by_clusters(OutputHead(rows * lengths), 3, 5, CPU)
    # One to one, in whatever order.
    assert len({(a, b) for a, b in zip(own.tolist(), found.tolist(), strict=True)}) == 3
    assert len(set(found.tolist())) == 3


def test_classes_are_those_of_the_tokenizer():
    table = token_bytes(tiny.byte_level_tokenizer())
    groups = by_class(table)
    assert len(groups) == len(table)
    named = dict(zip(table, (CLASSES[k] for k in groups.tolist()), strict=True))
    assert named[b"a"] == "word goes on"
    assert named[b""] == "ends and special tokens"


# ---- coming and leaving --------------------------------------------------------------------


def test_at_the_start_and_without_strength_the_student_is_untouched():
    module = attention()
    hidden = torch.randn(3, 16)
    weight = torch.randn(len(module.group_of_token), 16)
    plain = OutputHead(weight).logits(hidden)
    for strength in (0.0, 1.0):
        gated = OutputHead(weight, gate=module.gate(strength)).logits(hidden)
        torch.testing.assert_close(gated, plain)
    module.logits.data.normal_()
    torch.testing.assert_close(OutputHead(weight, gate=module.gate(0.0)).logits(hidden), plain)
    assert not torch.allclose(OutputHead(weight, gate=module.gate(0.5)).logits(hidden), plain)


def test_strength_is_constant_falls_and_is_nothing_at_the_last_step():
    module = attention(strength=0.8, anneal=0.3)
    strengths = [module.strength(step, 100) for step in range(100)]
    assert strengths[:71] == [0.8] * 71
    assert all(a > b for a, b in pairwise(strengths[70:]))
    assert strengths[99] == module.strength(100, 100) == 0.0
    for steps in (1, 2, 3, 4):
        assert module.strength(steps - 1, steps) == 0.0
    assert attention(leave="merge", strength=0.8).strength(99, 100) == 0.8


def test_entropy_is_one_where_all_blocks_are_alike_and_nothing_where_one_is_seen():
    module = attention()
    assert float(module.entropy().detach()) == pytest.approx(1.0)
    module.logits.data[:, 1] = 200.0
    assert float(module.entropy().detach()) == pytest.approx(0.0, abs=1e-6)


def test_blocks_that_do_not_divide_the_state_are_refused_in_words():
    with pytest.raises(ValueError, match=r"5 does not divide the student's hidden size 16.*\[2, 4"):
        attention(blocks=5)


@pytest.mark.parametrize(
    ("value", "blocks"), [(True, 8), ({}, 8), ({"blocks": 4}, 4), (None, None), (False, None)]
)
def test_the_block_may_be_true_or_keys(value: Any, blocks: int | None):
    block = {"teacher": {"base_model": "x"}, "virtual_attention": value}
    found = DSKDConfig.model_validate(block).virtual_attention
    assert (found and found.blocks) == blocks


def test_a_gate_knows_the_group_of_each_token():
    gate = Gate(torch.ones(2, 4), (torch.tensor([0, 3]), torch.tensor([1, 2])))
    assert gate.groups().tolist() == [0, 1, 1, 0]
