"""The memory plan: what one training process holds at its fullest moment, against a card.

Weights, gradients and optimizer states are counted parameter by parameter on skeletons; what a
step adds is found by running the step's own code (student, teacher, alignment, loss, backward) on
meta tensors. Knows models and settings; nothing of rows or reports.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from axolotl_dskd.config import StudentSamplesConfig
from axolotl_dskd.models.heads import head_module, output_head
from axolotl_dskd.planning.optimizers import optimizer_bytes, step_bytes
from axolotl_dskd.planning.run import Run
from axolotl_dskd.planning.simulate import LiveBytes, attend, backward, simulation
from axolotl_dskd.planning.skeleton import model_bytes, tensors_of
from axolotl_dskd.planning.step import TrainingStep
from axolotl_dskd.progress import quantity

#: The CUDA context with its kernels and cuBLAS' workspaces, per process.
CUDA_CONTEXT = int(0.6 * (1 << 30))
#: Of what a step allocates and frees, the share that PyTorch's allocator keeps on top in pieces.
FRAGMENTATION = 0.05
#: Of each row and id that is written: logits and log-probabilities in float32, probabilities and
#: sums in float64. Where two models draw, of each the first three, and the sums of both together.
_DRAWING, _DRAWING_TOGETHER = 4 + 4 + 8 + 8, 2 * (4 + 4 + 8) + 8


@dataclass(frozen=True)
class Step:
    """One change of the configuration on the way to less memory: what it is, and what is left."""

    change: str
    total: int
    saves: int
    cost: str


#: What of a plan each of several teachers has of its own; the rest is the student's.
_OF_A_TEACHER = (
    "projectors with their optimizer",
    "teacher layers",
    "teacher embedding and head",
)


@dataclass(frozen=True)
class Plan:
    """Bytes of one process, against a card.

    Attributes:
        card: the card's bytes, and `card_name`, what it is.
        batch: the largest one, in words.
        held: part -> what stays during all of training.
        on_top: phase of a step (or the start) -> part -> what is there too at its fullest moment.
        notes: what is assumed, in words.
        steps: changes, each on top of those before it, until it fits.
    """

    card: int
    card_name: str
    batch: str
    held: dict[str, int]
    on_top: dict[str, dict[str, int]]
    notes: Sequence[str] = ()
    steps: Sequence[Step] = ()

    @property
    def phases(self) -> dict[str, int]:
        """Phase -> bytes in all at that phase's fullest moment."""
        held = sum(self.held.values())
        return {name: held + sum(parts.values()) for name, parts in self.on_top.items()}

    @property
    def peak_phase(self) -> str:
        """The phase with the fullest moment."""
        return max(self.phases, key=self.phases.__getitem__)

    @property
    def at_peak(self) -> dict[str, int]:
        """Part -> bytes at the fullest moment."""
        return {k: v for k, v in {**self.held, **self.on_top[self.peak_phase]}.items() if v}

    @property
    def total(self) -> int:
        """Bytes at the fullest moment."""
        return max(self.phases.values())

    @property
    def fits(self) -> bool:
        """Whether the fullest moment is smaller than the card."""
        return self.total <= self.card


def make_plan(student: Any, runs: Sequence[Run]) -> Plan:
    """The plan for one process with nothing sharded; with several teachers as if whole batches
    asked the one that takes most.

    Args:
        student: its skeleton.
        runs: configuration and rows with each of the teachers alone.
    """
    plans = [_with_one_teacher(student, run) for run in runs]
    held = {name: sum(plan.held[name] for plan in plans) for name in _OF_A_TEACHER}
    fullest = max((replace(p, held=p.held | held) for p in plans), key=lambda plan: plan.total)
    if len(plans) == 1:
        return fullest
    note = "all teachers are counted; a batch is planned as if one of them had all of it"
    return replace(fullest, notes=[*fullest.notes, note])


def _with_one_teacher(student: Any, run: Run) -> Plan:
    step, keys, on_gpu = TrainingStep(student, run), run.config.one_teacher, run.card.gpu
    pair = step.pair
    with step.watched() as memory:
        _, start = memory.peak_of(lambda: step.objective.begin(pair))
        start -= memory.live  # what stays is held
    trained, mapped = (
        [p for model in models for p in model.parameters() if p.requires_grad]
        for models in ([student], step.beside)
    )
    optimizer = str(getattr(run.cfg.optimizer, "value", run.cfg.optimizer) or "adamw_torch_fused")
    states, note = optimizer_bytes(optimizer, trained)
    ends = (head_module(run.teacher), run.teacher.get_input_embeddings())
    ends_bytes = model_bytes(p for end in ends for p in end.parameters())
    body = model_bytes(tensors_of(run.teacher)) - ends_bytes
    held = {
        "student weights": model_bytes(tensors_of(student)),
        "optimizer states": states,
        "projectors with their optimizer": 3 * model_bytes(mapped),
        "teacher layers": body if run.layers_are_loaded else 0,
        "teacher embedding and head": ends_bytes if keys.gives == "states" else 0,
    }
    kept, notes = _kept_answers(step), [note] if note else []
    if kept and on_gpu:
        notes.append(
            f"beside the card, up to {quantity(kept, 'bytes')} of the host's memory hold what the "
            "teacher says of kept answers (dskd.samples.replay_memory bounds it)"
        )
    elif kept:
        held["kept answers"] = kept
    phases = _micro_step(step)
    temporaries = step_bytes(optimizer, [*trained, *mapped], on_gpu=on_gpu)
    phases["optimizer step"]["optimizer's temporaries"] = temporaries
    if not run.config.uses_teacher:
        del phases["teacher forward"]  # training asks nothing
        with step.watched() as memory, torch.autocast("meta"):
            phases["evaluation"] = {"evaluation's own": memory.peak_of(step.compare)[1]}
    if run.writing is not None:
        attend(student, run.cfg.attn_implementation, padded=True)
        partner = run.teacher if run.config.mixes else None
        phases["writing"] = writing(student, run.writing, run.autocast, partner)
    # Before the first step there are no optimizer states yet.
    later = states + 2 * model_bytes(mapped)
    if start > later:
        phases["start of training"] = {"projectors' start": start - later}
    if run.writing_before is not None:
        attend(run.teacher, keys.attn_implementation, padded=True)
        own = sum(writing(run.teacher, run.writing_before, None).values())
        own += body - held["teacher layers"]  # those of a cached one go again
        if own > later:
            phases["writing before training"] = {"teacher's writing": own - later}
    if (keys.device_map or "") not in ("", {"": 0}):
        notes.append("dskd.teacher.device_map is not followed: all of the teacher is counted here")
    if on_gpu:
        held["CUDA context"] = CUDA_CONTEXT
        largest = max(sum(parts.values()) for parts in phases.values())
        held["fragmentation"] = math.ceil(FRAGMENTATION * largest)
        notes.append("CUDA context and fragmentation (5% of a step) are allowances, not counts")
    return Plan(run.card.memory, run.card.name, run.batch.words, held, phases, notes)


