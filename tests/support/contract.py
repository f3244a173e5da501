"""The cases that `tests/objectives/test_contract.py` holds every objective to.

A new objective brings one plain form (a function of this module from inputs to sums of terms,
which calls `naive`) and a line for each of its cases in `CASES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from axolotl_dskd.config import DSKDConfig
from axolotl_dskd.data.byte_spans import Spans, give_textless_tokens_room, tile
from axolotl_dskd.data.token_bytes import token_bytes, translation
from axolotl_dskd.objectives import Facts, Objective, Pair, build_objective
from axolotl_dskd.output_head import OutputHead
from axolotl_dskd.types import IGNORE_INDEX, Matches, Side, View
from tests.support import naive, tiny

#: Hidden sizes, student's first.
SIZES = 12, 20

#: The student's head: its parts, which of them train, and what it does to its logits.
HEADS: dict[str, dict[str, Any]] = {
    "trained": {"trains": ("weight",)},
    "frozen": {},
    "softcap and bias": {"bias": True, "softcap": 5.0, "trains": ("weight", "bias")},
    "lora": {"lora": True, "lora_scale": 0.5, "trains": ("lora_A", "lora_B")},
    "all": {
        "bias": True,
        "lora": True,
        "softcap": 6.0,
        "scale": 1.5,
        "lora_scale": 0.5,
        "padding": 3,
        "trains": ("weight", "bias", "lora_A", "lora_B"),
    },
}


# ---- texts ---------------------------------------------------------------------------------

#: Each sample's answers, several turns in some of them.
SAMPLES: list[list[str]] = [
    [tiny.QUESTIONS[i][1], *([tiny.CORPUS[i]] if i % 4 == 1 else []), *(["Ok."] if i % 2 else [])]
    for i in range(len(tiny.QUESTIONS))
]


@dataclass(frozen=True)
class Text:
    """One side of a sample: its supervised tokens and the bytes that they stand for."""

    input_ids: list[int]
    labels: list[int]
    spans: Spans

    def pieces(self) -> list[tuple[int, int]]:
        """Begin and end of each token."""
        return list(zip(self.spans.starts.tolist(), self.spans.ends.tolist(), strict=True))


@lru_cache
def texts(one_vocabulary: bool) -> tuple[Any, Any, list[tuple[Text, Text]]]:
    """Both tokenizers, and the two sides of every sample."""
    student = tiny.byte_level_tokenizer()
    teacher = student if one_vocabulary else tiny.sentencepiece_tokenizer()
    tables = token_bytes(student), token_bytes(teacher)
    pairs = []
    for number, answers in enumerate(SAMPLES):
        # Templates may end a turn by different tokens of one vocabulary.
        other = student.convert_tokens_to_ids("<|system|>")
        their_end = other if one_vocabulary and number == 1 else teacher.eos_token_id
        sides = [
            _read(answers, tokenizer, table, end)
            for tokenizer, table, end in zip(
                (student, teacher), tables, (student.eos_token_id, their_end), strict=True
            )
        ]
        textless = [
            torch.tensor([not table[i] for i in side.labels]).numpy()
            for side, table in zip(sides, tables, strict=True)
        ]
        spans = give_textless_tokens_room(sides[0].spans, textless[0], sides[1].spans, textless[1])
        ours, theirs = (
            Text(side.input_ids, side.labels, s) for side, s in zip(sides, spans, strict=True)
        )
        pairs.append((ours, theirs))
    return student, teacher, pairs


def _read(answers: list[str], tokenizer: Any, table: list[bytes], end: int) -> Text:
    """Answers as one model reads them, each with its end token."""
    prompt = tokenizer("assistant:", add_special_tokens=False)["input_ids"][-1]
    input_ids, labels, lengths = [], [], []
    for answer in answers:
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        counts = [len(table[i]) for i in ids]
        spelled = b"".join(table[i] for i in ids)
        if spelled == b" " + answer.encode():  # sentencepiece's own space
            counts[0] -= 1
        else:
            assert spelled == answer.encode(), answer
        input_ids += [prompt, *ids]
        labels += [*ids, end]
        lengths += [*counts, 0]
    return Text(input_ids, labels, tile(lengths))


def matches_of(pairs: Sequence[tuple[Text, Text]]) -> Matches:
    """By looking at every two tokens of each sample."""
    exact, starts, spans, groups = [], [], ([], []), ([], [])
    for sides in pairs:
        ours, theirs = (side.pieces() for side in sides)
        for i, (start, end) in enumerate(ours, len(spans[0])):
            for j, (their_start, their_end) in enumerate(theirs, len(spans[1])):
                if start == their_start and start < end and their_start < their_end:
                    starts.append((i, j))
                    if end == their_end:
                        exact.append((i, j))
        tokens = [*ours, *theirs]
        edges = {edge for token in tokens for edge in token}
        cuts = sorted(e for e in edges if not any(start < e < end for start, end in tokens))
        before = 1 + max(max(numbers, default=-1) for numbers in groups)
        used = sorted({max(c for c in cuts if c <= start) for start, _ in tokens})
        for side, pieces, numbers in zip(spans, (ours, theirs), groups, strict=True):
            side += pieces
            numbers += [before + max(k for k, c in enumerate(used) if c <= s) for s, _ in pieces]

    def index(rows: list[Any], *shape: int) -> Tensor:
        return torch.tensor(rows, dtype=torch.long).reshape(-1, *shape)

    return Matches(*(index(s, 2) for s in (*spans, exact, starts)), *(index(g) for g in groups))


# ---- numbers -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """What an objective is called with, and the samples that it is made of."""

    student: View
    teacher: View
    matches: Matches
    pairs: list[tuple[Text, Text]]

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter((self.student, self.teacher, self.matches))


class Inputs:
    """Random states of every sample and heads of both models over real texts.

    Args:
        one_vocabulary: of both tokenizers.
        head: of `HEADS`.
        dtype: of all numbers.
        rounded: a dtype whose numbers they shall be.
        copies: how often the samples are there.
        seed: of the numbers.
    """

    def __init__(
        self,
        one_vocabulary: bool,
        head: str = "all",
        dtype: torch.dtype = torch.float64,
        rounded: torch.dtype | None = None,
        copies: int = 1,
        seed: int = 17,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int, scale: float = 1.0) -> Tensor:
            x = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
            return x.to(rounded or dtype).to(dtype)

        student, teacher, pairs = texts(one_vocabulary)
        self.pairs = pairs * copies
        self.facts = Facts(student, teacher, (len(student), len(teacher)), 0.7)
        self.states = [
            tuple(randn(len(side.labels), k) for side, k in zip(pair, SIZES, strict=True))
            for pair in self.pairs
        ]
        for ours, _ in self.states:
            ours.requires_grad_()
        (d, D), (V, U) = SIZES, self.facts.vocab_sizes
        options = dict(HEADS[head])
        rows = V + options.pop("padding", 0)
        parts = {"weight": randn(rows, d, scale=2 * d**-0.5)}
        if options.pop("bias", False):
            parts["bias"] = randn(rows)
        if options.pop("lora", False):
            parts |= {"lora_A": randn(3, d, scale=0.3), "lora_B": randn(rows, 3, scale=0.3)}
        self.trained = {name: parts[name].requires_grad_() for name in options.pop("trains", ())}
        self.parts, self.options = parts, options | {"vocab_size": V}
        self.heads = (
            OutputHead(**parts, **self.options),
            OutputHead(randn(U, D, scale=2 * D**-0.5), bias=randn(U), softcap=8.0),
        )
        self.embeddings = randn(V, d), randn(U, D)

    def batch(self, samples: Sequence[int] | None = None) -> Batch:
        """The samples of these numbers in this order; all of them by default."""
        order = range(len(self.pairs)) if samples is None else samples
        pairs = [self.pairs[i] for i in order]
        views = []
        for which in (0, 1):
            sides = [pair[which] for pair in pairs]
            ids = [torch.full((len(s.labels),), k) for k, s in enumerate(sides)]
            nothing = torch.zeros(0, dtype=torch.long)
            tokens = Side(
                torch.tensor([i for s in sides for i in s.input_ids], dtype=torch.long),
                torch.tensor([i for s in sides for i in s.labels], dtype=torch.long),
                torch.cat([nothing, *ids]),
            )
            table = self.embeddings[which]
            empty = table.new_zeros(0, SIZES[which]).requires_grad_(which == 0)
            hidden = torch.cat([self.states[i][which] for i in order]) if pairs else empty
            embedded = table[tokens.input_ids], table[tokens.labels]
            views.append(View(tokens, self.heads[which], hidden, embedded))
        return Batch(views[0], views[1], matches_of(pairs), pairs)

    def logits(self, hidden: Tensor, side: int, frozen: bool = False) -> Tensor:
        """What the plain form of a head gives; `frozen`: no gradient goes to the head."""
        if side == 0:
            parts = {n: t.detach() if frozen else t for n, t in self.parts.items()}
            return naive.head_logits(hidden, **parts, **self.options)
        head = self.heads[1]
        return naive.head_logits(hidden, head.weight, head.bias, softcap=head.softcap)


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
    """

    name: str
    config: dict[str, Any]
    plain: PlainForm
    one_vocabulary: bool = False
    weights: dict[str, float] = field(default_factory=dict)
    jumps: bool = False

    def objective(
        self, inputs: Inputs, kd_ratio: float = 0.4, chunk_tokens: int = 16
    ) -> Objective[Any]:
        """As a run builds it, begun with the heads of the inputs."""
        block = {"teacher": {"base_model": "x"}, "objective": self.config}
        config = DSKDConfig.model_validate(
            {**block, "kd_ratio": kd_ratio, "chunk_tokens": chunk_tokens}
        )
        objective = build_objective(config, inputs.facts, memory=1 << 34, seed=5)
        objective.begin(Pair(inputs.heads, inputs.embeddings, torch.device("cpu")))
        if objective.module is not None and inputs.heads[0].weight.dtype == torch.float64:
            objective.module.double()
        return objective

    def weighted(self, sums: dict[str, Any], kd_ratio: float) -> Any:
        """The loss, from the sums of its terms."""
        kd = sum(self.weights.get(n, 1.0) * x for n, x in sums.items() if n != "ce")
        return (1 - kd_ratio) * sums["ce"] + kd_ratio * kd


