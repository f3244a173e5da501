"""Two-sided problems for objectives on groups: real tokenizers and text, random states."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from axolotl_dskd.config import ObjectiveConfig
from axolotl_dskd.data.byte_spans import aligned_groups, give_textless_tokens_room, tile
from axolotl_dskd.data.token_bytes import token_bytes
from axolotl_dskd.losses import Budget
from axolotl_dskd.objectives.base import Facts, Objective, Pair, Setting
from axolotl_dskd.output_head import OutputHead
from axolotl_dskd.types import LossOutput, Matches, Side, View
from tests.support import tiny


@dataclass(frozen=True)
class Problem:
    """Both sides of a batch; every tensor that may learn is a leaf."""

    tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]
    student: View
    teacher: View
    matches: Matches

    def leaves(self) -> list[Tensor]:
        """The student's states and the trained tensors of its head."""
        assert self.student.hidden is not None and self.student.head is not None
        every = (self.student.hidden, *self.student.head.tensors())
        return [t for t in every if t is not None and t.requires_grad]

    def logits(self) -> tuple[Tensor, Tensor]:
        """[N, V] and [M, U], all at once."""
        views = (self.student, self.teacher)
        q, p = (v.head.logits(v.hidden) for v in views)  # type: ignore[union-attr, arg-type]
        return q, p.detach()

    def objective(
        self, config: ObjectiveConfig, kd_ratio: float = 0.5, chunk: int = 64
    ) -> Objective[Any]:
        """As a run would build it."""
        heads = (self.student.head, self.teacher.head)
        assert heads[0] is not None and heads[1] is not None
        facts = Facts(*self.tokenizers, (heads[0].vocab_size, heads[1].vocab_size))
        setting = Setting(kd_ratio, Budget(chunk))
        importlib.import_module(f"axolotl_dskd.objectives.{config.name}")
        objective = Objective.known[type(config)](config, facts, setting)
        nothing = torch.zeros(0)
        objective.begin(Pair(heads, (nothing, nothing), torch.device("cpu")))
        return objective

    def run(self, config: ObjectiveConfig, kd_ratio: float = 0.5, chunk: int = 64) -> LossOutput:
        """The loss of a new objective."""
        out = self.objective(config, kd_ratio, chunk)(self.student, self.teacher, self.matches)
        assert out.tokens == len(self.student)
        return out

    def to(self, dtype: torch.dtype) -> Problem:
        """States and heads in another dtype; new leaves."""

        def cast(view: View) -> View:
            assert view.hidden is not None and view.head is not None
            tensors = {
                n: getattr(view.head, n).detach().to(dtype).requires_grad_(view.head.trainable)
                for n in ("weight", "bias", "lora_A", "lora_B")
                if getattr(view.head, n) is not None
            }
            hidden = view.hidden.detach().to(dtype).requires_grad_(view.hidden.requires_grad)
            return replace(view, hidden=hidden, head=replace(view.head, **tensors))

        return replace(self, student=cast(self.student), teacher=cast(self.teacher))

    def without_tokens(self) -> Problem:
        """The same models on a batch without a supervised token."""
        empty = torch.zeros(0, dtype=torch.long)

        def cut(view: View) -> View:
            assert view.hidden is not None
            hidden = view.hidden.detach()[:0].requires_grad_(view.hidden.requires_grad)
            return replace(view, tokens=view.tokens.at(empty), hidden=hidden)

        pairs = torch.zeros((0, 2), dtype=torch.long)
        matches = Matches(pairs, pairs, pairs, pairs, empty, empty)
        return replace(self, student=cut(self.student), teacher=cut(self.teacher), matches=matches)


def matches_of(sides: tuple[Side, Side], groups: tuple[Tensor, Tensor]) -> Matches:
    """Groups alone: what these objectives read."""
    pairs = torch.zeros((0, 2), dtype=torch.long)
    return Matches(pairs, pairs, pairs, pairs, *groups)


