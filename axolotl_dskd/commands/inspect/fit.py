"""Does it fit: the plan of a configuration against a card, and what to change where it does not.

Knows configurations, sampled rows and skeletons; the counting itself is `memory`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from axolotl.utils.dict import DictDefault

from axolotl_dskd.commands.inspect.card import Card
from axolotl_dskd.commands.inspect.memory import CUDA_CONTEXT, BatchShape, PlanSettings, make_plan
from axolotl_dskd.commands.inspect.report import MemoryReport, Step
from axolotl_dskd.commands.inspect.sample import DatasetSample
from axolotl_dskd.commands.inspect.skeleton import model_bytes, teacher_skeleton
from axolotl_dskd.config import DSKDConfig, TeacherConfig
from axolotl_dskd.data.tokenizers import vocabulary_size
from axolotl_dskd.objectives.dual_space.settings import loss_settings
from axolotl_dskd.teacher.load import resolve_dtype
from axolotl_dskd.types import IGNORE_INDEX


@dataclass(frozen=True)
class Run:
    """What the plan of a configuration is made from."""

    cfg: Any
    config: DSKDConfig
    card: Card
    samples: Sequence[DatasetSample]
    alignment: str
    shared: int
    tokenizers: tuple[Any, Any]
    teacher_hidden_size: int

    def with_cfg(self, **changes: Any) -> Run:
        """The run with other top-level values."""
        return replace(self, cfg=DictDefault({**self.cfg, **changes}))

    def with_teacher(self, **changes: Any) -> Run:
        """The run with other values under dskd.teacher."""
        teacher = self.config.teacher.model_copy(update=changes)
        return replace(self, config=self.config.model_copy(update={"teacher": teacher}))


def supervised(labels: Sequence[int]) -> list[int]:
    """The labels that are trained on."""
    return [label for label in labels if label != IGNORE_INDEX]


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


def plan_settings(run: Run) -> PlanSettings:
    """What the plan needs to know of a run, from its configuration and sampled rows."""
    cfg, config = run.cfg, run.config
    vocab_sizes = vocabulary_size(run.tokenizers[0]), vocabulary_size(run.tokenizers[1])
    low = torch.bfloat16 if cfg.bf16 else torch.float16 if cfg.fp16 else None
    dtypes = low or cfg.torch_dtype, resolve_dtype(config.teacher.dtype, run.card.device)
    checkpointing = cfg.gradient_checkpointing
    kwargs = cfg.gradient_checkpointing_kwargs or {}
    batch, _ = batch_shape(cfg, run.samples)
    if run.alignment != "cma":
        batch = replace(batch, teacher_supervised=batch.supervised)
    return PlanSettings(
        batch=batch,
        optimizer=str(getattr(cfg.optimizer, "value", cfg.optimizer) or "adamw_torch_fused"),
        accumulate=(cfg.gradient_accumulation_steps or 1) > 1,
        gradient_checkpointing=bool(checkpointing),
        reentrant=bool(kwargs.get("use_reentrant", False)),
        attention=cfg.attn_implementation,
        teacher_attention=config.teacher.attn_implementation,
        autocast=low,
        alignment=run.alignment,
        teacher_cached=bool(getattr(config.teacher, "cache", None)),
        start=config.projector.init,
        shared_tokens=run.shared,
        loss=loss_settings(
            config,
            alignment=run.alignment,
            memory=run.card.memory,
            vocab_sizes=vocab_sizes,
            dtype=torch.promote_types(*dtypes),
        ),
        vocab_sizes=vocab_sizes,
        on_gpu=run.card.gpu,
    )


def memory_report(run: Run, student: Any, teacher: Any) -> MemoryReport:
    """The plan against the card, with what to change where it does not fit.

    Args:
        student, teacher: skeletons on the meta device.
    """
    plan = make_plan(student, teacher, plan_settings(run))
    _, batch = batch_shape(run.cfg, run.samples)
    held = sum(plan.held.values())
    notes = list(plan.notes)
    if (run.config.teacher.device_map or "") not in ("", {"": 0}):
        notes.append("dskd.teacher.device_map is not followed: all of the teacher is counted here")
    if run.card.gpu:
        notes.append("CUDA context and fragmentation (5% of a step) are allowances, not counts")
    report = MemoryReport(
        card=run.card.memory,
        card_name=run.card.name,
        total=plan.total,
        peak_phase=plan.peak_phase,
        at_peak=plan.at_peak,
        phases={name: held + sum(parts.values()) for name, parts in plan.phases.items()},
        batch=batch,
        teacher_weights=_teacher_weights(run),
        notes=notes,
    )
    if not report.fits:
        report.steps = list(_ladder(run, student, teacher, plan.total))
    return report


#: What to write, what it costs, and the run with it; None where it changes nothing.
Proposal = tuple[str, str, Run]
Change = Callable[[Run], Proposal | None]


def _checkpointing(run: Run) -> Proposal | None:
    if run.cfg.gradient_checkpointing:
        return None
    return (
        "gradient_checkpointing: true",
        "each step takes about a third longer, the result stays",
        run.with_cfg(gradient_checkpointing=True),
    )


def _teacher_4bit(run: Run) -> Proposal | None:
    teacher = run.config.teacher
    if teacher.load_in_4bit or teacher.adapter:
        return None
    return (
        "dskd.teacher.load_in_4bit: true",
        "the teacher is rounded: `--probe 32` measures by how much",
        run.with_teacher(load_in_4bit=True, load_in_8bit=False),
    )


def _cached_teacher(run: Run) -> Proposal | None:
    if "cache" not in TeacherConfig.model_fields or getattr(run.config.teacher, "cache", None):
        return None
    tokens = sum(
        len(supervised(row["teacher_labels"])) * sample.total / max(1, sample.sampled)
        for sample in run.samples
        for row in sample.rows
    )
    size = 2 * tokens * run.teacher_hidden_size / 1e9
    return (
        "dskd.teacher.cache: {path: ./outputs/teacher-cache}, and `axolotl-dskd cache write` first",
        f"about {size:.1f} GB on disk; later steps run no teacher",
        run.with_teacher(cache={"path": "./outputs/teacher-cache"}),
    )


def _small_optimizer(run: Run) -> Proposal | None:
    if "8bit" in str(run.cfg.optimizer) or "adam" not in str(run.cfg.optimizer):
        return None
    return (
        "optimizer: adamw_bnb_8bit",
        "the optimizer's states are rounded",
        run.with_cfg(optimizer="adamw_bnb_8bit"),
    )


def _smaller_batch(run: Run) -> Proposal | None:
    size, accumulation = run.cfg.micro_batch_size or 1, run.cfg.gradient_accumulation_steps or 1
    if size == 1:
        return None
    half = size // 2
    steps = -(-size * accumulation // half)
    return (
        f"micro_batch_size: {half}, gradient_accumulation_steps: {steps}",
        "slower where the GPU was not full, the result stays",
        run.with_cfg(micro_batch_size=half, gradient_accumulation_steps=steps),
    )


def _shorter_rows(run: Run) -> Proposal | None:
    half = run.cfg.sequence_len // 2
    if half < 256:
        return None
    return (
        f"sequence_len: {half}",
        "longer rows are dropped or cut (excess_length_strategy)",
        run.with_cfg(sequence_len=half),
    )


#: Those that change the result least first; each is repeated for as long as it saves.
CHANGES: tuple[Change, ...] = (
    _checkpointing,
    _cached_teacher,
    _smaller_batch,
    _small_optimizer,
    _teacher_4bit,
    _shorter_rows,
)


def _ladder(run: Run, student: Any, teacher: Any, total: int) -> Iterator[Step]:
    """Changes, each on top of those before it, until it fits or none is left.

    A change that saves less than 1% of what the run itself holds is left out.
    """
    for change in CHANGES:
        while proposal := change(run):
            words, cost, changed = proposal
            body = teacher
            if _quantization(changed.config.teacher) != _quantization(run.config.teacher):
                body = teacher_skeleton(changed.config.teacher, run.card.device)
            found = make_plan(student, body, plan_settings(changed)).total
            if total - found < 0.01 * (total - CUDA_CONTEXT):
                break
            yield Step(words, found, total - found, cost)
            run, teacher, total = changed, body, found
            if total <= run.card.memory:
                return


def _teacher_weights(run: Run) -> dict[str, int]:
    """Bytes of the teacher's weights in 16, 8 and 4 bits (32 where there is no GPU)."""
    found = {}
    for bits in (16 if run.card.gpu else 32, 8, 4):
        changed = run.with_teacher(
            load_in_4bit=bits == 4, load_in_8bit=bits == 8, dtype="auto", adapter=None
        )
        model = teacher_skeleton(changed.config.teacher, run.card.device)
        found[f"{bits} bits"] = model_bytes([*model.parameters(), *model.buffers()])
    return found


def _quantization(teacher: TeacherConfig) -> tuple[bool, bool]:
    return teacher.load_in_4bit, teacher.load_in_8bit
