"""Does it fit: the plan of a configuration against a card, and what to change where it does not.

Knows configurations, sampled rows and skeletons; the counting itself is `memory`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from axolotl.utils.dict import DictDefault

from axolotl_dskd.commands.inspect.card import Card
from axolotl_dskd.commands.inspect.report import MemoryReport, Step
from axolotl_dskd.commands.inspect.rows import supervised
from axolotl_dskd.commands.inspect.sample import DatasetSample
from axolotl_dskd.config import DSKDConfig
from axolotl_dskd.objectives import Facts, build_objective
from axolotl_dskd.planning.memory import CUDA_CONTEXT, BatchShape, PlanSettings, make_plan
from axolotl_dskd.planning.skeleton import model_bytes, teacher_skeleton


@dataclass(frozen=True)
class Setup:
    """What the plan of a configuration is made from."""

    cfg: Any
    config: DSKDConfig
    card: Card
    samples: Sequence[DatasetSample]
    facts: Facts
    teacher_hidden_size: int

    def with_cfg(self, **changes: Any) -> Setup:
        """The same with other top-level values."""
        return replace(self, cfg=DictDefault({**self.cfg, **changes}))

    def with_teacher(self, **changes: Any) -> Setup:
        """The same with other values under dskd.teacher."""
        teacher = self.config.teacher.model_copy(update=changes)
        return replace(self, config=self.config.model_copy(update={"teacher": teacher}))


def batch_shape(cfg: Any, samples: Sequence[DatasetSample]) -> tuple[BatchShape, str]:
    """The largest batch of one micro-step, and in words what it was taken from."""
    rows = [row for sample in samples for row in sample.rows]
    lengths = [len(row["input_ids"]) for row in rows]
    trained = [len(supervised(row["labels"])) for row in rows]
    teacher_lengths = [len(row["teacher_input_ids"]) for row in rows]
    teacher_trained = [len(supervised(row["teacher_labels"])) for row in rows]
    count, limit = cfg.micro_batch_size or 1, cfg.sequence_len
    if cfg.sample_packing:
        tokens = count * limit
        share = tokens / sum(lengths)
        in_all = max(1, round(len(rows) * share))
        words = f"{count} packed row(s) of {limit} tokens, {in_all} samples in all"
        shape = BatchShape(
            rows=count,
            length=limit,
            samples=max(in_all, count),
            supervised=min(tokens, round(sum(trained) * share)),
            teacher_length=max(teacher_lengths),
            teacher_supervised=round(sum(teacher_trained) * share),
            padded=False,
        )
        return shape, words
    longest = max(lengths)
    whole = all(sample.sampled == sample.total for sample in samples)
    length = limit if cfg.pad_to_sequence_len or not whole else min(limit, -(-longest // 64) * 64)
    # Rows that were not seen may be as long as sequence_len allows.
    stretch = 1.0 if whole else limit / longest
    why = "the longest row" if whole else "sequence_len: the sample may miss the longest row"
    if cfg.pad_to_sequence_len:
        why = "sequence_len, to which rows are padded"
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


def plan_settings(setup: Setup) -> PlanSettings:
    """What the plan needs to know, from the configuration and the sampled rows."""
    cfg, config = setup.cfg, setup.config
    low = torch.bfloat16 if cfg.bf16 else torch.float16 if cfg.fp16 else None
    checkpointing = cfg.gradient_checkpointing
    kwargs = cfg.gradient_checkpointing_kwargs or {}
    return PlanSettings(
        batch=batch_shape(cfg, setup.samples)[0],
        optimizer=str(getattr(cfg.optimizer, "value", cfg.optimizer) or "adamw_torch_fused"),
        accumulate=(cfg.gradient_accumulation_steps or 1) > 1,
        gradient_checkpointing=bool(checkpointing),
        reentrant=bool(kwargs.get("use_reentrant", False)),
        attention=cfg.attn_implementation,
        teacher_attention=config.teacher.attn_implementation,
        autocast=low,
        teacher_cached=config.teacher.cache is not None,
        objective=build_objective(config, setup.facts, memory=setup.card.memory, seed=0),
        on_gpu=setup.card.gpu,
    )


def memory_report(setup: Setup, student: Any, teacher: Any) -> MemoryReport:
    """The plan against the card, with what to change where it does not fit.

    Args:
        student, teacher: skeletons on the meta device.
    """
    card = setup.card
    plan = make_plan(student, teacher, plan_settings(setup))
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
        # Without a GPU, dtype auto is float32.
        teacher_weights={
            f"{bits} bits": _teacher_bytes(setup, bits) for bits in (16 if card.gpu else 32, 8, 4)
        },
        notes=notes,
        steps=[] if fits else list(_ladder(setup, student, teacher, plan.total)),
    )


def _teacher_bytes(setup: Setup, bits: int) -> int:
    """Of the teacher's weights, were they loaded in so many bits."""
    load = {"load_in_4bit": bits == 4, "load_in_8bit": bits == 8, "dtype": "auto", "adapter": None}
    model = teacher_skeleton(setup.with_teacher(**load).config.teacher, setup.card.device)
    return model_bytes([*model.parameters(), *model.buffers()])