def problem(
    *,
    head: str = "plain",
    seed: int = 0,
    one_vocabulary: bool = False,
    end_tokens: tuple[int, int] = (1, 2),
    dtype: torch.dtype = torch.float64,
    sharpness: float = 1.5,
) -> Problem:
    """The answers of `tiny.QUESTIONS`, read by tokenizers of both families.

    Args:
        head: plain, frozen, or full (bias, LoRA, scale and softcap, all trained).
        end_tokens: how many of them each side has behind an answer; the longer side's last one has
            no counterpart.
        sharpness: size of the logits.
    """
    ours = tiny.byte_level_tokenizer()
    tokenizers = (ours, ours if one_vocabulary else tiny.sentencepiece_tokenizer())
    read = [_sides(tokenizers, text, end_tokens) for _, text in tiny.QUESTIONS]
    sides, groups = [], []
    for side in (0, 1):
        columns: list[list[int]] = [[], [], [], []]
        before = 0
        for sample, (labels, numbers, count) in enumerate(read):
            ids = labels[side]
            columns[0] += [7, *ids[:-1]]
            columns[1] += ids
            columns[2] += [sample] * len(ids)
            columns[3] += [before + g for g in numbers[side]]
            before += count
        *tokens, group = (torch.tensor(c) for c in columns)
        sides.append(Side(*tokens))
        groups.append(group)
    both = (sides[0], sides[1])
    torch.manual_seed(seed)
    views = []
    for side, tokenizer, size in zip(both, tokenizers, (16, 24), strict=True):
        vocab = len(tokenizer)
        hidden = torch.randn(len(side), size, dtype=dtype)
        weight = torch.randn(vocab + 3, size, dtype=dtype) * sharpness / size**0.5
        made = OutputHead(weight, vocab_size=vocab)
        if side is sides[0]:
            hidden.requires_grad_()
            weight.requires_grad_(head != "frozen")
            if head == "full":
                more = {
                    "bias": torch.randn(vocab + 3, dtype=dtype),
                    "lora_A": torch.randn(2, size, dtype=dtype) * 0.3,
                    "lora_B": torch.randn(vocab + 3, 2, dtype=dtype),
                }
                made = OutputHead(
                    weight,
                    **{n: t.requires_grad_() for n, t in more.items()},
                    lora_scale=0.5,
                    scale=0.7,
                    softcap=8.0,
                    vocab_size=vocab,
                )
        elif head == "full":
            made = replace(made, softcap=9.0)
        views.append(View(side, made, hidden))
    return Problem(tokenizers, views[0], views[1], matches_of(both, (groups[0], groups[1])))


def _sides(
    tokenizers: tuple[PreTrainedTokenizerFast, ...], text: str, end_tokens: tuple[int, int]
) -> tuple[list[list[int]], list[list[int]], int]:
    """Labels and groups of both sides of one answer, and how many groups there are."""
    labels, spans, textless = [], [], []
    for tokenizer, ends in zip(tokenizers, end_tokens, strict=True):
        table = token_bytes(tokenizer)
        ids = tokenizer.encode(text, add_special_tokens=False)
        lengths = [len(table[i]) for i in ids]
        lengths[0] -= sum(lengths) - len(text.encode())  # the space that sentencepiece adds
        spans.append(tile(lengths + [0] * ends))
        textless.append(np.array([False] * len(ids) + [True] * ends))
        labels.append(ids + [tokenizer.eos_token_id] * ends)
    roomy = give_textless_tokens_room(spans[0], textless[0], spans[1], textless[1])
    groups = aligned_groups(*roomy)
    numbers: list[list[int]] = [[0] * len(ids) for ids in labels]
    for number, group in enumerate(groups):
        for side, rows in enumerate((group.student, group.teacher)):
            for row in rows:
                numbers[side][row] = number
    return labels, numbers, len(groups)


def row_groups(matches: Matches) -> list[tuple[list[int], list[int]]]:
    """Rows of both sides of each group that both have a row of; found one by one."""
    found = []
    for number in sorted(set(matches.groups.tolist()) & set(matches.teacher_groups.tolist())):
        both = (matches.groups, matches.teacher_groups)
        ours, theirs = ((g == number).nonzero().flatten().tolist() for g in both)
        found.append((ours, theirs))
    return found


def equals_plain_form(
    made: Problem,
    config: ObjectiveConfig,
    plain: Callable[[Problem], Tensor],
    chunk: int,
    tolerance: float = 1e-9,
) -> LossOutput:
    """Hold a loss and all its gradients against a plain form on all logits."""
    leaves = made.leaves()
    expected = plain(made)
    gradients = torch.autograd.grad(expected, leaves, materialize_grads=True)
    out = made.run(config, chunk=chunk)
    found = torch.autograd.grad(out.loss, leaves, materialize_grads=True)
    torch.testing.assert_close(out.loss, expected, rtol=tolerance, atol=tolerance)
    for a, b in zip(found, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert all(bool(g.abs().sum() > 0) for g in gradients)
    with torch.no_grad():
        torch.testing.assert_close(made.run(config, chunk=chunk).loss, out.loss.detach())
    return out
