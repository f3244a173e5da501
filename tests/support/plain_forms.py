"""Objectives across tokenizers and in samples, written the plain way: group by group, sample by
sample, from full logits, with gradients by autograd.

Each takes both sides' logits, [N, V] and [M, U], and gives the sums of the terms of the loss. What
is token by token is in `naive`. Knows no heads, no chunks and no weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from axolotl_dskd.config import ChunkLikelihoodConfig, GOLDConfig
from axolotl_dskd.data.token_bytes import shared_tokens
from axolotl_dskd.types import Matches, Side
from tests.support.groups import Problem, row_groups

Logits = tuple[Tensor, Tensor]
UNKNOWN = torch.tensor(torch.nan, dtype=torch.float64)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over tokens."""
    return F.cross_entropy(logits, labels, reduction="sum")


# ---- min_edit ------------------------------------------------------------------------------


def min_edit_pairs(matches: Matches, teacher_labels: Tensor, targets: list[int]) -> Tensor:
    """[P, 2] pairs that begin alike, whose student label is no longer, whose teacher label goes
    somewhere."""
    kept = []
    for i, j in matches.starts.tolist():
        (start, end), (their_start, their_end) = matches.spans[i], matches.teacher_spans[j]
        if end - start <= their_end - their_start and targets[int(teacher_labels[j])] >= 0:
            kept.append((i, j))
    return torch.tensor(kept)


def min_edit(
    logits: Logits,
    labels: Tensor,
    pairs: Tensor,
    targets: list[int],
    *,
    temperature: float,
    one_hot: bool = False,
) -> dict[str, Tensor]:
    """The map as a matrix, KL from its definition."""
    z, t = logits
    carry = z.new_zeros(t.shape[1], z.shape[1])
    for u, target in enumerate(targets):
        if target >= 0:
            carry[u, target] = 1.0
    i, j = pairs.unbind(1)
    p = ((t / temperature).softmax(-1) @ carry)[j]
    mass = p.sum(-1, keepdim=True)
    share = p / mass
    kl = (torch.xlogy(share, share) - share * (z[i] / temperature).log_softmax(-1)).sum(-1)
    kd = (mass.squeeze(1) * kl).sum()
    if one_hot:
        alone = torch.ones(len(labels), dtype=torch.bool)
        alone[i] = False
        kd = kd + cross_entropy(z[alone] / temperature, labels[alone])
    return {"ce": cross_entropy(z, labels), "min_edit": kd}


# ---- sinkhorn ------------------------------------------------------------------------------


def sinkhorn_distances(
    q: Tensor, p: Tensor, samples: Tensor, epsilon: float = 0.1, iterations: int = 20
) -> Tensor:
    """Sum over samples, each as its definition says; [n, V] probabilities that meet row by row."""
    total = q.sum() * 0
    for sample in samples.unique():
        ours, theirs = q[samples == sample], p[samples == sample]
        cost = (ours[:, None] - theirs[None]).abs().sum(-1)
        plan = (-cost / epsilon).exp()
        for _ in range(iterations):
            plan = plan / plan.sum(1, keepdim=True)
            plan = plan / plan.sum(0, keepdim=True)
        total = total + (plan * cost).sum()
    return total


# ---- chunk_likelihood ----------------------------------------------------------------------


def boundaries(tokenizer: Any) -> tuple[Tensor, set[int]]:
    """Ids that begin with a space or newline or are special, and the special ones, by decoding."""
    special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    strings = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    first = ("Ġ", "▁", "Ċ", "\n", "<0x0A>", "<0x20>")
    begins = [s.startswith(first) or i in special for i, s in enumerate(strings)]
    return torch.tensor(begins), special


def boundary_behind(tokens: Side, within: Tensor, special: set[int]) -> list[Tensor]:
    """[n] log-probability of a boundary behind each token, NaN where no row has read it."""
    read = []
    for i in range(len(tokens)):
        label = int(tokens.labels[i])
        known = (
            i + 1 < len(tokens)
            and tokens.sample_ids[i + 1] == tokens.sample_ids[i]
            and tokens.input_ids[i + 1] == label
            and label not in special
        )
        read.append(within[i + 1] if known else UNKNOWN)
    return read


