"""The two halves of the dual-space loss: one over each vocabulary.

With `sg` = stop-gradient, T = temperature and D the divergence (teacher side first):

    z, u = student_head(h_s), sg(student_head)(t2s)
    ce             = cross_entropy(z, labels)
    projector_ce   = cross_entropy(u, targets)
    student_space  = D(softmax(sg(u) / T), softmax(z / T))   [· (u is largest at target) if masked]
    teacher_space  = KL(softmax(teacher_head(h_t) / T) ‖ softmax(teacher_head(s2t) / T))

each summed over its tokens (arXiv 2406.17328, §3). These are seven matrix products (student's
vocabulary: two logits, two gradients; teacher's: two logits, one gradient) and one more where the
student's head trains. Cross-entropies are at temperature 1; no T² factor, as in the published
method. This module knows streams and labels; not where projected states come from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from axolotl_dskd.losses import (
    Budget,
    Divergence,
    Learn,
    Stream,
    TermSpec,
    Weights,
    even_parts,
    make_divergence,
    over,
    paired_parts,
)
from axolotl_dskd.supervision import indices_of
from axolotl_dskd.types import IGNORE_INDEX, LossOutput, Side, Term


@dataclass(frozen=True)
class Terms:
    """How the terms are weighted, for one run.

    The loss is `(1-kd_ratio) * ce + kd_ratio * (student_space_weight * (divergence_weight
    * student_space + projector_ce) + teacher_space_weight * teacher_space)`, as sums over tokens.

    Attributes:
        divergence: student-space divergence D(projected teacher ‖ student).
        divergence_written: another one for answers that were written during training, or None.
        temperature: of both spaces' divergences.
        mask_wrong: count the student-space divergence only where the projected teacher's most
            likely token is its target (arXiv 2406.17328, cross-model attention), or there is
            none.
        divergence_weight: of the student-space divergence beside the projector's cross-entropy.
    """

    divergence: Divergence
    temperature: float = 2.0
    kd_ratio: float = 0.5
    student_space_weight: float = 1.0
    teacher_space_weight: float = 1.0
    mask_wrong: bool = False
    divergence_weight: float = 1.0
    divergence_written: Divergence | None = None


def student_space(
    student: Stream,
    tokens: Side,
    projected: Tensor | None,
    rows: Tensor | None,
    targets: Tensor | None,
    terms: Terms,
    budget: Budget,
    references: Tensor | None = None,
    taught: Tensor | None = None,
) -> LossOutput:
    """Terms over the student's vocabulary.

    Args:
        student: [N, d] its states.
        tokens: its supervised tokens.
        projected: [K, d] teacher states in the student's space; None: the cross-entropy alone.
        rows: [K] the student token of each; None: K = N, in order.
        targets: [K] what the projected teacher is taught to say, -100 for nothing (the token then
            has no divergence either); None: the student's labels.
        terms: weights and divergence.
        budget: of a chunk.
        references: [N] what both cross-entropies take for right, -100 where nothing does: there
            the divergence counts whatever the projected teacher says. None: the labels.
        taught: [k] which targets are not -100, where that is known already; else the host waits
            for a GPU to say it.
    """
    weights = Weights(
        ce=1.0 - terms.kd_ratio,
        source_ce=terms.kd_ratio * terms.student_space_weight,
        divergence=terms.kd_ratio * terms.student_space_weight * terms.divergence_weight,
        temperature=terms.temperature,
        mask_wrong=terms.mask_wrong,
    )
    N = len(student)
    specs = {"ce": TermSpec("student", weights.ce)}
    source = student.hidden[:0].detach() if projected is None else projected
    streams = {"student": student, "projected": Stream(source, student.head)}
    # Without references of their own, all tokens have one.
    divergence_written = None if references is None else terms.divergence_written
    references = tokens.labels if references is None else references
    labels = references if rows is None else references[rows]
    if targets is None:
        targets = labels
    elif len(targets):
        if taught is None:
            (taught,) = indices_of(targets != IGNORE_INDEX)
        rows = taught if rows is None else rows[taught]
        source = source[taught]
        targets = torch.where(labels[taught] == IGNORE_INDEX, IGNORE_INDEX, targets[taught])
        streams["projected"] = Stream(source, student.head)
    size = budget.size(*streams.values())
    if projected is None:
        parts = even_parts({"student": N}, size)
    else:
        specs |= {
            "student_space": TermSpec("projected", weights.divergence),
            "projector_ce": TermSpec("projected", weights.source_ce),
            "projector_accuracy": TermSpec("projected"),
        }
        if rows is None:
            parts = even_parts({"student": N, "projected": len(source)}, size)
        else:
            own = torch.arange(len(rows), device=rows.device)
            parts = paired_parts({"student": rows, "projected": own}, "student", N, size)
    learn = Learn(
        "student",
        "projected",
        terms.divergence,
        weights,
        references,
        targets,
        {
            "ce": "ce",
            "divergence": "student_space",
            "source_ce": "projector_ce",
            "correct": "projector_accuracy",
        },
        divergence_written,
    )
    sums = over(streams, parts, learn, specs)
    ids = {
        "student": tokens.sample_ids,
        "projected": tokens.sample_ids if rows is None else tokens.sample_ids[rows],
    }
    values = {name: Term(sums.values[name], ids[spec.of]) for name, spec in specs.items()}
    return LossOutput(sums.loss, N, values)


def teacher_space(
    teacher: Stream,
    tokens: Side,
    projected: Tensor,
    rows: Tensor | None,
    terms: Terms,
    budget: Budget,
    share: float = 1.0,
) -> tuple[Tensor, dict[str, Term]]:
    """The weighted sum and the terms over the teacher's vocabulary: always forward KL.

    Args:
        teacher: [M, D] its states, in the dtype of its head.
        tokens: its supervised tokens.
        projected: [K, D] student states in the teacher's space.
        rows: [K] the teacher token of each; None: K = M, in order.
        terms: weights and temperature.
        budget: of a chunk.
        share: of all tokens, the probability at which these were drawn: what is summed is divided
            by it.
    """
    weight = terms.kd_ratio * terms.teacher_space_weight / share
    if rows is not None:
        teacher, tokens = Stream(teacher.hidden[rows], teacher.head), tokens.at(rows)
    streams = {
        "teacher": teacher,
        "projected": Stream(projected.to(teacher.hidden.dtype), teacher.head),
    }
    specs = {
        "teacher_space": TermSpec("projected", weight),
        "teacher_accuracy": TermSpec("projected"),
    }
    learn = Learn(
        "projected",
        "teacher",
        make_divergence("forward_kl"),
        Weights(ce=0.0, source_ce=0.0, divergence=weight, temperature=terms.temperature),
        None,
        tokens.labels,
        {"divergence": "teacher_space", "correct": "teacher_accuracy"},
    )
    lengths = {name: len(stream) for name, stream in streams.items()}
    sums = over(streams, even_parts(lengths, budget.size(*streams.values())), learn, specs)
    sums.values["teacher_space"] /= share
    return sums.loss, {n: Term(values, tokens.sample_ids) for n, values in sums.values.items()}
