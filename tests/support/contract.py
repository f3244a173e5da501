"""The cases that `tests/objectives/test_contract.py` holds every objective to.

A new objective brings one plain form (a function of this module from inputs to sums of terms,
which calls `naive` or `plain_forms`) and a line for each of its cases in `CASES`. The inputs are in
`inputs`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from axolotl_dskd.config import DSKDConfig
from axolotl_dskd.data.token_bytes import translation
from axolotl_dskd.losses import Budget
from axolotl_dskd.objectives import Objective, Pair, Setting
from axolotl_dskd.objectives.build import objective_class
from axolotl_dskd.objectives.vocabulary_map import vocabulary_map
from axolotl_dskd.types import IGNORE_INDEX
from tests.support import naive, plain_forms, policy_forms
from tests.support.groups import Problem
from tests.support.inputs import PAIRS, Batch, Inputs
from tests.support.pretend import CPU, moved

# ---- plain forms ---------------------------------------------------------------------------

#: From the objective, the inputs and a batch of them to the sums of the terms of the loss.
PlainForm = Callable[[Objective[Any], Inputs, Batch], dict[str, Tensor]]


def both_logits(inputs: Inputs, batch: Batch) -> tuple[Tensor, Tensor]:
    """[N, V] and [M, U]."""
    student, teacher, _ = batch
    return inputs.logits(student.hidden, 0), inputs.logits(teacher.hidden, 1)


def plain_token_kd(objective: Objective[Any], inputs: Inputs, batch: Batch) -> dict[str, Tensor]:
    student, teacher, matches = batch
    return naive.token_kd(
        *both_logits(inputs, batch),
        student.tokens.labels,
        teacher.tokens.labels,
        matches.exact,
        name=objective.config.divergence,
        temperature=objective.config.temperature,
    )


def plain_token_kd_top(
    objective: Objective[Any], inputs: Inputs, batch: Batch
) -> dict[str, Tensor]:
    """Over the teacher's likeliest tokens and all others as one."""
    (student, teacher, matches), (z, t) = batch, both_logits(inputs, batch)
    labels = student.tokens.labels, teacher.tokens.labels
    value = z.sum() * 0
    for i, j in matches.exact.tolist():
        if labels[0][i] == labels[1][j]:
            p, q = t[j].softmax(-1), z[i].softmax(-1)
            ids = p.topk(inputs.top).indices
            p, q = (torch.cat([x[ids], 1 - x[ids].sum(-1, keepdim=True)]) for x in (p, q))
            value = value + naive.divergence(objective.config.divergence, p, q)
    ce = torch.nn.functional.cross_entropy(z, labels[0], reduction="sum")
    return {"ce": ce, "kd": value}


def plain_uld(objective: Objective[Any], inputs: Inputs, batch: Batch) -> dict[str, Tensor]:
    config, pairs = objective.config, batch.matches.starts
    if config.pairs == "ordinal":
        places, n, m = [], 0, 0
        for ours, theirs in batch.pairs:
            shorter = min(len(ours.labels), len(theirs.labels))
            places += [(n + k, m + k) for k in range(shorter)]
            n, m = n + len(ours.labels), m + len(theirs.labels)
        pairs = torch.tensor(places)
    return naive.uld(
        *both_logits(inputs, batch),
        batch.student.tokens.labels,
        pairs,
        temperature=config.temperature,
        top_k=None if config.top_k == "all" else config.top_k,
    )


def plain_toy(objective: Objective[Any], inputs: Inputs, batch: Batch) -> dict[str, Tensor]:
    said = [
        torch.nn.functional.cross_entropy(logits, view.tokens.labels, reduction="none")
        for logits, view in zip(both_logits(inputs, batch), tuple(batch)[:2], strict=True)
    ]
    i, j = batch.matches.exact.unbind(1)
    return {"ce": said[0].sum(), "distance": (said[0][i] - said[1][j]).square().sum()}


