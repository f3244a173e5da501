"""What an objective is: the one seam between batches and what is learned from them.

An objective is given the student's and the teacher's `View` of a batch and which of their tokens
are about the same text, and returns sums. It does not know where the rows come from, whether the
teacher is live, cached or served, how the student is sharded, nor what the sums are divided by.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from axolotl_dskd.config import Gives, ObjectiveConfig
from axolotl_dskd.data.token_bytes import ends, shared_tokens
from axolotl_dskd.losses import Budget, Part, Stream, even_parts, paired_parts, set_logprobs
from axolotl_dskd.output_head import OutputHead
from axolotl_dskd.types import LossOutput, Matches, Needs, Per, Side, Term, View

C = TypeVar("C", bound=ObjectiveConfig)


@dataclass(frozen=True)
class Facts:
    """What is known of a pair without weights.

    Attributes:
        student, teacher: the two tokenizers.
        vocab_sizes: ids that they can emit, student's first.
        exact_share: share of the data's supervised student tokens with an exact pair, or None
            where there are no data.
        longest: supervised student tokens of the data's longest row, where there are data.
        turn_ends: the tokens with which the data's turns end, student's first, where these stand
            for no text; None: taken to be the ends of sequence.
    """

    student: Any
    teacher: Any
    vocab_sizes: tuple[int, int]
    exact_share: float | None = None
    longest: int | None = None
    turn_ends: tuple[int, int] | None = None

    @property
    def one_vocabulary(self) -> bool:
        """Whether both tokenizers have the same ids for the same tokens."""
        return self.student.get_vocab() == self.teacher.get_vocab()

    def differing(self) -> str:
        """In how many ids two vocabularies differ, with an example; empty where they don't."""
        ours, theirs = self.student.get_vocab(), self.teacher.get_vocab()
        differing = ours.items() ^ theirs.items()
        if not differing:
            return ""
        token, index = min(differing, key=lambda item: (item[1], item[0]))
        return (
            f"they differ in {len({i for _, i in differing})} ids, such as id {index} "
            f"({token!r} on one side only)"
        )

    @property
    def shared_ids(self) -> tuple[Sequence[int], Sequence[int]]:
        """Ids of the tokens that both have, student's first; over one vocabulary of all."""
        if self.one_vocabulary:
            return (range(self.vocab_sizes[0]),) * 2
        return shared_tokens(self.student, self.teacher, self.turn_ends)

    @property
    def shared_ends(self) -> list[tuple[int, int]]:
        """The end tokens, student's first, that `shared_ids` takes for each other's by their role;
        none over one vocabulary."""
        return [] if self.one_vocabulary else ends(self.student, self.teacher, self.turn_ends)


@dataclass(frozen=True)
class Setting:
    """What all objectives are told of the run.

    Attributes:
        kd_ratio: weight of what is distilled; the student's cross-entropy has the rest.
        budget: how many tokens' logits may be held at once.
        seed: for whatever is drawn at the start.
        written: the student writes answers during training.
        gives: what the teacher says of each token.
        references: rows of the data are learned from, too.
    """

    kd_ratio: float = 0.5
    budget: Budget = field(default_factory=Budget)
    seed: int = 0
    written: bool = False
    gives: Gives = "states"
    references: bool = True


@dataclass(frozen=True)
class Pair:
    """Both models as training begins, student's first.

    Attributes:
        heads: the student's may hold its storage on rank 0 alone (device meta elsewhere). A teacher
            that gives no states has none.
        embeddings: [V, d] and [U, D] input embeddings; likewise.
        device: where losses are computed.
    """

    heads: tuple[OutputHead, ...]
    embeddings: tuple[Tensor, ...]
    device: torch.device


@dataclass(frozen=True)
class Beside:
    """How a module that is trained beside the student is optimised (AdamW, float32).

    Attributes:
        learning_rate: times the student's schedule factor.
        weight_decay: AdamW's.
        warmup_steps: optimizer steps in which the module trains alone, at its full rate.
    """

    learning_rate: float
    weight_decay: float = 0.0
    warmup_steps: int = 0


