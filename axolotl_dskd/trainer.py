"""Axolotl's trainer with the dual-space loss: joins batch, teacher, alignment, loss and metrics."""

from __future__ import annotations

import os
from collections import defaultdict
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.utils.logging import get_logger
from torch import Tensor, nn
from transformers import TrainerCallback

from axolotl_dskd.config import DSKDConfig
from axolotl_dskd.data import (
    COLUMNS,
    DualCollator,
    exact_share,
    load_teacher_tokenizer,
    resolve_alignment,
    shared_tokens,
    translation,
    vocabulary_size,
)
from axolotl_dskd.exchange import Exchange
from axolotl_dskd.heads import captured_head_input, check_output_head, output_head, single
from axolotl_dskd.losses import LossSettings, auto_chunk_tokens, dual_space_loss, make_divergence
from axolotl_dskd.metrics import MetricSums
from axolotl_dskd.projector_start import HeadFollower, SharedIds, StartReport, shared_rows
from axolotl_dskd.projectors import ProjectorOptimizer, Projectors, start_from_shared_tokens
from axolotl_dskd.teacher import (
    CachedTeacher,
    CacheRun,
    LiveTeacher,
    load_teacher,
    open_cached_teacher,
)
from axolotl_dskd.types import DualBatch, LossOutput, OutputHead, Side

LOG = get_logger(__name__)