def plain_dual_space(objective: Objective[Any], inputs: Inputs, batch: Batch) -> dict[str, Tensor]:
    student, teacher, _ = batch
    exchange = _attended if objective.alignment == "cma" else _paired
    t2s, seeing, s2t, seen = exchange(objective, batch)
    targets = student.tokens.labels
    if objective.alignment == "eta":
        targets = _teachers_choice(inputs, batch)
        seeing = seeing & (targets != IGNORE_INDEX)
    return naive.dual_space(
        inputs.logits(student.hidden, 0),
        inputs.logits(t2s, 0, frozen=True),
        student.tokens.labels,
        inputs.logits(teacher.hidden, 1),
        inputs.logits(s2t, 1),
        name=objective.config.divergence,
        temperature=objective.config.temperature,
        mask_wrong=objective.weights.mask_wrong,
        projector_labels=targets,
        student_space_mask=seeing,
        teacher_space_mask=seen,
    )


def plain_min_edit(objective: Objective[Any], inputs: Inputs, batch: Batch) -> dict[str, Tensor]:
    config, (student, teacher, matches) = objective.config, batch
    targets = vocabulary_map(inputs.facts.student, inputs.facts.teacher, config.map).targets
    return plain_forms.min_edit(
        both_logits(inputs, batch),
        student.tokens.labels,
        plain_forms.min_edit_pairs(matches, teacher.tokens.labels, targets),
        targets,
        temperature=config.temperature,
        one_hot=config.one_hot,
    )


def data_tokens(batch: Batch) -> Tensor:
    """[N] bool: tokens of rows that were not written during training."""
    return batch.student.references != IGNORE_INDEX


def plain_policy(objective: Any, inputs: Inputs, batch: Batch) -> dict[str, Tensor]:
    z, t = (x.double() for x in both_logits(inputs, batch))
    config, moments = objective.config, objective.module.sums.tolist()
    mean = moments[1] / moments[0]
    deviation = (moments[2] / moments[0] - mean**2) ** 0.5
    return policy_forms.policy(
        batch, (z, t), config, single_step=objective.single_step, whiten=(mean, deviation)
    )


def plain_preference(objective: Any, inputs: Inputs, batch: Batch) -> dict[str, Tensor]:
    logits = tuple(x.double() for x in both_logits(inputs, batch))
    return policy_forms.preference(batch, logits, objective.config)


def plain_sinkhorn(objective: Any, inputs: Inputs, batch: Batch) -> dict[str, Tensor]:
    """Beside the distance: `token_kd` of one vocabulary, else `dual_space` of exact tokens."""
    (student, teacher, matches), T = batch, objective.config.temperature
    z, t = both_logits(inputs, batch)
    labels, pairs = student.tokens.labels, matches.exact
    if inputs.facts.one_vocabulary:
        others = teacher.tokens.labels
        terms = naive.token_kd(z, t, labels, others, pairs, name="forward_kl", temperature=T)
        terms["kl"] = terms.pop("kd")
        rows, theirs = pairs[labels[pairs[:, 0]] == others[pairs[:, 1]]].unbind(1)
        source = t[theirs]
    else:
        terms = plain_dual_space(objective._tokens, inputs, batch)
        terms["kl"] = terms.pop("student_space")
        del terms["teacher_space"]
        t2s, seeing, _, _ = _paired(objective._tokens, batch)
        seeing = seeing & (_teachers_choice(inputs, batch) != IGNORE_INDEX)
        rows = seeing.nonzero().flatten()
        source = inputs.logits(t2s[rows], 0)
    q, p = (z[rows] / T).softmax(-1), (source / T).softmax(-1).detach()
    samples = student.tokens.sample_ids[rows]
    return terms | {"sinkhorn": plain_forms.sinkhorn_distances(q, p, samples)}


def grouped(plain: Callable[..., dict[str, Tensor]]) -> PlainForm:
    """From a form of `plain_forms` over groups."""

    def form(objective: Objective[Any], inputs: Inputs, batch: Batch) -> dict[str, Tensor]:
        tokenizers = inputs.facts.student, inputs.facts.teacher
        made = Problem(tokenizers, batch.student, batch.teacher, batch.matches)
        # Products of probabilities vanish in less, and what they leave of 1; only logits may round.
        logits = tuple(x.double() for x in both_logits(inputs, batch))
        return plain(made, logits, objective.config)

    return form