def likelihoods_of_chunks(
    made: Problem,
    logprobs: tuple[Tensor, Tensor],
    behind: tuple[list[Tensor], list[Tensor]],
    config: ChunkLikelihoodConfig,
) -> tuple[Tensor, Tensor]:
    """[C] log-likelihoods of chunks of both sides, one group after the other."""
    groups = row_groups(made.matches)
    chunks: list[list[Tensor]] = []
    total: list[Any] = [0.0, 0.0]
    for k, rows in enumerate(groups):
        total = [t + x[r].sum() for t, x, r in zip(total, logprobs, rows, strict=True)]
        s = [x[r[-1]] for x, r in zip(behind, rows, strict=True)]
        known = not any(bool(torch.isnan(x)) for x in s)
        following = groups[k + 1] if k + 1 < len(groups) else None
        apart = following is None or any(
            b[0] != a[-1] + 1 for a, b in zip(rows, following, strict=True)
        )
        other = apart or (
            following is not None
            and made.student.tokens.sample_ids[following[0][0]]
            != made.student.tokens.sample_ids[rows[0][0]]
        )
        ends = not known or bool(s[1].exp() > config.merge_threshold)
        if config.merge and not ends and not other:
            continue
        if config.debias and known:
            total = [t + x for t, x in zip(total, s, strict=True)]
        chunks.append(total)
        total = [0.0, 0.0]
    ours, theirs = (torch.stack(x) for x in zip(*chunks, strict=True))
    return ours, theirs


def chunk_divergence(ours: Tensor, theirs: Tensor, config: ChunkLikelihoodConfig) -> Tensor:
    """From probabilities; the factor τ included."""
    if config.divergence == "abs":
        return (theirs - ours).abs()
    T = config.temperature
    p, q = (torch.exp(x / T - 1e-6) for x in (theirs, ours))
    match config.divergence:
        case "binary_ce":
            value = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        case "reverse_binary_kl":
            value = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
        case "abs_exp":
            value = (p - q).abs()
        case _:
            r = config.renyi_order
            value = (p**r * q ** (1 - r) + (1 - p) ** r * (1 - q) ** (1 - r)).log() / (r - 1)
    return T * value


def chunk_likelihood(
    made: Problem, logits: Logits, config: ChunkLikelihoodConfig
) -> dict[str, Tensor]:
    """Divergences of chunks."""
    logprobs, read = [], []
    views = (made.student, made.teacher)
    for view, tokenizer, z in zip(views, made.tokenizers, logits, strict=True):
        log_q = z.log_softmax(-1)
        logprobs.append(log_q.gather(-1, view.tokens.labels[:, None])[:, 0])
        begins, special = boundaries(tokenizer)
        read.append(boundary_behind(view.tokens, log_q[:, begins].logsumexp(-1), special))
    both, behind = (logprobs[0], logprobs[1]), (read[0], read[1])
    ours, theirs = likelihoods_of_chunks(made, both, behind, config)
    return {"ce": -logprobs[0].sum(), "chunk": chunk_divergence(ours, theirs, config).sum()}


# ---- gold ----------------------------------------------------------------------------------


def merged(logits: Tensor, labels: Tensor, rows: list[int]) -> Tensor:
    """[V] what a group's last token could be, times what its other tokens were."""
    q = logits.softmax(-1)
    before = [q[row, labels[row]] for row in rows[:-1]]
    return q[rows[-1]] * torch.stack([q.new_ones(()), *before]).prod()


def shared_and_others(made: Problem, sizes: tuple[int, int]) -> tuple[list[Any], list[Any]]:
    """Ids of both sides that are equal, and the rest of each side."""
    shared = shared_tokens(*made.tokenizers)
    others = [sorted(set(range(n)) - set(ids)) for n, ids in zip(sizes, shared, strict=True)]
    return list(shared), others


def sorted_distance(q: Tensor, p: Tensor) -> Tensor:
    """Σ_r |q_(r) − p_(r)|."""
    if not len(q) or not len(p):
        return q.sum() * 0
    wide = max(len(q), len(p))
    q, p = (torch.cat([x, x.new_zeros(wide - len(x))]).sort().values for x in (q, p))
    return (q - p).abs().sum()


