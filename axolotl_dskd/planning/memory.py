"""The memory plan: what one training process holds at its fullest moment, against a card.

Weights, gradients and optimizer states are counted parameter by parameter on skeletons; what a
step adds is found by running the step's own code (student, teacher, alignment, loss, backward) on
meta tensors. Knows models and settings; nothing of rows or reports.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from axolotl_dskd.losses import elementwise
from axolotl_dskd.models.heads import captured_head_input, head_module, output_head, single
from axolotl_dskd.objectives import Objective, Pair
from axolotl_dskd.output_head import OutputHead
from axolotl_dskd.planning.optimizers import optimizer_bytes, step_bytes
from axolotl_dskd.planning.plan import Plan, PlannedRun
from axolotl_dskd.planning.simulate import LiveBytes, attention, backward, simulation
from axolotl_dskd.planning.skeleton import frozen_tensors, model_bytes, trained_tensors
from axolotl_dskd.planning.writing import writing
from axolotl_dskd.teacher.live import MAX_TOKENS_PER_FORWARD
from axolotl_dskd.types import Logprobs, Matches, Side, View, Written

GIB = 1 << 30

#: The CUDA context with its kernels and cuBLAS' workspaces, per process.
CUDA_CONTEXT = int(0.6 * GIB)
#: Of what a step allocates and frees, the share that PyTorch's allocator keeps on top in pieces.
FRAGMENTATION = 0.05


def _checkpointing(student: Any, run: PlannedRun) -> None:
    if not run.cfg.gradient_checkpointing:
        student.gradient_checkpointing_disable()
        return
    reentrant = (run.cfg.gradient_checkpointing_kwargs or {}).get("use_reentrant", False)
    # Random states cannot be kept for the meta device.
    kwargs = {"use_reentrant": bool(reentrant), "preserve_rng_state": False}
    student.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def _student_step(student: Any, run: PlannedRun) -> Tensor:
    batch = run.batch
    ids = torch.zeros((batch.rows, batch.length), dtype=torch.long, device="meta")
    with captured_head_input(student) as captured:
        student(input_ids=ids, use_cache=False)
    return single(captured, student)


def _teacher_step(teacher: Any, run: PlannedRun) -> None:
    """One forward of the largest group of teacher rows."""
    batch = run.batch
    rows = min(batch.samples, max(1, MAX_TOKENS_PER_FORWARD // batch.teacher_length))
    ids = torch.zeros((rows, batch.teacher_length), dtype=torch.long, device="meta")
    padded = attention(run.teacher.attn_implementation, padded=rows > 1)
    apart = torch.autocast("meta", enabled=False)
    with padded, apart, torch.no_grad(), captured_head_input(teacher):
        teacher(input_ids=ids, use_cache=False)


def _tokens(count: int, samples: int) -> Side:
    """Supervised tokens, evenly divided among samples. Real numbers: who belongs to which sample,
    and to whom of the other side, decides shapes."""
    nothing = torch.zeros(count, dtype=torch.long)
    return Side(nothing, nothing, torch.arange(count) * samples // max(count, 1))


def _matches(N: int, M: int) -> Matches:
    """As if every token had a partner, as far as the shorter side goes."""
    both = min(N, M)
    pairs = torch.arange(both)[:, None].expand(-1, 2)
    spans = torch.arange(max(N, M))[:, None] + torch.tensor([0, 1])
    groups = (torch.arange(count) * both // max(count, 1) for count in (N, M))
    return Matches(spans[:N], spans[:M], pairs, pairs, *groups)


def _written(objective: Objective[Any], count: int, samples: int) -> Written | None:
    """As if the student had written every answer; where two are compared, every other one."""
    if not objective.needs.written:
        return None
    everyone = torch.ones(samples, dtype=torch.bool)
    if not objective.needs.contrast:
        return Written(everyone, torch.zeros(count))
    pairs = torch.arange(samples // 2 * 2).view(-1, 2)
    return Written(torch.arange(samples) % 2 == 1, torch.zeros(count), None, pairs)


def _pair(student: Any, teacher: Any, run: PlannedRun) -> Pair:
    V, U = run.objective.facts.vocab_sizes
    head = output_head(student, V)
    if run.attention is not None:
        head = replace(head, gate=run.attention(head).gate(1.0))
    heads, models = [head], [student]
    if run.teacher.gives == "states":
        heads.append(output_head(teacher, U).frozen())
        models.append(teacher)
    embeddings = (model.get_input_embeddings().weight for model in models)
    return Pair((*heads,), (*embeddings,), torch.device("meta"))


def _teachers(tokens: Side, heads: tuple[OutputHead, ...], run: PlannedRun) -> View:
    """What the teacher says of its tokens."""
    M = len(tokens)
    if run.teacher.server is not None and run.teacher.gives == "logprobs":
        k, said = run.teacher.server.top_k, torch.empty(M, device="meta")
        ids = torch.empty((M, k), dtype=torch.long, device="meta")
        return View(tokens, logprobs=Logprobs(said, ids, ids.float()))
    head = heads[1]
    hidden, *embedded = (head.weight.new_empty((M, head.hidden_size)) for _ in range(3))
    embeddings = run.objective.needs.embeddings
    return View(tokens, head, hidden, (embedded[0], embedded[1]) if embeddings else None)


def _loss(student: Any, teacher: Any, hidden: Tensor, run: PlannedRun) -> Tensor:
    """From the student's states [B, L, d] to the loss, as the trainer computes it."""
    batch, objective = run.batch, run.objective
    N, M = batch.supervised, batch.teacher_supervised
    # Two answers that are compared are in one batch, however small it is.
    samples = max(batch.samples, 2) if objective.needs.contrast else batch.samples
    ours, theirs = _tokens(N, samples), _tokens(M, samples)
    heads = _pair(student, teacher, run).heads
    objective.follow(1, heads[0])
    embedded = None
    if objective.needs.embeddings:
        weight = student.get_input_embeddings().weight.detach()
        embedded = weight[ours.input_ids], weight[ours.labels]
    out = objective(
        View(
            ours,
            heads[0],
            hidden.flatten(0, 1)[torch.arange(N)],
            embedded,
            _written(objective, N, samples),
        ),
        View(theirs) if run.comparison else _teachers(theirs, heads, run),
        _matches(N, M),
    )
    return out.loss


