"""Objectives on written answers, the plain way: token by token, sample by sample, from full logits.

Each gives the sums of the terms of the loss. Knows no heads and no chunks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from axolotl_dskd.config import PolicyConfig, PreferenceConfig
from tests.support.groups import row_groups
from tests.support.inputs import Batch


def label_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """[n] of given tokens."""
    return logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def returns_of(
    rewards: list[float], acts: list[bool], gamma: float, exact: list[bool], length_norm: bool
) -> list[float]:
    """Of one sample's tokens, last one first."""
    found, ahead, count = [], 0.0, 0
    for reward, act, later in zip(*(reversed(x) for x in (rewards, acts, exact)), strict=True):
        before = ahead, count
        ahead, count = reward + gamma * ahead, count + act
        total, tokens = before if later else (ahead, count)
        found.append(total / max(tokens, 1) if length_norm else total)
    return found[::-1]


def policy(
    batch: Batch,
    logits: tuple[Tensor, Tensor],
    config: PolicyConfig,
    *,
    single_step: bool,
    whiten: tuple[float, float],
) -> dict[str, Tensor]:
    """MiniLLM's corrected form.

    Args:
        whiten: mean and standard deviation of advantages.
    """
    (student, teacher, matches), (z, t) = batch, logits
    written, ids = student.written, student.tokens.sample_ids
    labels, theirs = student.tokens.labels, teacher.tokens.labels
    log_q, log_p = label_logprobs(z, labels), label_logprobs(t.detach(), theirs)
    data = torch.ones(len(labels), dtype=torch.bool)
    terms: dict[str, Any] = {"policy": z.sum() * 0}
    if single_step:
        terms["single_step"] = z.sum() * 0
    if written is None:
        return terms | {"ce": F.cross_entropy(z, labels, reduction="sum")}
    acts, rewards, exact = [False] * len(ids), [0.0] * len(ids), [False] * len(ids)
    for ours, rows in row_groups(matches):
        if not written.samples[ids[ours[0]]]:
            continue
        gap = log_p[rows].sum() - written.logprobs[ours].double().sum()
        bound = config.reward_clip
        rewards[ours[-1]] = float((gap / config.reward_scale).clamp(-bound, bound))
        for i in ours:
            acts[i] = True
    if single_step:
        for i, j in matches.exact.tolist():
            if acts[i] and labels[i] == theirs[j]:
                exact[i] = True
                q, p = z[i].log_softmax(-1), t[j].detach().log_softmax(-1)
                terms["single_step"] = terms["single_step"] + (q.exp() * (q - p)).sum()
    for sample in written.samples.nonzero().flatten().tolist():
        rows = (ids == sample).nonzero().flatten().tolist()
        data[rows] = False
        columns = ([x[i] for i in rows] for x in (rewards, acts, exact))
        reward, act, later = columns
        returns = returns_of(reward, act, config.gamma, later, config.length_norm)
        for i, a in zip(rows, returns, strict=True):
            if not acts[i]:
                continue
            advantage = (a - whiten[0]) / (whiten[1] ** 2 + 1e-8) ** 0.5
            ratio = (log_q[i] - written.logprobs[i].double()).exp()
            bounded = ratio.clamp(1 - config.ratio_clip, 1 + config.ratio_clip)
            worst = torch.minimum(advantage * ratio, advantage * bounded)
            weight = 1.0 if written.weights is None else written.weights[i].double()
            terms["policy"] = terms["policy"] - weight * worst
    return terms | {"ce": F.cross_entropy(z[data], labels[data], reduction="sum")}


def preference(
    batch: Batch, logits: tuple[Tensor, Tensor], config: PreferenceConfig
) -> dict[str, Tensor]:
    """Pair by pair, or token by token."""
    (student, teacher, matches), (z, t) = batch, (logits[0], logits[1].detach())
    labels, theirs = student.tokens.labels, teacher.tokens.labels
    total: Tensor = z.sum() * 0
    if config.form == "token":
        for i, j in matches.exact.tolist():
            if labels[i] != theirs[j]:
                continue
            a, b = int(t[j].argmax()), int(z[i].argmax())
            q, p = z[i].log_softmax(-1), t[j].log_softmax(-1)
            ahead = q[a] - q[b]
            if not config.reference_free:
                ahead = ahead - (p[a] - p[b])
            total = total + preference_cost(ahead, config)
        return {"ce": F.cross_entropy(z, labels, reduction="sum"), "preference": total}
    log_q, log_p = label_logprobs(z, labels), label_logprobs(t, theirs)
    taught = torch.ones(len(labels), dtype=torch.bool)
    if student.written is not None:
        samples = student.tokens.sample_ids
        taught = ~student.written.samples[samples]
        assert student.written.pairs is not None
        for pair in student.written.pairs.tolist():
            margins, tokens = [], 0
            for sample in pair:
                rows = samples == sample
                count = int(rows.sum())
                margin = log_q[rows].sum()
                if not config.reference_free:
                    margin = margin - log_p[teacher.tokens.sample_ids == sample].sum()
                margins.append(margin / (count if config.length_norm else 1))
                tokens += count
            total = total + tokens * preference_cost(margins[0] - margins[1], config)
    return {"ce": -log_q[taught].sum(), "preference": total}


def preference_cost(ahead: Tensor, config: PreferenceConfig) -> Tensor:
    """Of one pair."""
    beta = config.strength
    if config.loss == "ipo":
        return (ahead - 1 / (2 * beta)) ** 2
    x, smoothing = beta * ahead - config.margin, config.label_smoothing
    return -(1 - smoothing) * x.sigmoid().log() - smoothing * (-x).sigmoid().log()
