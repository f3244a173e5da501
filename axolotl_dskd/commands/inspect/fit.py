"""Does it fit: the plan of a configuration against a card, and what to change where it does not.

Knows configurations, sampled rows and skeletons; the counting itself is `memory`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import yaml
from axolotl.utils.dict import DictDefault

from axolotl_dskd.commands.inspect.card import Card
from axolotl_dskd.commands.inspect.report import MemoryReport, Step
from axolotl_dskd.commands.inspect.rows import supervised
from axolotl_dskd.commands.inspect.sample import Sample
from axolotl_dskd.config import DSKDConfig, StudentSamplesConfig
from axolotl_dskd.evaluation.agreement import TeacherAgreement
from axolotl_dskd.models.heads import output_head
from axolotl_dskd.objectives import Facts, Objective, build_objective, fine_tuning
from axolotl_dskd.output_head import OutputHead
from axolotl_dskd.planning.memory import CUDA_CONTEXT, make_plan
from axolotl_dskd.planning.plan import BatchShape, Plan, PlannedRun, of_all_teachers
from axolotl_dskd.planning.skeleton import teacher_skeleton
from axolotl_dskd.progress import quantity
from axolotl_dskd.virtual_attention import VirtualAttention


@dataclass(frozen=True)
class Setup:
    """What the plan of a configuration is made from.

    Attributes:
        config: with one teacher.
        samples, facts: of its rows.
        name: of the teacher, where there are several.
        others: the same run with each of the others, and their skeletons.
    """

    cfg: Any
    config: DSKDConfig
    card: Card
    samples: Sequence[Sample]
    facts: Facts
    name: str = ""
    others: Sequence[tuple[Setup, Any]] = ()

    @property
    def prefix(self) -> str:
        """How the YAML names the teacher's keys."""
        return f"dskd.teachers.{self.name}." if self.name else "dskd.teacher."

    def changed(self, changes: dict[str, Any]) -> Setup:
        """The same with other values of keys, named as in the YAML."""
        ours, prefix = self.config.one_teacher, self.prefix
        new = {k.removeprefix(prefix): v for k, v in changes.items() if k.startswith(prefix)}
        rest = {k: v for k, v in changes.items() if not k.startswith(prefix)}
        return replace(
            self,
            cfg=DictDefault({**self.cfg, **rest}),
            config=self.config.model_copy(update={"teacher": ours.model_copy(update=new)}),
            others=[(other.changed(rest), skeleton) for other, skeleton in self.others],
        )

    def objective(self) -> Objective[Any]:
        """As the trainer builds it."""
        if self.config.uses_teacher:
            return build_objective(self.config, self.facts, memory=self.card.memory, seed=0)
        return fine_tuning(self.config, self.facts, memory=self.card.memory)

    def plan(self, student: Any, teacher: Any) -> Plan:
        """The plan of these skeletons, beside those of the other teachers."""
        objective = self.objective()
        comparison = None
        if not self.config.uses_teacher:
            comparison = TeacherAgreement(self.facts.shared_ids, objective.setting.budget)
        batch, _ = batch_shape(self.cfg, self.samples)
        run = PlannedRun(
            self.cfg,
            self.config.one_teacher,
            batch,
            objective,
            self.card.gpu,
            self._attention(),
            writing_shape(self.cfg, self.config),
            comparison,
            kept_answers(self.config, self.samples),
            writes=self.config.samples.source == "student" and self.config.uses_teacher,
            mixes=self.config.mixes,
        )
        plan = make_plan(student, teacher, run)
        return of_all_teachers([plan, *(s.plan(student, other) for s, other in self.others)])

    def _attention(self) -> Callable[[OutputHead], VirtualAttention] | None:
        """What makes virtual attention for a skeleton's head, where it is configured."""
        keys, facts = self.config.virtual_attention, self.facts
        if keys is None:
            return None
        V, device = facts.vocab_sizes[0], torch.device("meta")
        return lambda head: VirtualAttention(keys, facts.student, V, head, device, 0)


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


def writing_shape(cfg: Any, config: DSKDConfig) -> tuple[int, int] | None:
    """Rows and tokens that the student writes at once, in this process; None: none.

    Answers are as long as they may be; of prompts there is no telling how short they are, and short
    ones make more rows.
    """
    samples = config.samples
    if not isinstance(samples, StudentSamplesConfig) or samples.engine != "transformers":
        return None
    length = min(samples.max_new_tokens, cfg.sequence_len)
    of_a_step = (cfg.micro_batch_size or 1) * (cfg.gradient_accumulation_steps or 1)
    rows = max(1, samples.batch_tokens // length)
    if not cfg.sample_packing:
        rows = min(rows, of_a_step)
    return rows, min(samples.batch_tokens // rows, cfg.sequence_len)


def kept_answers(config: DSKDConfig, samples: Sequence[Sample]) -> tuple[int, int] | None:
    """See `PlannedRun.kept`: all answers as long as they may be, and in the teacher's tokens as
    many times that as in the rows; with several teachers as if all were one's."""
    keys = config.samples
    if not isinstance(keys, StudentSamplesConfig) or not (keys.replay and keys.replay_memory):
        return None
    rows = [row for sample in samples for row in sample.rows]
    ours, theirs = (
        sum(len(supervised(row[side])) for row in rows) for side in ("labels", "teacher_labels")
    )
    tokens = math.ceil(keys.replay * keys.max_new_tokens * theirs / max(ours, 1))
    return tokens, int(keys.replay_memory)


def memory_report(setup: Setup, student: Any, teacher: Any) -> MemoryReport:
    """The plan against the card, with what to change where it does not fit.

    Args:
        student, teacher: skeletons on the meta device.
    """
    card = setup.card
    plan = setup.plan(student, teacher)
    held = sum(plan.held.values())
    notes = list(plan.notes)
    if (setup.config.one_teacher.device_map or "") not in ("", {"": 0}):
        notes.append("dskd.teacher.device_map is not followed: all of the teacher is counted here")
    if setup.others:
        notes.append("all teachers are counted; a batch is planned as if one of them had all of it")
    if plan.on_host:
        size = quantity(plan.on_host, "bytes")
        notes.append(
            f"beside the card, up to {size} of the host's memory hold what the teacher says of "
            "kept answers (dskd.samples.replay_memory bounds it)"
        )
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
    cfg, teacher, prefix = setup.cfg, setup.config.one_teacher, setup.prefix
    if not cfg.gradient_checkpointing:
        cost = "each step takes about a third longer, the result stays"
        yield {"gradient_checkpointing": True}, cost
    if teacher.layers_are_loaded:
        parts = (sample.coverage for sample in setup.samples)
        tokens = sum(part.teacher_tokens * part.total / max(1, part.sampled) for part in parts)
        size = quantity(2 * tokens * hidden_size, "bytes")  # states in 16 bits
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
        changed_teacher = teacher_skeleton(changed.config.one_teacher, setup.card.device)
        smaller = changed.plan(student, changed_teacher).total
        if total - smaller < 0.01 * (total - CUDA_CONTEXT):
            useless.append(set(changes))
            continue
        written = yaml.safe_dump(changes, default_flow_style=True, sort_keys=False, width=1000)
        yield Step(written[1:-2], smaller, total - smaller, cost)
        setup, teacher, total = changed, changed_teacher, smaller
