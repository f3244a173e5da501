"""Does it fit: the plan of a configuration against a card, and what to change where it does not.

Knows configurations, sampled rows and skeletons; the counting itself is `memory`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml
from axolotl.utils.dict import DictDefault

from axolotl_dskd.commands.inspect.card import Card
from axolotl_dskd.commands.inspect.report import MemoryReport, Step
from axolotl_dskd.commands.inspect.rows import supervised
from axolotl_dskd.commands.inspect.sample import Sample
from axolotl_dskd.config import DSKDConfig
from axolotl_dskd.models.heads import output_head
from axolotl_dskd.objectives import Facts, build_objective
from axolotl_dskd.planning.memory import CUDA_CONTEXT, BatchShape, Plan, PlannedRun, make_plan
from axolotl_dskd.planning.skeleton import teacher_skeleton
from axolotl_dskd.progress import quantity

#: How the YAML names a teacher's key.
_TEACHER = "dskd.teacher."


@dataclass(frozen=True)
class Setup:
    """What the plan of a configuration is made from."""

    cfg: Any
    config: DSKDConfig
    card: Card
    samples: Sequence[Sample]
    facts: Facts

    def changed(self, changes: dict[str, Any]) -> Setup:
        """The same with other values of keys, named as in the YAML."""
        ours = {k.removeprefix(_TEACHER): v for k, v in changes.items() if k.startswith(_TEACHER)}
        others = {k: v for k, v in changes.items() if not k.startswith(_TEACHER)}
        teacher = self.config.teacher.model_copy(update=ours)
        config = self.config.model_copy(update={"teacher": teacher})
        return replace(self, cfg=DictDefault({**self.cfg, **others}), config=config)

    def plan(self, student: Any, teacher: Any) -> Plan:
        """The plan of these skeletons."""
        objective = build_objective(self.config, self.facts, memory=self.card.memory, seed=0)
        batch, _ = batch_shape(self.cfg, self.samples)
        run = PlannedRun(self.cfg, self.config.teacher, batch, objective, self.card.gpu)
        return make_plan(student, teacher, run)


def batch_shape(cfg: Any, samples: Sequence[Sample]) -> tuple[BatchShape, str]:
    """The largest batch of one micro-step, and in words what it was taken from."""
    rows = [row for sample in samples for row in sample.rows]
    lengths, teacher_lengths = (
        [len(row[side]) for row in rows] for side in ("input_ids", "teacher_input_ids")
    )
    trained, teacher_trained = (
        [len(supervised(row[side])) for row in rows] for side in ("labels", "teacher_labels")
    )
    count, limit = cfg.micro_batch_size or 1, cfg.sequence_len
    if cfg.sample_packing:
        share = count * limit / sum(lengths)
        in_all = max(1, round(len(rows) * share))
        shape = BatchShape(
            rows=count,
            length=limit,
            samples=max(in_all, count),
            supervised=min(count * limit, round(sum(trained) * share)),
            teacher_length=max(teacher_lengths),
            teacher_supervised=round(sum(teacher_trained) * share),
            padded=False,
        )
        return shape, f"{count} packed row(s) of {limit} tokens, {in_all} samples in all"
    longest = max(lengths)
    # Rows that were not seen may be as long as sequence_len allows.
    whole = all(sample.coverage.sampled == sample.coverage.total for sample in samples)
    stretch = 1.0 if whole else limit / longest
    if cfg.pad_to_sequence_len:
        length, why = limit, "sequence_len, to which rows are padded"
    elif whole:
        length, why = min(limit, -(-longest // 64) * 64), "the longest row"
    else:
        length, why = limit, "sequence_len: the sample may miss the longest row"
    shape = BatchShape(
        rows=count,
        length=length,
        samples=count,
        supervised=min(count * length, round(count * max(trained) * stretch)),
        teacher_length=round(max(teacher_lengths) * stretch),
        teacher_supervised=round(count * max(teacher_trained) * stretch),
        padded=count > 1 or bool(cfg.pad_to_sequence_len),
    )
    return shape, f"{count} row(s) of {length} tokens ({why})"


def memory_report(setup: Setup, student: Any, teacher: Any) -> MemoryReport:
    """The plan against the card, with what to change where it does not fit.

    Args:
        student, teacher: skeletons on the meta device.
    """
    card = setup.card
    plan = setup.plan(student, teacher)
    held = sum(plan.held.values())
    notes = list(plan.notes)
    if (setup.config.teacher.device_map or "") not in ("", {"": 0}):
        notes.append("dskd.teacher.device_map is not followed: all of the teacher is counted here")
    if card.gpu:
        notes.append("CUDA context and fragmentation (5% of a step) are allowances, not counts")
    fits = plan.total <= card.memory
    return MemoryReport(
        card=card.memory,
        card_name=card.name,
        total=plan.total,
        peak_phase=plan.peak_phase,
        at_peak=plan.at_peak,
        phases={name: held + sum(parts.values()) for name, parts in plan.phases.items()},
        batch=batch_shape(setup.cfg, setup.samples)[1],
        notes=notes,
        steps=[] if fits else list(_ladder(setup, student, teacher, plan.total)),
    )


def _proposals(setup: Setup, hidden_size: int) -> Iterator[tuple[dict[str, Any], str]]:
    """Changes that would take less memory and what they cost, those that change the result least
    first."""
    cfg, teacher = setup.cfg, setup.config.teacher
    if not cfg.gradient_checkpointing:
        cost = "each step takes about a third longer, the result stays"
        yield {"gradient_checkpointing": True}, cost
    if teacher.layers_are_loaded:
        parts = (sample.coverage for sample in setup.samples)
        tokens = sum(part.teacher_tokens * part.total / max(1, part.sampled) for part in parts)
        size = quantity(2 * tokens * hidden_size, "bytes")  # states in 16 bits
        yield (
            {_TEACHER + "cache": {"path": "./outputs/teacher-cache"}},
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
        changes = {_TEACHER + "load_in_4bit": True}
        if teacher.load_in_8bit:
            changes[_TEACHER + "load_in_8bit"] = False
        yield changes, "the teacher is rounded: `--probe 32` measures by how much"
    if (half := cfg.sequence_len // 2) >= 256:
        yield {"sequence_len": half}, "longer rows are dropped or cut (excess_length_strategy)"


def _ladder(setup: Setup, student: Any, teacher: Any, total: int) -> Iterator[Step]:
    """Changes, each on top of those before it and for as long as it saves, until it fits.

    A change that saves less than 1% of what the run itself holds is left out.
    """
    useless: list[set[str]] = []
    hidden_size = output_head(teacher).hidden_size
    while total > setup.card.memory:
        useful = (p for p in _proposals(setup, hidden_size) if p[0].keys() not in useless)
        changes, cost = next(useful, (None, ""))
        if changes is None:
            return
        changed = setup.changed(changes)
        changed_teacher = teacher_skeleton(changed.config.teacher, setup.card.device)
        smaller = changed.plan(student, changed_teacher).total
        if total - smaller < 0.01 * (total - CUDA_CONTEXT):
            useless.append(set(changes))
            continue
        written = yaml.safe_dump(changes, default_flow_style=True, sort_keys=False, width=1000)
        yield Step(written[1:-2], smaller, total - smaller, cost)
        setup, teacher, total = changed, changed_teacher, smaller
