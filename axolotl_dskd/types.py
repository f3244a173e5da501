"""The nouns that pass between modules.

Dimension letters, used as suffixes everywhere:

    B  rows of a batch            L  tokens of a padded or packed row
    S  samples of a batch (a packed row holds several)
    N  supervised student tokens  M  supervised teacher tokens
    P  exactly aligned pairs       Q  pairs that begin at the same byte
    d  student hidden size        D  teacher hidden size
    V  student vocabulary         U  teacher vocabulary

A *supervised token* is a position whose successor in the same sample carries a label: the hidden
state at the position is what predicts that label.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from axolotl_dskd.output_head import OutputHead
from axolotl_dskd.supervision import IGNORE_INDEX as IGNORE_INDEX  # one of the nouns
from axolotl_dskd.supervision import Sizes, labels_ahead, places_of, supervised_mask

#: How the names of our tensors begin in a collated batch; then those of `Written`.
_OURS, _WRITTEN = "dskd_", "dskd_written_"

#: What every collator's batch holds, which `DualBatch` reads and leaves there.
_OF_THE_STUDENT = ("input_ids", "labels")


@dataclass(frozen=True)
class Side:
    """The supervised tokens of one model in a batch, compact: no padding, no prompts.

    Attributes:
        input_ids: [N] token at the position.
        labels: [N] the token it predicts.
        sample_ids: [N] ascending, which sample of the batch it belongs to.
        counts: of each sample of the batch, where the host knows it; see `of_each_sample`.
    """

    input_ids: Tensor
    labels: Tensor
    sample_ids: Tensor
    counts: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return self.labels.shape[0]

    def at(self, rows: Tensor) -> Side:
        """Some of the tokens."""
        return Side(self.input_ids[rows], self.labels[rows], self.sample_ids[rows])

    def of_each_sample(self) -> tuple[int, ...]:
        """How many tokens each sample has, up to the last that has one. Where the counts are not
        known, the host waits for the GPU."""
        if self.counts is not None:
            return self.counts
        return tuple(self.sample_ids.bincount().tolist())


@dataclass(frozen=True)
class Needs:
    """What an objective has to be given; what is not needed may be left out.

    Attributes:
        of_teacher: the least of what a teacher may give. states: its final hidden states and output
            head. top: log-probabilities of the likeliest tokens and of the labels. labels: those
            of the labels alone. Of the student it is always states and head.
        embeddings: input embeddings of both sides' tokens.
        one_vocabulary: the two tokenizers must have the same ids.
        written: answers that the student writes during training (`Written`).
        contrast: a preferred answer beside each of these, in the same batch (`Written.pairs`).
    """

    of_teacher: Literal["states", "top", "labels"] = "states"
    embeddings: bool = False
    one_vocabulary: bool = False
    written: bool = False
    contrast: bool = False


@dataclass(frozen=True)
class Written:
    """What is known of answers that a model wrote during training, beside their tokens.

    Attributes:
        samples: [S] bool, whose answer was written; the others are the data set's own rows.
        logprobs: [N] float32, log-probability at which the student wrote each of its supervised
            tokens, as it was then; 0 on the data set's rows.
        weights: [N] float32, student's probability over that of whoever drew the token, where
            the teacher took part in drawing; None: the student drew alone.
        pairs: [K, 2] samples with the same prompt, the answer to prefer first; None where none
            are made.
    """

    samples: Tensor
    logprobs: Tensor
    weights: Tensor | None = None
    pairs: Tensor | None = None


@dataclass(frozen=True)
class Logprobs:
    """What is said of tokens where no states are given: log-probabilities at temperature 1.

    Attributes:
        labels: [n] float32 or wider, of the labels.
        ids, top: [n, k] int64 and float32 or wider, the likeliest tokens, the first one first, and
            theirs; behind the last that is known -1 and -inf. None: not asked for.
    """

    labels: Tensor
    ids: Tensor | None = None
    top: Tensor | None = None


@dataclass(frozen=True)
class View:
    """One model on one batch: the same for student and teacher, live, cached or served.

    Attributes:
        tokens: the supervised tokens.
        head: what maps `hidden` to logits, or None where the source gives no states.
        hidden: [n, d] final hidden states as the head takes them, or None.
        embedded: [n, d] input embeddings of the tokens' inputs and of their labels, or None.
        written: on the student's side, of a batch with answers that were written during training.
        logprobs: of a teacher that gives no states, else None.
    """

    tokens: Side
    head: OutputHead | None = None
    hidden: Tensor | None = None
    embedded: tuple[Tensor, Tensor] | None = None
    written: Written | None = None
    logprobs: Logprobs | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def references(self) -> Tensor:
        """[n] the labels, -100 in answers that were written during training: nothing says what
        should have stood there. What a cross-entropy may learn from."""
        if self.written is None:
            return self.tokens.labels
        here = self.written.samples[self.tokens.sample_ids]
        return torch.where(here, IGNORE_INDEX, self.tokens.labels)


@dataclass(frozen=True)
class Matches:
    """Which supervised tokens of the two sides are about the same text, by bytes.

    All index the compact tokens of a batch (`Side`), student first, and ascend.

    Attributes:
        spans, teacher_spans: [N, 2], [M, 2] first byte and end of each token in the text of its
            sample that both sides share.
        exact: [P, 2] tokens with the same span on both sides.
        starts: [Q, 2] tokens that begin at the same byte: both models have read the same text
            before them. Contains the exact pairs.
        groups, teacher_groups: [N], [M] which group between two boundaries that both sides have
            a token belongs to, numbered over the batch. Every token is in one.
    """

    spans: Tensor
    teacher_spans: Tensor
    exact: Tensor
    starts: Tensor
    groups: Tensor
    teacher_groups: Tensor


def _no_matches() -> Matches:
    none = torch.zeros(0, dtype=torch.long)
    pairs = none.view(0, 2)
    return Matches(pairs, pairs, exact=pairs, starts=pairs, groups=none, teacher_groups=none)


@dataclass(frozen=True)
class DualBatch:
    """A batch as the collator hands it on: student rows and one teacher row per sample.

    In a collated batch, `input_ids` and `labels` are the student's own; each other tensor, those
    of `matches` and `written` too, travels under a name that begins with `dskd_`, which no model's
    forward may see.

    Attributes:
        input_ids, labels, segment_ids: [B, L]; `segment_ids` numbers the samples of the whole
            batch from 0 and is -1 on padding.
        teacher_input_ids, teacher_labels, teacher_attention_mask: [S, L'], row s is sample s.
        cached_states, cached: from the teacher's cache, or None: [M, bytes] uint8, the packed
            states of the supervised teacher tokens, and [S] bool, which samples were found (the
            others' states are zeros). Those of several teachers are padded to the widest.
        teachers: [S] the number of the teacher that each sample asks, or None: there is one.
        matches: of the supervised tokens; of no tokens where there is only a teacher's side.
        written: where answers of the batch were written during training, else None.
        known: as the collator counted it; None: see `sizes`.
    """

    input_ids: Tensor
    labels: Tensor
    segment_ids: Tensor
    teacher_input_ids: Tensor
    teacher_labels: Tensor
    teacher_attention_mask: Tensor
    cached_states: Tensor | None = None
    cached: Tensor | None = None
    teachers: Tensor | None = None
    matches: Matches = field(default_factory=_no_matches)
    written: Written | None = None
    known: Sizes | None = None

    def put_into(self, inputs: dict[str, Any]) -> None:
        """Add our tensors to a collated batch, out of which `pop_from` takes them."""
        parts: list[tuple[str, Any]] = [(_OURS, self), (_OURS, self.matches)]
        if self.written is not None:
            parts.append((_WRITTEN, self.written))
        for prefix, part in parts:
            for name in (f.name for f in fields(part) if f.name not in _OF_THE_STUDENT):
                if isinstance(value := getattr(part, name), Tensor | Sizes):
                    inputs[prefix + name] = value

    @classmethod
    def pop_from(cls, inputs: dict[str, Any]) -> DualBatch:
        """Take our tensors out of a collated batch; the rest is what the student's forward gets.

        Raises:
            TypeError: one that every batch has is missing.
        """

        def popped(kind: type, prefix: str = _OURS) -> dict[str, Any]:
            names = (f.name for f in fields(kind) if f.name not in _OF_THE_STUDENT)
            return {name: inputs.pop(key) for name in names if (key := prefix + name) in inputs}

        of_the_student = {name: inputs[name] for name in _OF_THE_STUDENT}
        written = popped(Written, _WRITTEN)
        return cls(
            **of_the_student,
            **popped(cls),
            matches=Matches(**popped(Matches)),
            written=Written(**written) if written else None,
        )

    def student_mask(self) -> Tensor:
        """[B, L] bool: the positions that predict a supervised token of their own sample."""
        return supervised_mask(self.labels, self.segment_ids)

    @cached_property
    def sizes(self) -> Sizes:
        """`known`, or counted: then the host waits for the GPU."""
        if self.known is not None:
            return self.known

        def counted(segments: Tensor, mask: Tensor) -> tuple[int, ...]:
            return tuple(segments[mask].bincount(minlength=len(self.teacher_labels)).tolist())

        return Sizes(
            counted(self.segment_ids, self.student_mask()),
            counted(self.teacher_segment_ids(), self.teacher_mask()),
            tuple(self.teacher_attention_mask.sum(1).tolist()),
            None if self.cached is None else tuple(self.cached.tolist()),
        )

    @cached_property
    def student_places(self) -> tuple[Tensor, Tensor]:
        """[N] row and [N] position of each supervised student token, row by row."""
        return places_of(self.student_mask(), self.sizes.student)

    def student_side(self) -> Side:
        """The supervised student tokens, row by row."""
        at, counts = self.student_places, self.sizes.student
        labels = labels_ahead(self.labels)[at]
        return Side(self.input_ids[at], labels, self.segment_ids[at], counts)

    def teacher_mask(self) -> Tensor:
        """[S, L'] bool: the positions that predict a supervised token."""
        return supervised_mask(self.teacher_labels, self.teacher_segment_ids())

    @cached_property
    def teacher_places(self) -> tuple[Tensor, Tensor]:
        """[M] row and [M] position of each supervised teacher token, as `student_places`."""
        return places_of(self.teacher_mask(), self.sizes.teacher)

    def teacher_side(self) -> Side:
        """The supervised teacher tokens, sample by sample."""
        at, labels = self.teacher_places, labels_ahead(self.teacher_labels)
        ids = self.teacher_segment_ids()[at]
        return Side(self.teacher_input_ids[at], labels[at], ids, self.sizes.teacher)

    def teacher_segment_ids(self) -> Tensor:
        """[S, L'] the row's number where there is a token, -1 on padding."""
        rows = torch.arange(len(self.teacher_labels), device=self.teacher_labels.device)
        return torch.where(self.teacher_attention_mask.bool(), rows[:, None], -1)


#: What a term's mean is counted by: the supervised student tokens, as in the loss; those of them
#: that have a reference (`View.references`); or the values that there are.
Per = Literal["student_token", "reference_token", "value"]


@dataclass(frozen=True)
class Term:
    """Values of a batch, kept apart so that one that is not finite can be traced to its rows.

    Attributes:
        values: [k] float32 or wider, without graph.
        sample_ids: [k] which sample of the batch each belongs to.
    """

    values: Tensor
    sample_ids: Tensor


@dataclass
class LossOutput:
    """Sums over supervised tokens; divided once, by whoever knows the global count.

    Attributes:
        loss: scalar with an autograd graph, the weighted sum of the terms.
        tokens: supervised student tokens of the batch.
        references: how many of them have a reference; None: all.
        terms: by name, as the objective's `terms` say.
    """

    loss: Tensor
    tokens: int
    terms: dict[str, Term] = field(default_factory=dict)
    references: int | None = None

    def sums(self) -> Mapping[str, Tensor]:
        """Sum of each term, in float64: a million small numbers keep their digits."""
        return {n: term.values.sum(dtype=torch.float64) for n, term in self.terms.items()}

    def not_finite(self) -> Iterator[tuple[str, int, list[int]]]:
        """Terms with NaN or infinity: the name, how many values, in which samples."""
        for name, term in self.terms.items():
            bad = ~torch.isfinite(term.values)
            if count := int(bad.sum()):
                yield name, count, sorted(set(term.sample_ids[bad].tolist()))