def _evaluation(student: Any, teacher: Any, run: PlannedRun) -> int:
    """The most bytes that a batch takes where evaluations alone ask the teacher."""
    assert run.comparison is not None
    batch, heads = run.batch, _pair(student, teacher, run).heads
    N, both = batch.supervised, min(batch.supervised, batch.teacher_supervised)
    nothing = torch.zeros(N, dtype=torch.long, device="meta")
    starts = torch.zeros((both, 2), dtype=torch.long, device="meta")
    static = [t for m in (student, teacher) for t in (*m.parameters(), *m.buffers())]

    def compare() -> None:
        hidden = _student_step(student, run).flatten(0, 1)[:N]
        if run.layers_are_loaded:
            _teacher_step(teacher, run)
        ours = View(Side(nothing, nothing, nothing), heads[0], hidden)
        theirs = _teachers(_tokens(batch.teacher_supervised, batch.samples), heads, run)
        assert run.comparison is not None
        run.comparison(ours, theirs, starts)

    kind = attention(run.cfg.attn_implementation, padded=run.batch.padded)
    with (
        kind,
        simulation(static, run.autocast) as memory,
        torch.autocast("meta"),
        torch.no_grad(),
    ):
        before = memory.live
        _, peak = memory.peak_of(compare)
        return peak - before


def _started(student: Any, teacher: Any, run: PlannedRun) -> int:
    """Begin the objective; the most bytes that this takes, those that it keeps left out."""
    models: tuple[nn.Module, ...] = (student, teacher)
    static = [t for m in models for t in (*m.parameters(), *m.buffers())]
    pair = _pair(student, teacher, run)
    with simulation(static, run.autocast) as memory:
        _, peak = memory.peak_of(lambda: run.objective.begin(pair))
        return peak - memory.live