class Proposal(NamedTuple):
    """A change of the configuration: what to write, what it costs, and the setup with it."""

    change: str
    cost: str
    setup: Setup

    @property
    def key(self) -> str:
        """What is changed."""
        return self.change.partition(":")[0]


def _proposals(setup: Setup) -> Iterator[Proposal]:
    """Changes that would take less memory, those that change the result least first."""
    cfg, teacher = setup.cfg, setup.config.teacher
    if not cfg.gradient_checkpointing:
        yield Proposal(
            "gradient_checkpointing: true",
            "each step takes about a third longer, the result stays",
            setup.with_cfg(gradient_checkpointing=True),
        )
    if not teacher.cache:
        yield Proposal(
            "dskd.teacher.cache: {path: ./outputs/teacher-cache}, and `axolotl-dskd cache write` "
            "first",
            f"about {_cache_bytes(setup) / 1e9:.1f} GB on disk; later steps run no teacher",
            setup.with_teacher(cache={"path": "./outputs/teacher-cache"}),
        )
    size, accumulation = cfg.micro_batch_size or 1, cfg.gradient_accumulation_steps or 1
    if size > 1:
        sizes = {
            "micro_batch_size": size // 2,
            "gradient_accumulation_steps": -(-size * accumulation // (size // 2)),
        }
        yield Proposal(
            ", ".join(f"{key}: {value}" for key, value in sizes.items()),
            "slower where the GPU was not full, the result stays",
            setup.with_cfg(**sizes),
        )
    if "adam" in str(cfg.optimizer) and "8bit" not in str(cfg.optimizer):
        yield Proposal(
            "optimizer: adamw_bnb_8bit",
            "the optimizer's states are rounded",
            setup.with_cfg(optimizer="adamw_bnb_8bit"),
        )
    if not (teacher.load_in_4bit or teacher.adapter):
        yield Proposal(
            "dskd.teacher.load_in_4bit: true",
            "the teacher is rounded: `--probe 32` measures by how much",
            setup.with_teacher(load_in_4bit=True, load_in_8bit=False),
        )
    if (half := cfg.sequence_len // 2) >= 256:
        yield Proposal(
            f"sequence_len: {half}",
            "longer rows are dropped or cut (excess_length_strategy)",
            setup.with_cfg(sequence_len=half),
        )


def _cache_bytes(setup: Setup) -> float:
    """Of the teacher's states for all rows, in 16 bits."""
    tokens = (
        len(supervised(row["teacher_labels"])) * sample.total / max(1, sample.sampled)
        for sample in setup.samples
        for row in sample.rows
    )
    return 2 * sum(tokens) * setup.teacher_hidden_size


def _ladder(setup: Setup, student: Any, teacher: Any, total: int) -> Iterator[Step]:
    """Changes, each on top of those before it and for as long as it saves, until it fits.

    A change that saves less than 1% of what the run itself holds is left out.
    """
    useless: set[str] = set()
    while total > setup.card.memory:
        proposal = next((p for p in _proposals(setup) if p.key not in useless), None)
        if proposal is None:
            return
        changed = proposal.setup
        if proposal.key == "dskd.teacher.load_in_4bit":
            changed_teacher = teacher_skeleton(changed.config.teacher, setup.card.device)
        else:
            changed_teacher = teacher
        smaller = make_plan(student, changed_teacher, plan_settings(changed)).total
        if total - smaller < 0.01 * (total - CUDA_CONTEXT):
            useless.add(proposal.key)
            continue
        yield Step(proposal.change, smaller, total - smaller, proposal.cost)
        setup, teacher, total = changed, changed_teacher, smaller
