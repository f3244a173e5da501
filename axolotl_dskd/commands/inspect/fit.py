"""Does it fit: the plan of a training against a card, and what to change where it does not.

Knows what each change costs; the counting itself is `planning`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import yaml

from axolotl_dskd.config import WritingConfig
from axolotl_dskd.models.heads import output_head
from axolotl_dskd.planning.plan import CUDA_CONTEXT, Plan, Step, make_plan
from axolotl_dskd.planning.run import Run
from axolotl_dskd.progress import quantity


def fit(student: Any, runs: Sequence[Run], teacher_tokens: float) -> Plan:
    """The plan, with what to change where it does not fit: changes, each on top of those before it
    and for as long as it saves, until it fits.

    A change that saves less than 1% of what the run itself holds is left out.

    Args:
        student: its skeleton.
        runs: with each of the teachers, first with the one whose keys may change.
        teacher_tokens: supervised ones of all rows of that one's.
    """
    whole = plan = make_plan(student, runs)
    steps: list[Step] = []
    useless: list[set[str]] = []
    while not plan.fits:
        proposals = _proposals(runs[0], plan, teacher_tokens)
        changes, cost = next((p for p in proposals if p[0].keys() not in useless), ({}, ""))
        if not changes:
            break
        changed = [run.changed(changes) for run in runs]
        smaller = make_plan(student, changed)
        saves = plan.total - smaller.total
        if saves < 0.01 * (plan.total - CUDA_CONTEXT):
            useless.append(set(changes))
            continue
        written = yaml.safe_dump(changes, default_flow_style=True, sort_keys=False, width=1000)
        steps.append(Step(written[1:-2], smaller.total, saves, cost))
        runs, plan = changed, smaller
    return replace(whole, steps=steps)


def _proposals(run: Run, plan: Plan, teacher_tokens: float) -> Iterator[tuple[dict[str, Any], str]]:
    """Changes that would take less memory and what they cost, those that change the result least
    first."""
    cfg, teacher, prefix = run.cfg, run.config.one_teacher, run.prefix
    samples = run.config.samples
    if plan.peak_phase.startswith("writing") and isinstance(samples, WritingConfig):
        half = samples.batch_tokens // 2
        if half >= samples.max_new_tokens:
            yield {"dskd.samples.batch_tokens": half}, "fewer answers at once, the same text"
    if not cfg.gradient_checkpointing:
        cost = "each step takes about a third longer, the result stays"
        yield {"gradient_checkpointing": True}, cost
    if teacher.layers_are_loaded:
        # States in 16 bits.
        size = quantity(2 * teacher_tokens * output_head(run.teacher).hidden_size, "bytes")
        yield (
            {prefix + "cache": {"path": "./outputs/teacher-cache"}},
            f"`axolotl-dskd cache write` first, about {size} on disk; steps run no teacher",
        )
    rows, accumulation = cfg.micro_batch_size or 1, cfg.gradient_accumulation_steps or 1
    if rows > 1:
        half = rows // 2
        more = -(-rows * accumulation // half)
        yield (
            {"micro_batch_size": half, "gradient_accumulation_steps": more},
            "slower where the GPU was not full, the result stays",
        )
    if "adam" in str(cfg.optimizer) and "8bit" not in str(cfg.optimizer):
        yield {"optimizer": "adamw_bnb_8bit"}, "the optimizer's states are rounded"
    if teacher.layers_are_loaded and not (teacher.load_in_4bit or teacher.adapter):
        changes = {prefix + "load_in_4bit": True}
        if teacher.load_in_8bit:
            changes[prefix + "load_in_8bit"] = False
        yield changes, "the teacher is rounded: `axolotl-dskd quantization` measures by how much"
    if (half := cfg.sequence_len // 2) >= 256:
        yield {"sequence_len": half}, "longer rows are dropped or cut (excess_length_strategy)"
