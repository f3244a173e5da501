"""Axolotl's trainer with the dual-space loss: joins batch, teacher, alignment, loss and metrics."""

from __future__ import annotations

import os
from collections import defaultdict
from typing import Any, ClassVar

import torch
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.utils.logging import get_logger
from torch import Tensor, nn

from axolotl_dskd.config import DSKDConfig
from axolotl_dskd.data import (
    DualCollator,
    exact_share,
    load_teacher_tokenizer,
    needed_columns,
    resolve_alignment,
    shared_tokens,
    translation,
    vocabulary_size,
)
from axolotl_dskd.models.heads import captured_head_input, single
from axolotl_dskd.models.student import Student
from axolotl_dskd.objectives.dual_space.exchange import Exchange
from axolotl_dskd.objectives.dual_space.loss import LossSettings, dual_space_loss
from axolotl_dskd.objectives.dual_space.projectors import Projectors
from axolotl_dskd.objectives.dual_space.settings import loss_settings
from axolotl_dskd.objectives.dual_space.start import (
    HeadFollower,
    SharedIds,
    StartReport,
    start_projectors,
)
from axolotl_dskd.output_head import OutputHead
from axolotl_dskd.ranks import raise_together, sum_over_ranks, world_size
from axolotl_dskd.teacher import (
    CachedTeacher,
    CacheRun,
    LiveTeacher,
    is_to_be_sharded,
    load_sharded_teacher,
    load_teacher,
    open_cached_teacher,
)
from axolotl_dskd.training.callbacks import KeepTeacherCache, StepProjectors
from axolotl_dskd.training.metrics import MetricSums
from axolotl_dskd.training.sidecar import ProjectorOptimizer, check_checkpoint
from axolotl_dskd.types import DualBatch, LossOutput, Side

LOG = get_logger(__name__)