def dual_space(name: str, one_vocabulary: bool = False, **keys: Any) -> Case:
    config = {"name": "dual_space", **keys}
    eta = keys.get("alignment") == "eta"
    return Case(f"dual_space {name}", config, plain_dual_space, one_vocabulary, jumps=eta)


def token_kd(divergence: str) -> Case:
    config = {"name": "token_kd", "divergence": divergence, "temperature": 1.5}
    return Case(f"token_kd {divergence}", config, plain_token_kd, one_vocabulary=True)


def uld(name: str, **keys: Any) -> Case:
    return Case(f"uld {name}", {"name": "uld", **keys}, plain_uld, jumps=True)


TOY = "tests.support.toy_objective"

CASES = [
    dual_space("positions", one_vocabulary=True, alignment="positions"),
    dual_space("eta", alignment="eta", divergence="reverse_kl"),
    dual_space("eta masked", alignment="eta", agreement_mask=True),
    dual_space("cma", alignment="cma"),
    dual_space("cma causal", alignment="cma", causal=True, agreement_mask=False),
    *(token_kd(name) for name in ("forward_kl", "reverse_kl", "js_divergence", "tvd")),
    *(token_kd(name) for name in ("skewed_forward_kl", "skewed_reverse_kl", "adaptive_kl")),
    uld("starts", top_k=100),
    uld("ordinal", pairs="ordinal", top_k=50, temperature=2.0),
    uld("all", top_k="all"),
    uld("one token", top_k=1),
    Case("toy", {"name": TOY, "weight": 0.5}, plain_toy, weights={"distance": 0.5}),
]
