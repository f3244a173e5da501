"""The memory plan: what one training process holds at its fullest moment, against a card.

Weights, gradients and optimizer states are counted parameter by parameter on skeletons; what a
step adds is found by running the step's own code (student, teacher, alignment, loss, backward) on
meta tensors. Knows models and settings; nothing of rows or reports.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from axolotl_dskd.commands.inspect.optimizers import optimizer_bytes, step_bytes
from axolotl_dskd.commands.inspect.simulate import LiveBytes, attention, backward, simulation
from axolotl_dskd.commands.inspect.skeleton import frozen_tensors, model_bytes, trained_tensors
from axolotl_dskd.losses import elementwise
from axolotl_dskd.models.heads import captured_head_input, head_module, output_head, single
from axolotl_dskd.objectives.dual_space import align_positions, align_with_attention
from axolotl_dskd.objectives.dual_space.loss import LossSettings, dual_space_loss
from axolotl_dskd.objectives.dual_space.projectors import ROWS_AT_ONCE, Projectors
from axolotl_dskd.teacher.live import MAX_TOKENS_PER_FORWARD
from axolotl_dskd.types import Side, View

GIB = 1 << 30

#: The CUDA context with its kernels and cuBLAS' workspaces, per process.
CUDA_CONTEXT = int(0.6 * GIB)
#: Of what a step allocates and frees, the share that PyTorch's allocator keeps on top in pieces.
FRAGMENTATION = 0.05


@dataclass(frozen=True)
class BatchShape:
    """The largest batch of one process and one micro-step.

    Attributes:
        rows, length: of the student's input; `samples` in it (more than rows where packed).
        supervised: student tokens that are trained on.
        teacher_length: longest teacher side of a sample; `teacher_supervised` in the whole batch.
        padded: rows carry a padding mask.
    """

    rows: int
    length: int
    samples: int
    supervised: int
    teacher_length: int
    teacher_supervised: int
    padded: bool


@dataclass(frozen=True)
class PlanSettings:
    """What the plan depends on beside the two models.

    Attributes:
        batch: the largest batch.
        optimizer: Axolotl's name of it.
        accumulate: gradients live from one micro-step to the next.
        gradient_checkpointing: Axolotl's value; `reentrant` its kind.
        attention, teacher_attention: implementations, None for the library's choice.
        autocast: dtype of mixed precision, or None.
        alignment: how tokens meet; eta is planned as if every token had an exact partner.
        teacher_cached: its states come from disk, so its layers are never loaded.
        start: how the projectors start; `shared_tokens`: pairs that a least-squares one reads.
        loss: the trainer's settings, chunk size included.
        vocab_sizes: ids that the two tokenizers emit.
        on_gpu: whether it is a GPU that is planned for.
    """

    batch: BatchShape
    optimizer: str
    accumulate: bool
    gradient_checkpointing: bool
    reentrant: bool
    attention: str | None
    teacher_attention: str | None
    autocast: torch.dtype | None
    alignment: str
    teacher_cached: bool
    start: str
    shared_tokens: int
    loss: LossSettings
    vocab_sizes: tuple[int, int]
    on_gpu: bool


@dataclass
class Plan:
    """Bytes of one process.

    Attributes:
        held: what stays during all of training, by name.
        phases: what each phase of a step (and the start) has on top at its own fullest moment.
        notes: what is assumed, in words.
    """

    held: dict[str, int]
    phases: dict[str, dict[str, int]]
    notes: list[str] = field(default_factory=list)

    @property
    def peak_phase(self) -> str:
        """The phase with the fullest moment."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def at_peak(self) -> dict[str, int]:
        """Every part of the fullest moment."""
        return {k: v for k, v in {**self.held, **self.phases[self.peak_phase]}.items() if v}

    @property
    def total(self) -> int:
        """Bytes at the fullest moment."""
        return sum(self.at_peak.values())


def _checkpointing(student: Any, settings: PlanSettings) -> None:
    if not settings.gradient_checkpointing:
        student.gradient_checkpointing_disable()
        return
    # Random states cannot be kept for the meta device.
    kwargs = {"use_reentrant": settings.reentrant, "preserve_rng_state": False}
    student.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def _student_step(student: Any, settings: PlanSettings) -> Tensor:
    batch = settings.batch
    ids = torch.zeros((batch.rows, batch.length), dtype=torch.long, device="meta")
    with captured_head_input(student) as captured:
        student(input_ids=ids, use_cache=False)
    return single(captured, student)