def _kept_answers(step: TrainingStep) -> int:
    """Bytes of what the teacher says of kept answers: states, or log-probabilities of labels and
    likeliest tokens.

    All answers are as long as they may be, and in the teacher's tokens as many times that as in the
    rows; with several teachers as if all were one's.
    """
    run = step.run
    keys, teacher = run.config.samples, run.config.one_teacher
    if not isinstance(keys, StudentSamplesConfig):
        return 0
    ratio = run.sums.teacher_supervised / max(run.sums.supervised, 1)
    tokens = math.ceil(keys.replay * keys.max_new_tokens * ratio)
    if teacher.server is not None and teacher.gives == "logprobs":
        likeliest = teacher.server.top_k if step.objective.needs.of_teacher == "top" else 0
        width = 4 + (4 + 8) * likeliest
    else:
        head = output_head(run.teacher)
        width = head.hidden_size * head.weight.element_size()
    return min(int(keys.replay_memory), tokens * width)


def _micro_step(step: TrainingStep) -> dict[str, dict[str, int]]:
    """What each phase of a micro-step holds on top of weights and optimizer states: of the second
    one where there are several, which begins with gradients."""
    with step.watched() as memory, torch.autocast("meta"):
        for _ in range(min(2, step.run.cfg.gradient_accumulation_steps or 1)):
            gradients = memory.live
            _, reading = memory.peak_of(step.read)
            kept = memory.live - gradients
            _, asking = memory.peak_of(step.ask)
            loss, comparing = memory.peak_of(step.loss)
            waiting = memory.live - gradients - kept
            _, going_back = memory.peak_of(partial(backward, loss))
            del loss
        held = {"gradients": gradients, "student activations": kept}
        # In backward, gradients grow while activations go: what is there before, and the rest.
        phases = {
            "student forward": {**held, "student layer": reading - kept},
            "teacher forward": {**held, "teacher activations": asking},
            "alignment and loss": {**held, "alignment and loss": comparing},
            "backward": {**held, "alignment and loss": waiting, "backward's own": going_back},
            "optimizer step": {"gradients": memory.live},
        }
    for model in (step.student, *step.beside):
        model.zero_grad(set_to_none=True)
    return phases


def writing(
    student: Any, shape: tuple[int, int], autocast: torch.dtype | None, partner: Any = None
) -> dict[str, int]:
    """Bytes on top of weights at the fullest moment of writing answers, by name.

    As if prompts were as long as with their answers: then the cache of keys and values is full, and
    one forward reads all.

    Args:
        student: its skeleton, or that of a teacher that writes alone.
        shape: rows and tokens that are written at once.
        autocast: dtype of mixed precision, if any.
        partner: a teacher's that takes part in drawing, in eval mode; it reads after the student.
    """
    trains = student.training
    student.eval()  # gradient checkpointing keeps no cache
    models = [student] if partner is None else [student, partner]
    with simulation(tensors_of(*models), autocast) as memory, torch.no_grad():
        with torch.autocast("meta"):
            cache, own, logits = _read(student, shape, memory)
        drawing, beside = logits * _DRAWING, 0
        if partner is not None:  # its dtype is its own, not that of the student's autocast
            beside, of_partner, _ = _read(partner, shape, memory)
            drawing = max(logits * _DRAWING_TOGETHER, of_partner)
            own -= beside  # which is not there yet when the student reads
    student.train(trains)
    found = {"KV cache": cache, "teacher's KV cache": beside, "writing's own": max(own, drawing)}
    return {name: size for name, size in found.items() if size}


def _read(model: Any, shape: tuple[int, int], memory: LiveBytes) -> tuple[int, int, int]:
    """Bytes of the cache that a forward leaves and most beside them; rows times ids of its last
    logits."""
    ids = torch.zeros(shape, dtype=torch.long, device="meta")
    before = memory.live
    read = partial(model, input_ids=ids, use_cache=True, logits_to_keep=1)
    out, reading = memory.peak_of(read)
    logits, _kept = out.logits.numel(), out.past_key_values
    del out
    cache = memory.live - before
    return cache, reading - cache, logits