class Objective(ABC, Generic[C]):
    """One method. Subclass with the class of its keys: `class ULD(Objective, config=ULDConfig)`.

    Args:
        config: its keys.
        facts: of the pair.
        setting: of the run.

    Raises:
        ValueError: the pair is not one that the method works for.

    Attributes:
        needs: what it must be given.
        without_states: the keys with which it needs no states of the teacher, in words.
        terms: every value that it reports, and what each is counted by. Stated ahead, so that all
            ranks log the same, whatever each of them has seen.
        module: what is trained beside the student, or what a checkpoint has to keep for it, or
            None. Its parameters are float32; ranks start with rank 0's, and with its buffers.
        beside: how, where there is a module.
    """

    #: Every subclass, by the class of its keys.
    known: ClassVar[dict[type[ObjectiveConfig], type[Objective[Any]]]] = {}

    needs: Needs = Needs()
    without_states: ClassVar[str] = ""
    terms: ClassVar[dict[str, Per]] = {}
    module: nn.Module | None = None
    beside: Beside | None = None

    def __init_subclass__(cls, config: type[ObjectiveConfig] | None = None, **_: Any) -> None:
        super().__init_subclass__()
        if config is not None:
            Objective.known[config] = cls

    def __init__(self, config: C, facts: Facts, setting: Setting) -> None:
        self.config = config
        self.facts = facts
        self.setting = setting
        if self.needs.one_vocabulary and not facts.one_vocabulary:
            sizes = [len(t.get_vocab()) for t in (facts.student, facts.teacher)]
            raise ValueError(
                f"dskd.objective: {config.name} compares distributions over one vocabulary, but "
                f"student and teacher have different ones ({sizes[0]} and {sizes[1]} tokens; "
                f"{facts.differing()}). Use dual_space, uld, or another objective for different "
                "tokenizers."
            )
        if self.needs.written and not setting.written:
            raise ValueError(
                f"dskd.objective: {config.name} learns from answers that the student writes during "
                "training, but all rows are the data set's. Set dskd.samples: {from: student}, or "
                "use another objective."
            )
        if self.needs.of_teacher == "states" and setting.gives != "states":
            keys = f", or {self.without_states}" if self.without_states else ""
            raise ValueError(
                f"dskd.objective: {config.name} needs the teacher's hidden states, but "
                "dskd.teacher.server gives log-probabilities of some tokens. Set "
                f"dskd.teacher.server.gives: states{keys}."
            )

    def describe(self) -> str:
        """One sentence for the log: which tokens meet, and why."""
        return f"objective {self.config.name}"

    def advice(self) -> str | None:
        """What the configuration could better say, in words, or None."""
        return None

    def begin(self, pair: Pair) -> None:
        """Once, before the first step: build the module, look at the heads."""

    def follow(self, step: int, head: OutputHead) -> None:
        """Once in a training step, before its losses, with the student's head as it is now.

        Args:
            step: optimizer steps made so far.
            head: whole; on every rank.
        """

    def remark(self, means: Mapping[str, float]) -> str | None:
        """What the user should know of how training goes, in words, or None: called at each log.

        Args:
            means: over the tokens of all ranks since the last log, by the names of `terms`.
        """
        return None

    def end_step(self) -> None:
        """Once after each optimizer step, on every rank: put together what its batches showed."""

    def forget_step(self) -> None:
        """A step has failed half-way, and training begins again: drop what its batches showed."""

    @abstractmethod
    def __call__(self, student: View, teacher: View, matches: Matches) -> LossOutput:
        """Sums over a batch, which may have no supervised token at all.

        The loss includes the student's cross-entropy, weighted with `1 - kd_ratio`.
        """


def student_stream(student: View) -> Stream:
    """The student's states, with a head that trains where it is to."""
    assert student.hidden is not None and student.head is not None
    return Stream(student.hidden, student.head, trains_head=student.head.trainable)


def teacher_stream(teacher: View) -> Stream:
    """The teacher's states in its head's dtype."""
    assert teacher.hidden is not None and teacher.head is not None
    return Stream(teacher.hidden.to(teacher.head.weight.dtype), teacher.head)


def label_logprobs(teacher: View, rows: Tensor | slice, budget: Budget) -> Tensor:
    """[k] log-probability of the labels of some of the teacher's tokens, float32 or wider.

    Takes one product with the teacher's head, or none where it says them itself.
    """
    if teacher.logprobs is not None:
        return teacher.logprobs.labels[rows]
    stream = teacher_stream(teacher)
    some = Stream(stream.hidden[rows], stream.head)
    return set_logprobs(some, teacher.tokens.labels[rows], budget, None)[0]


def equal_ids(pairs: Tensor, student: Side, teacher: Side) -> Tensor:
    """Those of some pairs [P, 2] whose labels are one id, [P', 2]: over one vocabulary all but the
    end tokens of two templates."""
    same = student.labels[pairs[:, 0]] == teacher.labels[pairs[:, 1]]
    return pairs[same]


def ordinal_pairs(student: Side, teacher: Side) -> Tensor:
    """[P, 2] the k-th supervised tokens of both sides of each sample; the longer side's rest meets
    nothing."""
    places = []
    for side in (student, teacher):
        ids = side.sample_ids
        first = torch.searchsorted(ids, ids)  # where the token's sample begins
        places.append((ids << 32) | (torch.arange(len(ids), device=ids.device) - first))
    ours, theirs = places
    if not len(theirs):
        return torch.zeros((0, 2), dtype=torch.long, device=ours.device)
    at = torch.searchsorted(theirs, ours).clamp_max(len(theirs) - 1)
    met = (theirs[at] == ours).nonzero().flatten()
    return torch.stack([met, at[met]], 1)


def pair_chunks(
    pairs: Tensor, streams: Mapping[str, Stream], budget: Budget, copies: int = 0
) -> Iterable[Part]:
    """Chunks of the streams `student` and `teacher` by pairs, then of the student's other tokens.

    Args:
        pairs: [P, 2], ascending; a student's token in one pair at most.
        copies: float32 copies of each stream's logits that are held beside them.
    """
    lengths = {name: len(stream) for name, stream in streams.items()}
    size = budget.size(*streams.values(), copies=copies)
    if {len(pairs)} == set(lengths.values()):
        return even_parts(lengths, size)
    rows = {"student": pairs[:, 0], "teacher": pairs[:, 1]}
    return paired_parts(rows, "student", lengths["student"], size)


def participation(rows: Tensor | None, tokens: Side) -> Term:
    """The term `aligned`: which of a student's tokens take part, [N] 0 or 1.

    Args:
        rows: of those that do; None: all.
    """
    took_part = torch.ones(len(tokens), device=tokens.labels.device)
    if rows is not None:
        took_part = torch.zeros_like(took_part)
        took_part[rows] = 1.0
    return Term(took_part, tokens.sample_ids)