def _paired(objective: Objective[Any], batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Projected states and which of them count, of both sides, from exact pairs."""
    student, teacher, matches = batch
    module, pairs = objective.module, matches.exact
    if objective.alignment == "positions":
        labels = student.tokens.labels[pairs[:, 0]], teacher.tokens.labels[pairs[:, 1]]
        pairs = pairs[labels[0] == labels[1]]
    i, j = pairs.unbind(1)
    t2s = torch.zeros_like(student.hidden).index_copy(0, i, module.t2s(teacher.hidden[j]))
    s2t = torch.zeros_like(teacher.hidden).index_copy(0, j, module.s2t(student.hidden[i]))
    counted = [
        torch.isin(torch.arange(len(view)), rows) for view, rows in ((student, i), (teacher, j))
    ]
    return t2s, counted[0], s2t, counted[1]


def _attended(objective: Objective[Any], batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same from attention, sample by sample."""
    views, rows = (batch.student, batch.teacher), []
    n = m = 0
    for ours, theirs in batch.pairs:
        counts = len(ours.labels), len(theirs.labels)
        places = slice(n, n + counts[0]), slice(m, m + counts[1])
        n, m = places[0].stop, places[1].stop
        numbers = []
        for view, at in zip(views, places, strict=True):
            numbers += [view.hidden[at], tuple(e[at] for e in view.embedded)]
        causal = objective.config.causal
        rows.append(
            naive.cross_model_attention(
                *numbers,
                objective.module.t2s,
                objective.module.s2t,
                objective.module.query,
                spans=ours.pieces() if causal else None,
                teacher_spans=theirs.pieces() if causal else None,
            )
        )
    t2s, s2t, seeing, seen = (torch.cat(column) for column in zip(*rows, strict=True))
    return t2s, seeing, s2t, seen


def _teachers_choice(inputs: Inputs, batch: Batch) -> Tensor:
    """[N] the teacher's own first choice in the student's words, pair by pair."""
    table = translation(inputs.facts.teacher, inputs.facts.student)
    targets = torch.full((len(batch.student),), IGNORE_INDEX)
    said = inputs.logits(batch.teacher.hidden, 1).argmax(-1).tolist()
    for i, j in batch.matches.exact.tolist():
        label, their_label = (int(v.tokens.labels[k]) for v, k in zip(batch, (i, j), strict=False))
        if said[j] == their_label:
            targets[i] = label
        elif table[their_label] in (label, IGNORE_INDEX):
            targets[i] = table[said[j]]
    return targets


# ---- cases ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """An objective with its keys.

    Attributes:
        name: of the case.
        config: the value of `dskd.objective`.
        plain: its plain form.
        one_vocabulary: whether it is tried on two equal tokenizers.
        weights: of a term within what is distilled, where it is not 1.
        jumps: it jumps where two numbers are equal (a sign, a first choice that becomes a target),
            so that in low precision chance decides.
        seeds: of the numbers that low precision is tried on; such that no threshold is so near to
            a number that rounding decides.
        absent: terms that the objective reports under other keys only.
        written: some answers of its batches were written during training.
        has_ce: [N] which tokens have cross-entropy; None: all.
        prepare: what else it is told before its first batch.
        top: the teacher gives no states, but its so many likeliest tokens.
    """

    name: str
    config: dict[str, Any]
    plain: PlainForm
    one_vocabulary: bool = False
    weights: dict[str, float] = field(default_factory=dict)
    jumps: bool = False
    seeds: tuple[int, ...] = (1, 2, 3)
    absent: frozenset[str] = frozenset()
    written: bool = False
    has_ce: Callable[[Batch], Tensor] | None = None
    prepare: Callable[[Objective[Any]], None] | None = None
    top: int | None = None

    def inputs(self, *args: Any, **keys: Any) -> Inputs:
        """Of its kind; takes what `Inputs` takes behind the tokenizers."""
        return Inputs(self.one_vocabulary, *args, **keys, written=self.written, top=self.top)

    def ce_labels(self, batch: Batch) -> Tensor:
        """[N] those that cross-entropy is taken of, -100 elsewhere."""
        labels = batch.student.tokens.labels
        return labels if self.has_ce is None else labels.where(self.has_ce(batch), IGNORE_INDEX)

    def together(self) -> list[list[int]]:
        """The samples, those in one list that have to be in one batch."""
        pairs = [list(pair) for pair in PAIRS] if self.written else []
        alone = [k for k in range(8) if all(k not in pair for pair in pairs)]
        return [*pairs, *([k] for k in alone)]

    def objective(
        self,
        inputs: Inputs,
        kd_ratio: float = 0.4,
        chunk_tokens: int = 16,
        device: torch.device = CPU,
    ) -> Objective[Any]:
        """As a run builds it, begun with the heads of the inputs."""
        block = {"teacher": {"base_model": "x"}, "objective": self.config, "samples": "student"}
        config = DSKDConfig.model_validate(block).objective
        gives = "states" if self.top is None else "logprobs"
        setting = Setting(kd_ratio, Budget(chunk_tokens), 5, self.written, gives)
        objective = objective_class(config)(config, inputs.facts, setting)
        objective.begin(Pair(*moved((inputs.heads, inputs.embeddings), device), device))
        if self.prepare is not None:
            self.prepare(objective)
        if objective.module is not None and inputs.heads[0].weight.dtype == torch.float64:
            objective.module.double()
        return objective

    def weighted(self, sums: dict[str, Any], kd_ratio: float) -> Any:
        """The loss, from the sums of its terms."""
        kd = sum(self.weights.get(n, 1.0) * x for n, x in sums.items() if n != "ce")
        return (1 - kd_ratio) * sums["ce"] + kd_ratio * kd


def written_case(
    name: str,
    config: dict[str, Any],
    plain: PlainForm,
    has_ce: Callable[[Batch], Tensor] = data_tokens,
    **keys: Any,
) -> Case:
    """Of an objective that learns from written answers."""
    return Case(name, config, plain, written=True, has_ce=has_ce, **keys)


def dual_space(name: str, one_vocabulary: bool = False, **keys: Any) -> Case:
    config = {"name": "dual_space", **keys}
    eta = keys.get("alignment") == "eta"
    return Case(f"dual_space {name}", config, plain_dual_space, one_vocabulary, jumps=eta)


def token_kd(divergence: str) -> Case:
    config = {"name": "token_kd", "divergence": divergence, "temperature": 1.5}
    absent = frozenset({"kept_mass"})
    return Case(
        f"token_kd {divergence}", config, plain_token_kd, one_vocabulary=True, absent=absent
    )


def token_kd_top(divergence: str) -> Case:
    config = {"name": "token_kd", "divergence": divergence, "temperature": 1.0}
    name = f"token_kd {divergence} of the likeliest"
    return Case(name, config, plain_token_kd_top, one_vocabulary=True, top=7)


def uld(name: str, **keys: Any) -> Case:
    return Case(f"uld {name}", {"name": "uld", **keys}, plain_uld, jumps=True)


def min_edit(kind: str) -> Case:
    return Case(f"min_edit {kind}", {"name": "min_edit", "map": kind}, plain_min_edit)


def sinkhorn(name: str, *absent: str, one_vocabulary: bool = False, **keys: Any) -> Case:
    return Case(
        f"sinkhorn {name}",
        {"name": "sinkhorn", "weight": 1.5, "kl_weight": 0.7, **keys},
        plain_sinkhorn,
        one_vocabulary,
        weights={"sinkhorn": 1.5, "kl": 0.7},
        jumps=True,
        absent=frozenset(absent),
    )


def chunk_likelihood(name: str, **keys: Any) -> Case:
    config, plain = {"name": "chunk_likelihood", **keys}, grouped(plain_forms.chunk_likelihood)
    return Case(f"chunk_likelihood {name}", config, plain, seeds=(1, 2, 4))


def gold(hybrid: bool) -> Case:
    config: dict[str, Any] = {"name": "gold", "hybrid": hybrid}
    weights = {"shared": 0.6, "by_rank": 0.4} if hybrid else {}
    if hybrid:
        config["weights"] = tuple(weights.values())
    name = "gold hybrid" if hybrid else "gold by rank"
    return Case(name, config, grouped(plain_forms.gold), weights=weights, jumps=True)


def policy(name: str, *absent: str, one_vocabulary: bool = False, **keys: Any) -> Case:
    def know_some_steps(objective: Any) -> None:
        objective.module.sums.copy_(torch.tensor([40.0, -60.0, 250.0]))

    return written_case(
        f"policy {name}",
        {"name": "policy", **keys},
        plain_policy,
        one_vocabulary=one_vocabulary,
        prepare=know_some_steps,
        absent=frozenset(absent),
        jumps=True,
    )


#: What only answers, and what only tokens of two choices are reported for.
OF_ANSWERS = ("margin_preferred", "margin_other", "won", "logprob_preferred", "logprob_other")


def preference(name: str, **keys: Any) -> Case:
    return written_case(
        f"preference {name}",
        {"name": "preference", **keys},
        plain_preference,
        absent=frozenset({"same_choice"}),
    )


def preference_by_token(name: str, **keys: Any) -> Case:
    return Case(
        f"preference by token {name}",
        {"name": "preference", "form": "token", **keys},
        plain_preference,
        one_vocabulary=True,
        jumps=True,
        absent=frozenset({*OF_ANSWERS, "left_out"}),
    )


TOY = "tests.support.toy_objective"

CASES = [
    dual_space("positions", one_vocabulary=True, alignment="positions"),
    dual_space("eta", alignment="eta", divergence="reverse_kl"),
    dual_space("eta masked", alignment="eta", agreement_mask=True),
    dual_space("cma", alignment="cma"),
    dual_space("cma causal", alignment="cma", causal=True, agreement_mask=False),
    *(token_kd(name) for name in ("forward_kl", "reverse_kl", "js_divergence", "tvd")),
    *(token_kd(name) for name in ("skewed_forward_kl", "skewed_reverse_kl", "adaptive_kl")),
    *(token_kd_top(name) for name in ("forward_kl", "reverse_kl", "skewed_forward_kl")),
    uld("starts", top_k=100),
    uld("ordinal", pairs="ordinal", top_k=50, temperature=2.0),
    uld("all", top_k="all"),
    uld("one token", top_k=1),
    min_edit("edit_distance"),
    min_edit("first_token"),
    sinkhorn(
        "one vocabulary",
        *("projector_ce", "projector_accuracy", "teacher_nll", "projected_nll"),
        one_vocabulary=True,
    ),
    sinkhorn("eta", "teacher_accuracy", alignment="eta"),
    chunk_likelihood("merged"),
    chunk_likelihood("single", merge=False),
    chunk_likelihood("without boundaries", merge=False, debias=False),
    gold(hybrid=True),
    gold(hybrid=False),
    Case("span_support", {"name": "span_support"}, grouped(plain_forms.span_support)),
    policy("one vocabulary", one_vocabulary=True),
    policy("one vocabulary, no single step", "single_step", one_vocabulary=True, single_step=False),
    policy("two tokenizers", "single_step", gamma=0.9, length_norm=False, reward_clip=2.0),
    preference("per token"),
    preference("sums", length_norm=False, label_smoothing=0.1),
    preference("ipo", loss="ipo"),
    preference("without reference", reference_free=True, margin=0.5),
    preference_by_token("sigmoid", beta=0.5),
    preference_by_token("ipo", loss="ipo", reference_free=True),
    Case("toy", {"name": TOY, "weight": 0.5}, plain_toy, weights={"distance": 0.5}),
]