class DSKDTrainer(AxolotlTrainer):
    """Trains the student with the dual-space loss.

    The teacher is loaded when training starts, so that a trainer which only evaluates (`axolotl
    evaluate`) never holds it and reports the student's plain cross-entropy.
    """

    dskd: ClassVar[DSKDConfig]
    #: exp(loss) is no perplexity where the loss is not a cross-entropy.
    reports_token_perplexity = False

    @classmethod
    def for_config(cls, config: DSKDConfig) -> type[DSKDTrainer]:
        """The class for one run: Axolotl wants a class, and builds it without our config."""
        return type(cls.__name__, (cls,), {"dskd": config, "__module__": cls.__module__})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        student, teacher = kwargs["processing_class"], load_teacher_tokenizer(self.dskd)
        self.alignment, why = resolve_alignment(
            self.dskd, student, teacher, exact_share(kwargs.get("train_dataset"))
        )
        LOG.info(f"Alignment of student and teacher tokens: {why}")
        student_vocab_size = vocabulary_size(student)
        self.teacher_vocab_size = vocabulary_size(teacher)
        self._collators = []
        for key in ("data_collator", "eval_data_collator"):
            if kwargs.get(key) is not None:
                kwargs[key] = DualCollator(
                    kwargs[key],
                    padding_side=student.padding_side,
                    teacher_pad_id=teacher.pad_token_id or 0,
                )
                self._collators.append(kwargs[key])
        super().__init__(*args, **kwargs)
        # Hugging Face's own hook for a loss of sums: no division by accumulation steps, no labels
        # for the model (so no patched forward computes a loss of its own).
        self.compute_loss_func = self._dual_space_loss
        self.student = Student(self, student_vocab_size)
        self.teacher: LiveTeacher | CachedTeacher | None = None
        self.projectors: Projectors | None = None
        self.projector_optimizer: ProjectorOptimizer | None = None
        self.head_follower: HeadFollower | None = None
        self.exchange: Exchange | None = None
        self._sums: dict[str, MetricSums] = defaultdict(MetricSums)
        self._batch: DualBatch | None = None
        self._at_head: list[LossOutput] = []
        self._problem: str | None = None
        self._followed_step = 0
        #: What DeepSpeed multiplies losses by before backward (float16), at the current step.
        self.loss_scale = 1.0

    # ---- set-up ------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Load the teacher, build the projectors, then train as Axolotl does."""
        checkpoint = kwargs.get("resume_from_checkpoint", args[0] if args else None)
        if isinstance(checkpoint, str):  # before a teacher is loaded for nothing
            check_checkpoint(checkpoint)
        if self.teacher is None:
            self._set_up_distillation()
        return super().train(*args, **kwargs)

    def _set_up_distillation(self) -> None:
        device = self.accelerator.device
        if self.is_deepspeed_enabled and self.dskd.projector.warmup_steps:
            # Not in the file that was validated, but in one of accelerate's.
            raise ValueError(
                "dskd.projector.warmup_steps does not work under DeepSpeed, which updates the "
                "student within its backward. Remove it."
            )
        self.student.check(training_has_begun=False)
        self.teacher = self._open_teacher(device)
        self._build_projectors(self.teacher, device)
        self.add_callback(StepProjectors(self))

    def begin(self) -> None:
        """Training begins, maybe again (auto_find_batch_size)."""
        self._sums.clear()
        self._problem = None
        self.student.check(training_has_begun=True)

    def _build_projectors(self, teacher: LiveTeacher | CachedTeacher, device: torch.device) -> None:
        tokenizers = self.processing_class, load_teacher_tokenizer(self.dskd)
        ids = SharedIds(*(torch.tensor(side, device=device) for side in shared_tokens(*tokenizers)))
        attends = self.alignment == "cma"
        with self.student.gathered() as (head, embedding):
            self.student.check_sizes(head, embedding, compares_embeddings=attends)
            sizes = head.hidden_size, teacher.head.hidden_size
            self.projectors = Projectors(*sizes, with_query=attends, seed=self.args.seed).to(device)
            started = start_projectors(
                self.projectors,
                self.dskd.projector.init,
                ids,
                (head, teacher.head),
                (embedding, teacher.embedding.weight),
            )
        self.projector_optimizer = ProjectorOptimizer(
            self.projectors,
            learning_rate=self.dskd.projector.learning_rate,
            weight_decay=self.dskd.projector.weight_decay,
            max_grad_norm=self.args.max_grad_norm,
        )
        if started and head.trainable:
            self.head_follower = HeadFollower(self.projectors, ids, teacher.head)
        table = translation(tokenizers[1], tokenizers[0]) if self.alignment == "eta" else []
        self.exchange = Exchange(
            alignment=self.alignment,
            projectors=self.projectors,
            teacher_head=teacher.head,
            causal=self.dskd.causal,
            translation=torch.tensor(table, dtype=torch.long, device=device),
            start_report=StartReport(ids) if len(ids) else None,
        )

    def _open_teacher(self, device: torch.device) -> LiveTeacher | CachedTeacher:
        """The live teacher or, where a cache is configured, one that reads it."""
        config = self.dskd.teacher
        if config.cache is None:
            sharded = is_to_be_sharded(config, student_is_sharded=self.student.is_sharded)
            model = (load_sharded_teacher if sharded else load_teacher)(config, device)
            return LiveTeacher(model, self.teacher_vocab_size, device)
        with self.accelerator.local_main_process_first():  # the others find the weights hashed
            teacher = open_cached_teacher(config, self.teacher_vocab_size, device)
        evaluation = self.eval_dataset
        datasets = [self.train_dataset]
        datasets += list(evaluation.values()) if isinstance(evaluation, dict) else [evaluation]
        run = CacheRun(
            teacher,
            [dataset for dataset in datasets if dataset is not None],
            device,
            rank=self.args.process_index,
            gather=lambda number: self.accelerator.gather(
                torch.tensor([number], device=device)
            ).tolist(),
            stop_together=lambda problem: raise_together(problem, device),
        )
        run.start()
        for collator in self._collators:
            collator.read_cached = run.reader().read_samples
        self.add_callback(KeepTeacherCache(run))
        return teacher

    @property
    def projectors_warm_up(self) -> bool:
        """Whether the projectors train alone at this step."""
        return self.state.global_step < self.dskd.projector.warmup_steps

    def _loss_settings(self, dtype: torch.dtype) -> LossSettings:
        if self.teacher is not None:
            dtype = torch.promote_types(dtype, self.teacher.head.weight.dtype)
        return loss_settings(
            self.dskd,
            alignment=self.alignment,
            memory=_total_memory(self.accelerator.device),
            vocab_sizes=(self.student.vocab_size, self.teacher_vocab_size),
            dtype=dtype,
            with_teacher=self.teacher is not None,
        )

    def _set_signature_columns_if_needed(self) -> None:
        first = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if first:
            self._signature_columns += needed_columns(spans=self.dskd.causal)

    # ---- the loss ----------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """Supervised tokens of the global batch over the number of ranks.

        Ranks average their gradients, so dividing each rank's sum by this gives the global mean.
        """
        if not batch_samples:
            return None
        masks = (
            DualBatch.pop_from(dict(batch)).student_mask().sum().to(device)
            for batch in batch_samples
        )
        count = sum_over_ranks(torch.stack(list(masks)).sum().double()) / world_size()
        return count.clamp_min(1.0 / world_size())

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """The student's forward without logits, then the dual-space loss of the batch."""
        self._batch = DualBatch.pop_from(inputs)
        try:
            with captured_head_input(self.model, self._loss_at_head) as self._at_head:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self._batch, self._at_head = None, []

    def _dual_space_loss(
        self, outputs: Any, _labels: Tensor, num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        out = single(self._at_head, self.model)
        # Once a step, where the ranks meet anyway; and before the student is touched.
        if self.accelerator.sync_gradients or not self.model.training:
            raise_together(self._problem, self.accelerator.device)
        self._sums["train" if self.model.training else "eval"].add(out)
        self.loss_scale = self.student.loss_scale
        count = max(out.student_tokens, 1) if num_items_in_batch is None else num_items_in_batch
        loss = out.loss / torch.as_tensor(count, device=out.loss.device).to(out.loss.dtype)
        # Through the outputs, which reach every parameter and where sharded backwards begin.
        return loss + (0.0 * outputs["logits"].float()).sum()

    def _loss_at_head(self, hidden_BLd: Tensor) -> LossOutput:
        """The sums over this rank's batch, computed inside the forward of the student's head."""
        batch = self._batch
        assert batch is not None
        mask_BL = batch.student_mask()
        student = batch.student_side(mask_BL)
        head = self.student.head()
        self._follow(head)  # on every rank, also on one without supervised tokens
        if len(student) == 0:
            if isinstance(self.teacher, LiveTeacher) and self.teacher.is_sharded:
                self.teacher(batch)  # the other ranks wait for this one's shards
            # Nor without its part in gathering what is sharded, forward and backward.
            if self.teacher is not None and self.alignment == "cma":
                self.student.embed(student)
            loss = (0.0 * hidden_BLd.float()).sum()
            for tensor in head.tensors():
                if tensor is not None and tensor.requires_grad:
                    loss = loss + (0.0 * tensor.flatten()[:1].float()).sum()
            return LossOutput(loss)
        hidden_Nd = hidden_BLd[mask_BL]
        settings = self._loss_settings(hidden_Nd.dtype)
        call: dict[str, Any] = {
            "student_hidden": hidden_Nd,
            "student_labels": student.labels,
            "student_head": head,
            "settings": settings,
        }
        exchanged = None
        if self.teacher is not None:
            signal = self.teacher(batch)
            assert self.exchange is not None
            embedded = self.student.embed(student) if self.alignment == "cma" else None
            exchanged = self.exchange(
                batch, hidden_Nd, student, embedded, signal, settings.chunk_tokens
            )
            call |= exchanged.loss_arguments(settings, self.teacher.head)
            if self.model.training:
                states = hidden_Nd, signal.hidden
                heads = head, self.teacher.head
                self.exchange.report(exchanged, states, heads, self.state.global_step)
        out = dual_space_loss(**call)
        if exchanged is not None and exchanged.aligned.student_mask is not None:
            out.terms["aligned"] = exchanged.aligned.student_mask.float()
        teacher_tokens = None if exchanged is None else exchanged.teacher_tokens
        self._problem = self._problem or self._not_finite(out, batch, student, teacher_tokens)
        return out

    def _follow(self, head: OutputHead) -> None:
        """Let s2t follow the head, once in a step and where it is whole."""
        step = self.state.global_step
        if self.head_follower is None or step == self._followed_step or self.projectors_warm_up:
            return
        self._followed_step = step
        self.head_follower.follow(head)

    def _not_finite(
        self, out: LossOutput, batch: DualBatch, student: Side, teacher: Side | None
    ) -> str | None:
        """The term, the step and the rows of a loss that is NaN or infinite, in words."""
        if torch.isfinite(out.loss):
            return None
        found = []
        for name, tokens in out.nonfinite():
            side = teacher if teacher is not None and name.startswith("teacher_") else student
            samples = sorted(set(side.sample_ids[tokens].tolist()))
            rows = [
                repr(self.processing_class.decode(batch.input_ids[batch.segment_ids == s])[:120])
                for s in samples[:3]
            ]
            found.append(
                f"dskd/{name} on {len(tokens)} tokens of {len(samples)} rows, first: {rows}"
            )
        return (
            f"the loss is not finite at step {self.state.global_step + 1}: {'; '.join(found)}. "
            "Usual causes: a learning rate too high, float16 (use bf16), a damaged teacher."
        )

    # ---- metrics -----------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means since the last log to training logs."""
        if "loss" in logs:
            logs |= self._sums.pop("train", MetricSums()).means(self.accelerator.device)
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Add the means over the evaluation set to its metrics."""
        self._sums.pop("eval", None)
        if self.teacher is None:
            LOG.info("No teacher is loaded: the loss is the student's cross-entropy")
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        means = self._sums.pop("eval", MetricSums()).means(self.accelerator.device)
        output.metrics.update({f"{prefix}_{name}": value for name, value in means.items()})
        return output

    # ---- checkpoints -------------------------------------------------------------------------

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.projector_optimizer is not None and self.args.should_save:
            self.projector_optimizer.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.projector_optimizer is not None:
            self.projector_optimizer.load(checkpoint)


def _total_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