def by_name(q: Tensor, p: Tensor, beta: float, *, published: bool = False) -> Tensor:
    """D_β from probabilities, as published raised to at least 1e-8."""
    if published:
        q, p = q.clamp_min(1e-8), p.clamp_min(1e-8)
    if beta in (0.0, 1.0):
        a, b = (p, q) if beta == 0.0 else (q, p)
        value = (a * (a / b).log()).sum()
        return value if published else value + (b - a).sum()
    m = beta * p + (1 - beta) * q
    return beta * (p * (p / m).log()).sum() + (1 - beta) * (q * (q / m).log()).sum()


def gold_groups(
    made: Problem, logits: Logits, config: GOLDConfig, *, published: bool = False
) -> tuple[Tensor, Tensor]:
    """[G] of shared tokens and [G] of others, one group after the other."""
    shared, others = shared_and_others(made, (logits[0].shape[1], logits[1].shape[1]))
    near, far = [], []
    for rows in row_groups(made.matches):
        q, p = (
            merged(x / config.temperature, view.tokens.labels, r)
            for x, view, r in zip(logits, (made.student, made.teacher), rows, strict=True)
        )
        if not config.hybrid:
            near.append(q.sum() * 0)
            far.append(sorted_distance(q, p))
            continue
        near.append(by_name(q[shared[0]], p[shared[1]], config.beta, published=published))
        far.append(sorted_distance(q[others[0]], p[others[1]]))
    return torch.stack(near), torch.stack(far)


def gold(made: Problem, logits: Logits, config: GOLDConfig) -> dict[str, Tensor]:
    """Both distances of groups, without their weights."""
    near, far = gold_groups(made, logits, config)
    ce = cross_entropy(logits[0], made.student.tokens.labels)
    return {"ce": ce, "shared": near.sum(), "by_rank": far.sum()}


# ---- span_support --------------------------------------------------------------------------


def law(
    q: Tensor, labels: Tensor, rows: list[int], ids: list[int], whole: set[int], start: set[int]
) -> Tensor:
    """[K + 2] probabilities of one side's classes: shared tokens by number, span, rest.

    Args:
        q: [n, V] probabilities.
        ids: [K] of this side, by the shared token's number.
        whole, start: numbers of shared tokens that are the span, or begin a longer path.
    """
    span, rest = len(ids), len(ids) + 1
    classes = torch.full((q.shape[1],), rest)
    for k, token in enumerate(ids):
        classes[token] = span if k in whole else rest if k in start else k
    total = q.new_zeros(len(ids) + 2).index_add(0, classes, q[rows[0]])
    first = int(classes[labels[rows[0]]])
    if first != span:  # going on as the path is another outcome than the first token's others
        assert first == rest
        path = torch.stack([q[row, labels[row]] for row in rows]).prod()
        total = total.index_add(0, torch.tensor([span, rest]), torch.stack([path, -path]))
    return total


def laws(made: Problem, logits: Logits) -> list[tuple[Tensor, Tensor]]:
    """Both sides' laws of each group, without classes that neither side can be in."""
    probabilities = [x.softmax(-1) for x in logits]
    ids = shared_tokens(*made.tokenizers)
    numbers = [{i: k for k, i in enumerate(side)} for side in ids]
    views, pairs = (made.student, made.teacher), []
    for rows in row_groups(made.matches):
        whole, start = set(), set()
        for view, own, number in zip(views, rows, numbers, strict=True):
            k = number.get(int(view.tokens.labels[own[0]]))
            if k is not None:
                (whole if len(own) == 1 else start).add(k)
        q, p = (
            law(x, view.tokens.labels, own, side, whole, start - whole)
            for x, view, own, side in zip(probabilities, views, rows, ids, strict=True)
        )
        there = torch.ones(len(q), dtype=torch.bool)
        there[list(whole | start)] = False
        assert bool((q[~there] == 0).all() and (p[~there] == 0).all())
        pairs.append((q[there], p[there]))
    return pairs


def span_support(made: Problem, logits: Logits, _: object = None) -> dict[str, Tensor]:
    """Reverse KL, class by class."""
    total = logits[0].sum() * 0
    for q, p in laws(made, logits):
        raised = torch.zeros_like(q)
        raised[-1] = 1e-6
        q, p = q + raised, p + raised
        total = total + (q * (q / p).log()).sum()
    return {"ce": cross_entropy(logits[0], made.student.tokens.labels), "support": total}