def _teacher_step(teacher: Any, settings: PlanSettings) -> None:
    """One forward of the largest group of teacher rows."""
    batch = settings.batch
    rows = min(batch.samples, max(1, MAX_TOKENS_PER_FORWARD // batch.teacher_length))
    ids = torch.zeros((rows, batch.teacher_length), dtype=torch.long, device="meta")
    padded = attention(settings.teacher_attention, padded=rows > 1)
    apart = torch.autocast("meta", enabled=False)
    with padded, apart, torch.no_grad(), captured_head_input(teacher):
        teacher(input_ids=ids, use_cache=False)


def _even_samples(tokens: int, samples: int) -> Tensor:
    return torch.arange(tokens) * samples // max(tokens, 1)


def _loss(
    student: Any, teacher: Any, projectors: Projectors, hidden: Tensor, settings: PlanSettings
) -> Tensor:
    """From the student's states [B, L, d] to the loss, as the trainer computes it."""
    batch, (V, U) = settings.batch, settings.vocab_sizes
    N, M = batch.supervised, batch.teacher_supervised
    head, teacher_head = output_head(student, V), output_head(teacher, U).frozen()
    hidden_Nd = hidden.flatten(0, 1)[torch.arange(N)]
    ours = Side(
        torch.zeros(N, dtype=torch.long),
        torch.zeros(N, dtype=torch.long),
        _even_samples(N, batch.samples),
    )
    theirs = Side(
        torch.zeros(M, dtype=torch.long),
        torch.zeros(M, dtype=torch.long),
        _even_samples(M, batch.samples),
    )
    states = [teacher_head.weight.new_empty((M, teacher_head.hidden_size)) for _ in range(3)]
    signal = View(theirs, teacher_head, states[0], (states[1], states[2]))
    if settings.alignment != "cma":
        aligned = align_positions(hidden_Nd, ours, signal, projectors)
    else:
        weight = student.get_input_embeddings().weight.detach()
        embedded = weight[ours.input_ids], weight[ours.labels]
        aligned = align_with_attention(hidden_Nd, embedded, ours, signal, projectors)
    call: dict[str, Any] = {}
    if settings.loss.student_space_weight:
        call["t2s_hidden"] = aligned.t2s_hidden
    if settings.loss.teacher_space_weight:
        call |= {"s2t_hidden": aligned.s2t_hidden, "teacher_hidden": states[0]}
        call |= {"teacher_labels": theirs.labels.to("meta"), "teacher_head": teacher_head}
    out = dual_space_loss(
        student_hidden=hidden_Nd,
        student_labels=ours.labels.to("meta"),
        student_head=head,
        settings=settings.loss,
        **call,
    )
    return out.loss


def _simulated(
    student: Any, teacher: Any, projectors: Projectors, settings: PlanSettings
) -> dict[str, dict[str, int]]:
    """What each phase of a micro-step holds on top of weights and optimizer states."""
    models: tuple[nn.Module, ...] = (student, teacher, projectors)
    static = [t for m in models for t in (*m.parameters(), *m.buffers())]
    phases: dict[str, dict[str, int]] = {}
    # The student's attention in backward too: checkpointed layers run again there.
    kind = attention(settings.attention, padded=settings.batch.padded)
    # Between the loss' products one kernel works in place, or small blocks of rows do.
    blocks = mock.patch.dict(elementwise._BLOCK, meta=elementwise._BLOCK["cpu"])
    with kind, blocks, simulation(static, settings.autocast) as memory:
        for _ in range(2 if settings.accumulate else 1):
            phases = _micro_step(student, teacher, projectors, settings, memory)
    for model in models:
        model.zero_grad(set_to_none=True)
    return phases


def _micro_step(
    student: Any, teacher: Any, projectors: Projectors, settings: PlanSettings, memory: LiveBytes
) -> dict[str, dict[str, int]]:
    gradients = memory.live
    with torch.autocast("meta"):
        hidden, forward_peak = memory.peak_of(lambda: _student_step(student, settings))
        kept = memory.live - gradients
        _, teacher_peak = memory.peak_of(
            lambda: None if settings.teacher_cached else _teacher_step(teacher, settings)
        )
        states = [hidden]
        del hidden
        loss, loss_peak = memory.peak_of(
            lambda: _loss(student, teacher, projectors, states.pop(), settings)
        )
        after_loss = memory.live
        _, backward_peak = memory.peak_of(partial(backward, loss))
    del loss
    held = {"gradients": gradients, "student activations": kept}
    # In backward, gradients grow while activations go: what is there before, and the rest.
    return {
        "student forward": {**held, "student layer": forward_peak - gradients - kept},
        "teacher forward": {**held, "teacher activations": teacher_peak - gradients - kept},
        "alignment and loss": {**held, "alignment and loss": loss_peak - gradients - kept},
        "backward": {
            **held,
            "alignment and loss": after_loss - gradients - kept,
            "backward's own": backward_peak - after_loss,
        },
        "optimizer step": {"gradients": memory.live},
    }


def _start_bytes(student: Any, teacher: Any, settings: PlanSettings) -> int:
    """The least-squares start of the projectors: a block of both models' rows, and the float64
    normal equations with a factorised copy."""
    ours, theirs = head_module(student).weight, output_head(teacher).weight
    d, D, shared = output_head(student).hidden_size, theirs.shape[1], settings.shared_tokens
    if settings.start == "random" or (settings.start == "auto" and shared < max(d, D)):
        return 0
    numbers = 2 * min(shared, ROWS_AT_ONCE)  # head and embedding
    rows = numbers * (d * (8 + ours.element_size()) + D * (8 + theirs.element_size()))
    with_query = settings.alignment == "cma"
    products = d * d + D * D + d * D + (d * d + d * D if with_query else 0)
    return rows + 8 * (products + 2 * max(d, D) ** 2)


def make_projectors(student: Any, teacher: Any, alignment: str) -> Projectors:
    """The run's projectors on the meta device."""
    return Projectors(
        output_head(student).hidden_size,
        output_head(teacher).hidden_size,
        with_query=alignment == "cma",
        seed=0,
    ).to("meta")


def make_plan(student: Any, teacher: Any, settings: PlanSettings) -> Plan:
    """The plan for one process with nothing sharded.

    Args:
        student, teacher: skeletons (`skeleton`).
        settings: batch, optimizer and the rest.
    """
    projectors = make_projectors(student, teacher, settings.alignment)
    trained = trained_tensors(student)
    weights = model_bytes(trained)
    states, note = optimizer_bytes(settings.optimizer, trained)
    mapped = model_bytes(projectors.parameters())
    head = head_module(teacher)
    embedding = teacher.get_input_embeddings()
    ends = model_bytes([*head.parameters(), *embedding.parameters()])
    body = model_bytes([*teacher.parameters(), *teacher.buffers()]) - ends
    adapted = bool(frozen_tensors(student)) and any(
        "lora_" in name for name, p in student.named_parameters() if p.requires_grad
    )
    held = {
        "student weights": model_bytes(frozen_tensors(student)) + (0 if adapted else weights),
        "adapters": weights if adapted else 0,
        "optimizer states": states,
        "projectors with their optimizer": 3 * mapped,
        "teacher layers": 0 if settings.teacher_cached else body,
        "teacher embedding and head": ends,
    }
    notes = [note] if note else []
    _checkpointing(student, settings)
    phases = _simulated(student, teacher, projectors, settings)
    phases["optimizer step"]["optimizer's temporaries"] = step_bytes(
        settings.optimizer, [*trained, *projectors.parameters()], on_gpu=settings.on_gpu
    )
    # Before the first step there are no optimizer states yet.
    start = _start_bytes(student, teacher, settings) - held["optimizer states"] - 2 * mapped
    if start > 0:
        phases["start of training"] = {"projectors' start": start}
    if settings.on_gpu:
        held["CUDA context"] = CUDA_CONTEXT
        step = max(sum(parts.values()) for parts in phases.values())
        held["fragmentation"] = math.ceil(FRAGMENTATION * step)
    return Plan(held, phases, notes)