class _StepProjectors(TrainerCallback):
    """Updates the projectors together with the student."""

    def __init__(self, trainer: DSKDTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Training may begin again after running out of memory (auto_find_batch_size)."""
        assert self.trainer.projector_optimizer is not None
        self.trainer.projector_optimizer.adamw.zero_grad(set_to_none=True)
        self.trainer._sums.clear()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """After backward of the last micro-batch, before the student's optimizer steps."""
        assert self.trainer.projector_optimizer is not None
        warming_up = self.trainer.projectors_warm_up
        if warming_up:  # an optimizer leaves parameters without gradient as they are
            for parameter in self.trainer.model.parameters():
                parameter.grad = None
        group = self.trainer.optimizer.param_groups[0]
        # A scheduler that notes no initial rate (reduce_lr_on_plateau) starts from the configured.
        initial = group.get("initial_lr") or self.trainer.args.learning_rate
        scaler = self.trainer.accelerator.scaler
        self.trainer.projector_optimizer.step(
            schedule_factor=float(group["lr"] / initial) if initial and not warming_up else 1.0,
            loss_scale=scaler.get_scale() if scaler is not None else 1.0,
        )

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """After the student's optimizer has stepped."""
        if self.trainer.head_follower is not None and not self.trainer.projectors_warm_up:
            self.trainer.head_follower.follow(self.trainer.student_head())


class _KeepTeacherCache(TrainerCallback):
    """Writes what the epoch has computed, and frees the teacher once everything is cached."""

    def __init__(self, run: CacheRun) -> None:
        self.run = run

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After the last step of an epoch, before the next one's data workers start."""
        self.run.end_epoch(more=state.global_step < state.max_steps)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Also where training stops within an epoch."""
        self.run.teacher.store.flush()


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
        self.student_vocab_size = vocabulary_size(student)
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
        self.teacher: LiveTeacher | CachedTeacher | None = None
        self.projectors: Projectors | None = None
        self.projector_optimizer: ProjectorOptimizer | None = None
        self.head_follower: HeadFollower | None = None
        self.exchange: Exchange | None = None
        self._sums: dict[str, MetricSums] = defaultdict(MetricSums)
        self._batch: DualBatch | None = None
        self._captured: list[Tensor] = []

    # ---- set-up ------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Load the teacher, build the projectors, then train as Axolotl does."""
        if self.teacher is None:
            self._set_up_distillation()
        return super().train(*args, **kwargs)

    def _set_up_distillation(self) -> None:
        device = self.accelerator.device
        placed = set((getattr(self.model, "hf_device_map", None) or {"": device}).values())
        if len(placed) > 1:
            raise ValueError(
                f"the student is spread over {sorted(map(str, placed))} by device_map, which is "
                "not supported. Start one process per GPU, or use one GPU."
            )
        if self.dskd.projector.warmup_steps and self.is_deepspeed_enabled:
            raise ValueError(
                "dskd.projector.warmup_steps holds the student's gradients back, which DeepSpeed "
                "keeps to itself. Set warmup_steps: 0, or train without DeepSpeed."
            )
        # Axolotl may keep head, norms and embeddings in float32 under bf16: autocast joins them.
        with self.accelerator.autocast():
            check_output_head(self.model, "student")
        self.teacher = self._open_teacher(device)
        head = self.student_head()
        embedding = self.model.get_input_embeddings().weight
        if head.weight.shape[0] < self.student_vocab_size:
            raise ValueError(
                f"the student's tokenizer has ids up to {self.student_vocab_size - 1}, but its "
                f"output head only {head.weight.shape[0]} rows. Remove added tokens, or let "
                "Axolotl resize the embeddings (`tokens:`)."
            )
        if self.alignment == "cma" and embedding.shape[1] != head.hidden_size:
            raise ValueError(
                f"the student embeds tokens in {embedding.shape[1]} numbers but its head takes "
                f"{head.hidden_size}; cross-model attention does not support such students."
            )
        self.projectors = Projectors(
            head.hidden_size,
            self.teacher.head.hidden_size,
            with_query=self.alignment == "cma",
            seed=self.args.seed,
        ).to(device)
        report = self._start_projectors(self.projectors, head, self.teacher)
        eta = self.alignment == "eta"
        table = translation(load_teacher_tokenizer(self.dskd), self.processing_class) if eta else []
        self.exchange = Exchange(
            alignment=self.alignment,
            projectors=self.projectors,
            teacher_head=self.teacher.head,
            causal=self.dskd.causal,
            translation=torch.tensor(table, dtype=torch.long, device=device),
            start_report=report,
        )
        self.projector_optimizer = ProjectorOptimizer(
            self.projectors,
            learning_rate=self.dskd.projector.learning_rate,
            weight_decay=self.dskd.projector.weight_decay,
            max_grad_norm=self.args.max_grad_norm,
        )
        self.add_callback(_StepProjectors(self))

    def _open_teacher(self, device: torch.device) -> LiveTeacher | CachedTeacher:
        """The live teacher or, where a cache is configured, one that reads it."""
        config = self.dskd.teacher
        if config.cache is None:
            return LiveTeacher(load_teacher(config, device), self.teacher_vocab_size, device)
        with self.accelerator.local_main_process_first():  # the others find the weights hashed
            teacher = open_cached_teacher(config, self.teacher_vocab_size, device)
        evaluation = self.eval_dataset
        datasets = [self.train_dataset]
        datasets += list(evaluation.values()) if isinstance(evaluation, dict) else [evaluation]
        run = CacheRun(
            teacher,
            [dataset for dataset in datasets if dataset is not None],
            device,
            part=(self.args.process_index, self.args.world_size),
            most=lambda number: int(
                self.accelerator.gather(torch.tensor([number], device=device)).max()
            ),
        )
        run.start()
        for collator in self._collators:
            collator.read_cached = run.reader().read_samples
        self.add_callback(_KeepTeacherCache(run))
        return teacher

    def _start_projectors(
        self, projectors: Projectors, head: OutputHead, teacher: LiveTeacher | CachedTeacher
    ) -> StartReport | None:
        """Least squares over the shared tokens, where configured and where these are enough."""
        init = self.dskd.projector.init
        tokenizer = load_teacher_tokenizer(self.dskd)
        shared = shared_tokens(self.processing_class, tokenizer)
        ids = SharedIds(*(torch.tensor(side, device=head.weight.device) for side in shared))
        report = StartReport(ids) if len(ids) else None
        needed = max(head.hidden_size, teacher.head.hidden_size)
        if init == "random" or (init == "auto" and len(ids) < needed):
            why = f"{len(ids)} tokens are shared, {needed} would determine a least-squares start"
            LOG.info(f"Projectors start at random: {'as configured' if init == 'random' else why}")
            return report
        embeddings = self.model.get_input_embeddings().weight, teacher.embedding.weight
        start_from_shared_tokens(projectors, shared_rows(ids, (head, teacher.head), embeddings))
        follows = ""
        if head.trainable:
            self.head_follower = HeadFollower(projectors, ids, teacher.head, head)
            follows = "; s2t follows the student's output head, which trains"
        LOG.info(f"Projectors start in least squares over {len(ids)} shared tokens{follows}")
        return report

    def student_head(self) -> OutputHead:
        """The student's head as it is now."""
        return output_head(self.model, self.student_vocab_size)

    @property
    def projectors_warm_up(self) -> bool:
        """Whether the projectors train alone at this step."""
        return self.state.global_step < self.dskd.projector.warmup_steps

    def _loss_settings(self, dtype: torch.dtype) -> LossSettings:
        config = self.dskd
        chunk = config.chunk_tokens
        if chunk == "auto":
            chunk = auto_chunk_tokens(
                _total_memory(self.accelerator.device),
                (self.student_vocab_size, self.teacher_vocab_size),
                torch.promote_types(dtype, self.teacher.head.weight.dtype)
                if self.teacher
                else dtype,
            )
        return LossSettings(
            divergence=make_divergence(
                config.divergence,
                skew_lambda=config.skew_lambda,
                adaptive_alpha=config.adaptive_alpha,
                js_beta=config.js_beta,
            ),
            temperature=config.temperature,
            kd_ratio=config.kd_ratio if self.teacher is not None else 0.0,
            student_space_weight=config.student_space_weight,
            teacher_space_weight=config.teacher_space_weight,
            mask_wrong_projections=self.alignment == "cma"
            if config.agreement_mask == "auto"
            else config.agreement_mask,
            chunk_tokens=chunk,
        )

    def _set_signature_columns_if_needed(self) -> None:
        first = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if first:
            self._signature_columns += COLUMNS

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
        count = torch.stack(list(masks)).sum().double()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(count)
            count = count / dist.get_world_size()
        return count.clamp_min(1.0)

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
            with captured_head_input(self.model) as self._captured:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self._batch, self._captured = None, []

    def _dual_space_loss(
        self, outputs: Any, _labels: Tensor, num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        batch = self._batch
        assert batch is not None
        hidden_BLd = single(self._captured, self.model)
        mask_BL = batch.student_mask()
        student = batch.student_side(mask_BL)
        if len(student) == 0:
            return outputs["logits"].sum() * 0.0  # reaches every parameter, the head's too
        hidden_Nd = hidden_BLd[mask_BL]
        head = self.student_head()
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
            weight = self.model.get_input_embeddings().weight.detach()
            exchanged = self.exchange(batch, hidden_Nd, student, weight, signal)
            call |= exchanged.loss_arguments(settings, self.teacher.head)
            if self.model.training:
                states = hidden_Nd, signal.hidden
                heads = head, self.teacher.head
                self.exchange.report(exchanged, states, heads, self.state.global_step)
        out = dual_space_loss(**call)
        if exchanged is not None and exchanged.aligned.student_mask is not None:
            out.terms["aligned"] = exchanged.aligned.student_mask.float()
        teacher_tokens = None if exchanged is None else exchanged.teacher_tokens
        self._stop_if_not_finite(out, batch, student, teacher_tokens)
        self._sums["train" if self.model.training else "eval"].add(out)
        count = len(student) if num_items_in_batch is None else num_items_in_batch
        return out.loss / torch.as_tensor(count, device=out.loss.device).to(out.loss.dtype)

    def _stop_if_not_finite(
        self, out: LossOutput, batch: DualBatch, student: Side, teacher: Side | None
    ) -> None:
        """Name the term, the step and the rows, instead of training on with a broken model.

        Raises:
            ValueError: the loss is NaN or infinite.
        """
        if torch.isfinite(out.loss):
            return
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
        raise ValueError(
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
            if self.head_follower is not None:
                self.head_follower.resume(self.student_head())


def _total_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
