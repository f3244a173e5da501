"""The memory plan: what one training process holds at its fullest moment, against a card.

Weights, gradients and optimizer states are counted parameter by parameter on skeletons; what a
step adds is found by running the step's own code (student, teacher, alignment, loss, backward) on
meta tensors. Knows models and settings; nothing of rows or reports.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from axolotl_dskd.config import StudentSamplesConfig
from axolotl_dskd.models.heads import head_module, output_head
from axolotl_dskd.planning.optimizers import optimizer_bytes, step_bytes
from axolotl_dskd.planning.plan import Plan
from axolotl_dskd.planning.run import Run
from axolotl_dskd.planning.simulate import LiveBytes, attend, backward, simulation
from axolotl_dskd.planning.skeleton import model_bytes, tensors_of, trained_tensors
from axolotl_dskd.planning.step import TrainingStep

GIB = 1 << 30

#: The CUDA context with its kernels and cuBLAS' workspaces, per process.
CUDA_CONTEXT = int(0.6 * GIB)
#: Of what a step allocates and frees, the share that PyTorch's allocator keeps on top in pieces.
FRAGMENTATION = 0.05
#: Of each row and id that is written: logits and log-probabilities in float32, probabilities and
#: sums in float64. Where two models draw, of each the first three, and the sums of both together.
_DRAWING, _DRAWING_TOGETHER = 4 + 4 + 8 + 8, 2 * (4 + 4 + 8) + 8


def make_plan(student: Any, run: Run) -> Plan:
    """The plan for one process with nothing sharded, and with this teacher alone.

    Args:
        student: its skeleton.
        run: configuration, rows and teacher.
    """
    step, keys, on_gpu = TrainingStep(student, run), run.config.one_teacher, run.card.gpu
    pair = step.pair
    with step.watched() as memory:
        _, start = memory.peak_of(lambda: step.objective.begin(pair))
        start -= memory.live  # what stays is held
    beside = step.objective.module
    trained_beside = [] if beside is None else list(beside.parameters())
    trained = trained_tensors(student)
    weights, mapped = model_bytes(trained), model_bytes(trained_beside)
    frozen = model_bytes(tensors_of(student)) - weights
    states, note = optimizer_bytes(run.optimizer, trained)
    ends = (head_module(run.teacher), run.teacher.get_input_embeddings())
    ends_bytes = model_bytes(p for end in ends for p in end.parameters())
    body = model_bytes(tensors_of(run.teacher)) - ends_bytes
    adapted = frozen > 0 and any(
        "lora_" in name for name, p in student.named_parameters() if p.requires_grad
    )
    held = {
        "student weights": frozen + (0 if adapted else weights),
        "adapters": weights if adapted else 0,
        "optimizer states": states,
        "projectors with their optimizer": 3 * mapped,
        "teacher layers": body if run.layers_are_loaded else 0,
        "teacher embedding and head": ends_bytes if keys.gives == "states" else 0,
    }
    kept, notes = _kept_answers(step), [note] if note else []
    if kept and not on_gpu:
        held["kept answers"] = kept
    phases = _micro_steps(step)
    phases["optimizer step"]["optimizer's temporaries"] = step_bytes(
        run.optimizer, [*trained, *trained_beside], on_gpu=on_gpu
    )
    if not run.config.uses_teacher:
        del phases["teacher forward"]  # training asks nothing
        with step.watched() as memory, torch.autocast("meta"):
            phases["evaluation"] = {"evaluation's own": memory.peak_of(step.compare)[1]}
    if run.writing is not None:
        attend(student, run.cfg.attn_implementation, padded=True)
        partner = run.teacher if run.config.mixes else None
        phases["writing"] = writing(student, run.writing, run.autocast, partner)
    # Before the first step there are no optimizer states yet.
    start -= states + 2 * mapped
    if start > 0:
        phases["start of training"] = {"projectors' start": start}
    if (keys.device_map or "") not in ("", {"": 0}):
        notes.append("dskd.teacher.device_map is not followed: all of the teacher is counted here")
    if on_gpu:
        held["CUDA context"] = CUDA_CONTEXT
        largest = max(sum(parts.values()) for parts in phases.values())
        held["fragmentation"] = math.ceil(FRAGMENTATION * largest)
        notes.append("CUDA context and fragmentation (5% of a step) are allowances, not counts")
    on_host = kept if on_gpu else 0
    return Plan(run.card.memory, run.card.name, run.batch.words, held, phases, on_host, notes)


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


def _micro_steps(step: TrainingStep) -> dict[str, dict[str, int]]:
    """What each phase of a micro-step holds on top of weights and optimizer states: of the second
    one where there are several, which begins with gradients."""
    phases: dict[str, dict[str, int]] = {}
    with step.watched() as memory:
        for _ in range(min(2, step.run.cfg.gradient_accumulation_steps or 1)):
            phases = _micro_step(step, memory)
    for model in step.models:
        model.zero_grad(set_to_none=True)
    return phases


def _micro_step(step: TrainingStep, memory: LiveBytes) -> dict[str, dict[str, int]]:
    gradients = memory.live
    with torch.autocast("meta"):
        hidden, reading = memory.peak_of(step.read)
        kept = memory.live - gradients
        _, asking = memory.peak_of(step.ask)
        states = [hidden]
        del hidden
        loss, comparing = memory.peak_of(lambda: step.loss(states.pop()))
        waiting = memory.live - gradients - kept
        _, going_back = memory.peak_of(partial(backward, loss))
    del loss
    held = {"gradients": gradients, "student activations": kept}
    # In backward, gradients grow while activations go: what is there before, and the rest.
    return {
        "student forward": {**held, "student layer": reading - kept},
        "teacher forward": {**held, "teacher activations": asking},
        "alignment and loss": {**held, "alignment and loss": comparing},
        "backward": {**held, "alignment and loss": waiting, "backward's own": going_back},
        "optimizer step": {"gradients": memory.live},
    }


def writing(
    student: Any, shape: tuple[int, int], autocast: torch.dtype | None, partner: Any = None
) -> dict[str, int]:
    """Bytes on top of weights at the fullest moment of writing answers, by name.

    As if prompts were as long as with their answers: then the cache of keys and values is full, and
    one forward reads all.

    Args:
        student: its skeleton, in eval mode or not.
        shape: rows and tokens that are written at once.
        autocast: dtype of mixed precision, if any.
        partner: a teacher's that takes part in drawing, in eval mode; it reads after the student.
    """
    training = student.training
    student.eval()  # gradient checkpointing keeps no cache
    models = [student] if partner is None else [student, partner]
    try:
        with simulation(tensors_of(*models), autocast) as memory, torch.no_grad():
            with torch.autocast("meta"):
                cache, own, logits, kept = _read(student, shape, memory)
            drawing, beside = logits * _DRAWING, 0
            if partner is not None:  # its dtype is its own, not that of the student's autocast
                beside, of_partner, _, both = _read(partner, shape, memory)
                drawing = max(logits * _DRAWING_TOGETHER, of_partner)
                own -= beside  # which is not there yet when the student reads
                del both
            del kept
    finally:
        student.train(training)
    found = {"KV cache": cache, "teacher's KV cache": beside, "writing's own": max(own, drawing)}
    return {name: size for name, size in found.items() if size}


def _read(model: Any, shape: tuple[int, int], memory: LiveBytes) -> tuple[int, int, int, Any]:
    """Bytes of the cache that a forward leaves and most beside them, rows times ids of its last
    logits, and the cache."""
    ids = torch.zeros(shape, dtype=torch.long, device="meta")
    before = memory.live
    read = partial(model, input_ids=ids, use_cache=True, logits_to_keep=1)
    out, reading = memory.peak_of(read)
    logits, kept = out.logits.numel(), out.past_key_values
    del out
    cache = memory.live - before
    return cache, reading - cache, logits, kept
