"""The dual-space loss written the plain way: all logits at once, gradients by autograd.

What the package computes in chunks and closed form is compared with this, and benchmarks measure
against it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def divergence(name: str, p: Tensor, q: Tensor) -> Tensor:
    """[..., V] probabilities -> [...], from the definitions, with default parameters."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(a > 0, a * (a.log() - b.log()), torch.zeros_like(a)).sum(-1)

    match name:
        case "forward_kl":
            return kl(p, q)
        case "reverse_kl":
            return kl(q, p)
        case "js_divergence":
            return (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2
        case "skewed_forward_kl":
            return kl(p, 0.1 * p + 0.9 * q)
        case "skewed_reverse_kl":
            return kl(q, 0.9 * p + 0.1 * q)
        case "tvd":
            return 0.5 * (p - q).abs().sum(-1)
        case "adaptive_kl":
            order = p.argsort(-1)
            tail_sorted = p.gather(-1, order).cumsum(-1) <= 0.5
            tail = torch.zeros_like(tail_sorted).scatter(-1, order, tail_sorted)
            gap = (p - q).abs().detach()
            weight = (gap * ~tail).sum(-1) / gap.sum(-1)
            return weight * kl(p, q) + (1 - weight) * kl(q, p)
    raise AssertionError(name)


def head_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    groups: Tensor | None = None,
    lora_scale: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """What a model does between hidden state and logits; with a gate [K, n] on its blocks, from a
    head whose rows are multiplied by the factors of their groups [rows]."""
    if gate is not None:
        factors = gate.repeat_interleave(weight.shape[1] // gate.shape[1], 1)[groups]
        weight = weight if lora_A is None else weight + lora_scale * (lora_B @ lora_A)
        weight, lora_A = (weight * factors).to(weight.dtype), None
    logits = F.linear(hidden, weight, bias)
    if lora_A is not None and lora_B is not None:
        logits = logits + lora_scale * (hidden @ lora_A.T @ lora_B.T)
    logits = logits * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return logits[..., :vocab_size]


def dual_space(
    student_logits: Tensor,
    projected_logits: Tensor,
    student_labels: Tensor,
    teacher_logits: Tensor,
    s2t_logits: Tensor,
    *,
    name: str,
    temperature: float,
    mask_wrong: bool,
    projector_labels: Tensor | None = None,
    student_space_mask: Tensor | None = None,
    teacher_space_mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """Sums of the four terms from full logits; differentiable."""
    if projector_labels is None:
        projector_labels = student_labels

    def softmax(x: Tensor) -> Tensor:
        return (x / temperature).softmax(-1)

    per_token = divergence(name, softmax(projected_logits.detach()), softmax(student_logits))
    if mask_wrong:
        per_token = per_token * (projected_logits.argmax(-1) == projector_labels)
    projector_ce = F.cross_entropy(projected_logits, projector_labels, reduction="none")
    teacher_space = divergence("forward_kl", softmax(teacher_logits), softmax(s2t_logits))
    if student_space_mask is not None:
        per_token, projector_ce = per_token[student_space_mask], projector_ce[student_space_mask]
    if teacher_space_mask is not None:
        teacher_space = teacher_space[teacher_space_mask]
    return {
        "ce": F.cross_entropy(student_logits, student_labels, reduction="sum"),
        "projector_ce": projector_ce.sum(),
        "student_space": per_token.sum(),
        "teacher_space": teacher_space.sum(),
    }


def exact_token_alignment(
    student_hidden: Tensor,
    student_labels: list[int],
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_labels: list[int],
    teacher_head: Tensor,
    t2s: torch.nn.Linear,
    s2t: torch.nn.Linear,
    pairs: list[tuple[int, int]],
    translation: dict[int, int],
    *,
    name: str,
    temperature: float,
    mask_wrong: bool,
) -> dict[str, Tensor]:
    """Sums of the terms of exact token alignment, pair by pair; differentiable."""
    zero = student_hidden.sum() * 0
    terms = dict.fromkeys(("projector_ce", "student_space", "teacher_space"), zero)
    terms["ce"] = F.cross_entropy(
        student_hidden @ student_head.T, torch.tensor(student_labels), reduction="sum"
    )
    frozen = student_head.detach()
    for i, j in pairs:
        teacher = teacher_head @ teacher_hidden[j]
        projected_student = teacher_head @ s2t(student_hidden[i])
        p, q = ((x / temperature).softmax(-1) for x in (teacher, projected_student))
        terms["teacher_space"] = terms["teacher_space"] + divergence("forward_kl", p, q)
        said = int(teacher.argmax())
        target = student_labels[i] if said == teacher_labels[j] else translation.get(said)
        if target is None:
            continue
        projected_teacher = frozen @ t2s(teacher_hidden[j])
        ce = F.cross_entropy(projected_teacher[None], torch.tensor([target]), reduction="sum")
        terms["projector_ce"] = terms["projector_ce"] + ce
        if mask_wrong and int(projected_teacher.argmax()) != target:
            continue
        p = (projected_teacher.detach() / temperature).softmax(-1)
        q = (student_head @ student_hidden[i] / temperature).softmax(-1)
        terms["student_space"] = terms["student_space"] + divergence(name, p, q)
    return terms


def cross_model_attention(
    student_hidden: Tensor,
    student_embedded: tuple[Tensor, Tensor],
    teacher_hidden: Tensor,
    teacher_embedded: tuple[Tensor, Tensor],
    t2s: torch.nn.Module,
    s2t: torch.nn.Module,
    query: torch.nn.Module,
    *,
    spans: list[tuple[int, int]] | None = None,
    teacher_spans: list[tuple[int, int]] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One sample: projected states [n, d] and [m, D], and which tokens see anything, [n] and [m].

    With spans a student token sees teacher tokens that end by its end, a teacher token student
    tokens that begin by its begin.
    """
    (x, y), (n, m) = teacher_embedded, (len(student_hidden), len(teacher_hidden))
    key = torch.cat([x, y], -1)
    scores = query(torch.cat(student_embedded, -1)) @ (key / key.std()).T / key.shape[1] ** 0.5
    value_t = t2s(teacher_hidden / teacher_hidden.std() + y / y.std())
    readable, read = torch.ones(n, m, dtype=torch.bool), torch.ones(n, m, dtype=torch.bool)
    if spans is not None and teacher_spans is not None:
        for i in range(n):
            for j in range(m):
                readable[i, j] = teacher_spans[j][1] <= spans[i][1]
                read[i, j] = spans[i][0] <= teacher_spans[j][0]
    seeing, seen = readable.any(1), read.any(0)
    # Rows that see nothing are left to see everything, and are not counted by the caller.
    to_teacher = scores.masked_fill(~(readable | ~seeing[:, None]), -torch.inf)
    to_student = scores.masked_fill(~(read | ~seen), -torch.inf)
    return (
        to_teacher.softmax(1) @ value_t,
        to_student.softmax(0).T @ s2t(student_hidden),
        seeing,
        seen,
    )


def token_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_labels: Tensor,
    teacher_labels: Tensor,
    pairs: Tensor,
    *,
    name: str,
    temperature: float,
) -> dict[str, Tensor]:
    """Sums of both terms: a divergence in every pair [P, 2] whose labels are one id."""
    i, j = pairs[student_labels[pairs[:, 0]] == teacher_labels[pairs[:, 1]]].unbind(1)
    p, q = ((x / temperature).softmax(-1) for x in (teacher_logits[j], student_logits[i]))
    return {
        "ce": F.cross_entropy(student_logits, student_labels, reduction="sum"),
        "kd": divergence(name, p, q).sum(),
    }


def uld(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_labels: Tensor,
    pairs: Tensor,
    *,
    temperature: float,
    top_k: int | None,
) -> dict[str, Tensor]:
    """Sums of both terms: what sorted probabilities differ by, the smaller vocabulary padded."""
    wide = max(student_logits.shape[1], teacher_logits.shape[1])
    ranked = []
    for logits, rows in zip((student_logits, teacher_logits), pairs.T, strict=True):
        probs = (logits[rows] / temperature).softmax(-1).sort(-1, descending=True).values
        ranked.append(F.pad(probs, (0, wide - probs.shape[1]))[:, :top_k])
    return {
        "ce": F.cross_entropy(student_logits, student_labels, reduction="sum"),
        "uld": (ranked[0] - ranked[1]).abs().sum(),
    }