def _simulated(student: Any, teacher: Any, run: PlannedRun) -> dict[str, dict[str, int]]:
    """What each phase of a micro-step holds on top of weights and optimizer states."""
    beside = run.objective.module
    models: tuple[nn.Module, ...] = (student, teacher, *([] if beside is None else [beside]))
    static = [t for m in models for t in (*m.parameters(), *m.buffers())]
    phases: dict[str, dict[str, int]] = {}
    # The student's attention in backward too: checkpointed layers run again there.
    kind = attention(run.cfg.attn_implementation, padded=run.batch.padded)
    # Between the loss' products one kernel works in place, or small blocks of rows do.
    blocks = mock.patch.dict(elementwise._BLOCK, meta=elementwise._BLOCK["cpu"])
    with kind, blocks, simulation(static, run.autocast) as memory:
        for _ in range(2 if (run.cfg.gradient_accumulation_steps or 1) > 1 else 1):
            phases = _micro_step(student, teacher, run, memory)
    for model in models:
        model.zero_grad(set_to_none=True)
    return phases


def _micro_step(
    student: Any, teacher: Any, run: PlannedRun, memory: LiveBytes
) -> dict[str, dict[str, int]]:
    gradients = memory.live
    with torch.autocast("meta"):
        hidden, forward_peak = memory.peak_of(lambda: _student_step(student, run))
        kept = memory.live - gradients
        _, teacher_peak = memory.peak_of(
            lambda: _teacher_step(teacher, run) if run.layers_are_loaded else None
        )
        states = [hidden]
        del hidden
        loss, loss_peak = memory.peak_of(lambda: _loss(student, teacher, states.pop(), run))
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


def _kept_answers(teacher: Any, run: PlannedRun) -> int:
    """Bytes of what the teacher says of kept answers: states, or log-probabilities of labels and
    likeliest tokens."""
    if run.kept is None:
        return 0
    tokens, limit = run.kept
    if run.teacher.server is not None and run.teacher.gives == "logprobs":
        of_likeliest = run.teacher.server.top_k if run.objective.needs.of_teacher == "top" else 0
        width = 4 + (4 + 8) * of_likeliest
    else:
        head = output_head(teacher)
        width = head.hidden_size * head.weight.element_size()
    return min(limit, tokens * width)


def make_plan(student: Any, teacher: Any, run: PlannedRun) -> Plan:
    """The plan for one process with nothing sharded.

    Args:
        student, teacher: skeletons (`skeleton`).
        run: batch, configuration and objective.
    """
    start = _started(student, teacher, run)
    beside = run.objective.module
    trained_beside = [] if beside is None else list(beside.parameters())
    trained = trained_tensors(student)
    weights = model_bytes(trained)
    states, note = optimizer_bytes(run.optimizer, trained)
    mapped = model_bytes(trained_beside)
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
        "teacher layers": body if run.layers_are_loaded else 0,
        "teacher embedding and head": ends if run.teacher.gives == "states" else 0,
    }
    kept = _kept_answers(teacher, run)
    if kept and not run.on_gpu:
        held["kept answers"] = kept
    notes = [note] if note else []
    _checkpointing(student, run)
    phases = _simulated(student, teacher, run)
    phases["optimizer step"]["optimizer's temporaries"] = step_bytes(
        run.optimizer, [*trained, *trained_beside], on_gpu=run.on_gpu
    )
    if run.writing is not None:
        partner = teacher if run.mixes else None
        models = (student, teacher) if run.mixes else (student,)
        static = [t for m in models for t in (*m.parameters(), *m.buffers())]
        with attention(run.cfg.attn_implementation, padded=True):
            phases["writing"] = writing(student, static, run.writing, run.autocast, partner)
    if run.comparison is not None:
        del phases["teacher forward"]  # training asks nothing
        phases["evaluation"] = {"evaluation's own": _evaluation(student, teacher, run)}
    # Before the first step there are no optimizer states yet.
    start -= held["optimizer states"] + 2 * mapped
    if start > 0:
        phases["start of training"] = {"projectors' start": start}
    if run.on_gpu:
        held["CUDA context"] = CUDA_CONTEXT
        step = max(sum(parts.values()) for parts in phases.values())
        held["fragmentation"] = math.ceil(FRAGMENTATION * step)
    return Plan(held, phases, notes, kept if run.on_gpu else 0)
