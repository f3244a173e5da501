"""Axolotl's trainer with a teacher: joins samples, teacher, objective and metrics.

Knows none of them closely: not the teacher's kind, nor what the objective computes, nor where rows
come from.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, ClassVar

import torch
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.utils.logging import get_logger
from torch import Tensor, nn

from axolotl_dskd.config import DSKDConfig, about_teacher
from axolotl_dskd.data.collator import PREPARED_COLUMNS, DualCollator
from axolotl_dskd.data.reconcile import TEACHER
from axolotl_dskd.data.tokenizers import load_teacher_tokenizer, vocabulary_size
from axolotl_dskd.evaluation.agreement import TeacherAgreement
from axolotl_dskd.machine import total_memory
from axolotl_dskd.models.heads import captured_head_input, single
from axolotl_dskd.models.student import Student
from axolotl_dskd.objectives import Objective, Pair, build_objective, chunk_budget
from axolotl_dskd.output_head import OutputHead
from axolotl_dskd.ranks import raise_together, sum_over_ranks, world_size
from axolotl_dskd.samples import DatasetSamples, Samples
from axolotl_dskd.teacher import Teacher
from axolotl_dskd.training.attending import Attending, attend
from axolotl_dskd.training.callbacks import Begin, EndStep, StepSidecar, TeacherEpochs
from axolotl_dskd.training.comparing import open_for_evaluations
from axolotl_dskd.training.opening import facts, open_teachers
from axolotl_dskd.training.reports import Reports
from axolotl_dskd.training.samples import answered_by_teachers, samples_of_lessons, train_on
from axolotl_dskd.training.sidecar import Sidecar, check_checkpoint
from axolotl_dskd.training.step import Distillation, Lesson, Step
from axolotl_dskd.types import DualBatch, LossOutput

LOG = get_logger(__name__)


class DSKDTrainer(AxolotlTrainer):
    """Trains the student with the configured objective, or, with `kd_ratio: 0`, without a teacher.

    The teacher is loaded when training starts, so that a trainer which only evaluates (`axolotl
    evaluate`) reports the student's plain cross-entropy, and holds no teacher unless
    `evaluation.teacher` asks for one.
    """

    dskd: ClassVar[DSKDConfig]
    train_dataset: Any
    #: exp(loss) is no perplexity where the loss is not a cross-entropy.
    reports_token_perplexity = False

    @classmethod
    def for_config(cls, config: DSKDConfig) -> type[DSKDTrainer]:
        """The class for one run: Axolotl wants a class, and builds it without our config."""
        return type(cls.__name__, (cls,), {"dskd": config, "__module__": cls.__module__})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        student = kwargs["processing_class"]
        self.teacher_tokenizers = {
            name: load_teacher_tokenizer(one) for name, one in self.dskd.each().items()
        }
        pads = {tokenizer.pad_token_id or 0 for tokenizer in self.teacher_tokenizers.values()}
        pad_id = pads.pop() if len(pads) == 1 else 0  # which is in every vocabulary
        self._collators = []
        for key in ("data_collator", "eval_data_collator"):
            if kwargs.get(key) is not None:
                kwargs[key] = DualCollator(
                    kwargs[key],
                    padding_side=student.padding_side,
                    teacher_pad_id=pad_id,
                )
                self._collators.append(kwargs[key])
        super().__init__(*args, **kwargs)
        memory = total_memory(self.accelerator.device)
        #: By the teacher's name, in their order; one alone has an empty name.
        self.objectives: dict[str, Objective[Any]] = {}
        if self.dskd.uses_teacher:
            for number, (name, one) in enumerate(self.dskd.each().items()):
                with about_teacher(name):
                    known = facts(self, number, student, self.teacher_tokenizers[name])
                    objective = build_objective(one, known, memory=memory, seed=self.args.seed)
                LOG.info(f"{name}: {objective.describe()}" if name else objective.describe())
                self.objectives[name] = objective
        self._budget = chunk_budget(self.dskd, memory)
        # Hugging Face's own hook for a loss of sums: no division by accumulation steps, no labels
        # for the model (so no patched forward computes a loss of its own).
        self.compute_loss_func = self._divided
        self.student = Student(lambda: self.model, self.accelerator, vocabulary_size(student))
        self.samples: Samples = DatasetSamples()
        #: What training steps ask, and what evaluations do: the same where training learns from it.
        self.distillation: Distillation | None = None
        self.compared: Distillation | None = None
        self.attending: Attending | None = None
        self.sidecar: Sidecar | None = None
        self.reports = Reports(self)
        self._step: Step | None = None
        self._at_head: list[LossOutput] = []
        self._is_set_up = self._has_begun = False
        self._problem: str | None = None
        self._followed_step: int | None = None
        #: What DeepSpeed multiplies losses by before backward (float16), at the current step.
        self._loss_scale = 1.0

    # ---- set-up ------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Load the teacher, if there is one, begin the objective, then train as Axolotl does."""
        checkpoint = kwargs.get("resume_from_checkpoint", args[0] if args else None)
        if isinstance(checkpoint, str):  # before a teacher is loaded for nothing
            check_checkpoint(checkpoint)
        if not self._is_set_up:
            self._is_set_up = True
            self.reports.record_rows()
            self.student.check(training_has_begun=False)
            self.add_callback(Begin(self._begin))
            if self.dskd.virtual_attention is not None:
                self.attending = attend(self, self.dskd.virtual_attention, self._budget)
                self.add_callback(self.attending)
            if self.objectives:
                self._set_up_distillation()
            else:
                if self.dskd.samples.source == "teacher":
                    train_on(self, answered_by_teachers(self, self.dskd, self.student))
                self._open_for_evaluations(trains=True)
            self._set_up_sidecar()
        self.reports.begin(self.objectives, self.attending)
        if self.samples.begins_with_evaluation and not checkpoint:
            self.args.eval_on_start = True
        return super().train(*args, **kwargs)

    def _set_up_distillation(self) -> None:
        needs = {name: objective.needs for name, objective in self.objectives.items()}
        teachers = open_teachers(self, self.dskd, needs)
        lessons = {
            name: Lesson(teachers[name], objective, self._compare(objective, teachers[name]))
            for name, objective in self.objectives.items()
        }
        self.distillation = self.compared = Distillation(lessons)
        for collator in self._collators:
            collator.readers = [teacher.reader() for teacher in teachers.values()]
        with self.student.gathered() as (head, embedding):
            self.student.check_sizes(
                head, embedding, compares_embeddings=self.distillation.needs.embeddings
            )
            for teacher, objective, _ in lessons.values():
                heads = tuple(h for h in (head, teacher.head) if h is not None)
                embeddings = tuple(e for e in (embedding, teacher.embedding) if e is not None)
                objective.begin(Pair(heads, embeddings, self.accelerator.device))
        self.samples = samples_of_lessons(self, self.distillation)
        train_on(self, self.samples.dataset(self.train_dataset))
        for name, (teacher, objective, _) in lessons.items():
            with about_teacher(name):
                teacher.begin()  # now that the rows are those that training will see
            self.add_callback(TeacherEpochs(teacher))
            self.add_callback(EndStep(objective.end_step))

    def _compare(self, objective: Objective[Any], teacher: Teacher) -> TeacherAgreement | None:
        """How evaluations compare the student with a teacher that it learns from."""
        if teacher.head is None or not self.dskd.evaluation.teacher:
            return None
        facts = objective.facts
        return TeacherAgreement(facts.shared_ids, self._budget, facts.shared_ends)

    def _open_for_evaluations(self, *, trains: bool) -> None:
        """Let evaluations ask a teacher that is not there for training, where they shall."""
        if self.compared is None and self.dskd.evaluation.teacher is True:
            self.compared = open_for_evaluations(self, trains=trains)
            self.reports.compare(() if self.compared is None else self.compared.lessons)

    def _set_up_sidecar(self) -> None:
        """For all that trains beside the student; without a teacher, too, checkpoints say so."""
        modules = {name: o.module for name, o in self.objectives.items() if o.module is not None}
        beside = {name: o.beside for name, o in self.objectives.items() if o.beside is not None}
        if self.is_deepspeed_enabled and any(way.warmup_steps for way in beside.values()):
            # Not in the file that was validated, but in one of accelerate's.
            raise ValueError(
                "dskd.objective.projector.warmup_steps does not work under DeepSpeed, which "
                "updates the student within its backward. Remove it."
            )
        if self.attending is not None:
            modules["virtual_attention"] = self.attending.module
            beside["virtual_attention"] = self.attending.beside(self.args.learning_rate)
        self.sidecar = Sidecar(
            self.dskd.objective.name if self.objectives else "sft",
            modules,
            beside,
            max_grad_norm=self.args.max_grad_norm,
        )
        self.add_callback(
            StepSidecar(
                self.sidecar,
                scaler=lambda: self.accelerator.scaler,
                loss_scale=lambda: self._loss_scale,
            )
        )

    def _inner_training_loop(self, batch_size: int | None = None, **kwargs: Any) -> Any:
        """A training, which is called again with fewer rows where memory has run out
        (auto_find_batch_size): then before it reads the checkpoint that it may go on from."""
        if self._has_begun and batch_size is not None:
            self._start_again(batch_size)
        self._has_begun = True
        return super()._inner_training_loop(batch_size, **kwargs)

    def _start_again(self, batch_size: int) -> None:
        """Drop what the attempt that failed has written and counted. As transformers does with the
        student, what is trained beside it stays as it is."""
        self._train_batch_size = batch_size  # which decides how rows of a batch belong together
        if self.distillation is not None:
            for lesson in self.distillation.lessons.values():
                lesson.objective.forget_step()
                lesson.teacher.start_again()
            self.samples = samples_of_lessons(self, self.distillation)

    def _begin(self) -> None:
        """Training begins, maybe again (auto_find_batch_size)."""
        self.reports.forget()
        self._problem = self._followed_step = None
        self.student.check(training_has_begun=True)

    def _set_signature_columns_if_needed(self) -> None:
        first = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if first:
            self._signature_columns += (*PREPARED_COLUMNS, TEACHER)

    # ---- the loss ----------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """The micro-batches of a step, from where samples come from, and then their count."""
        batches = self.samples(list(islice(epoch_iterator, num_batches)), self.state.global_step)
        if self.distillation is not None:
            self.distillation.expect([DualBatch.pop_from(dict(batch)) for batch in batches])
        return batches, self._get_num_items_in_batch(batches, device)

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
        """The student's forward without logits; the loss is computed where its head would be."""
        batch = DualBatch.pop_from(inputs)
        asked = self.distillation if self.model.training else self.compared
        if asked is not None and not self.model.training:
            asked.expect([batch])
        step = Step(
            batch,
            self.student,
            asked,
            self._budget,
            self._follow,
            self.attending,
            evaluates=not self.model.training,
        )
        self._step = step
        try:
            with captured_head_input(self.model, step.at_head) as self._at_head:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:  # or the graph would live until the next step
            self._step, self._at_head = None, []

    def _divided(
        self, outputs: Any, _labels: Tensor, num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        """The sums that the forward found, divided by the global count."""
        assert self._step is not None
        out = single(self._at_head, self.model)
        decode = self.processing_class.decode
        problem = self._step.problem(out, self.state.global_step + 1, decode)
        self._problem = self._problem or problem
        # Once a step, where the ranks meet anyway; and before the student is touched.
        if self.accelerator.sync_gradients or not self.model.training:
            raise_together(self._problem, self.accelerator.device)
        if problem is None:
            self.reports.count(self._step, out)
        self._loss_scale = self.student.loss_scale
        count = max(out.tokens, 1) if num_items_in_batch is None else num_items_in_batch
        loss = out.loss / torch.as_tensor(count, device=out.loss.device).to(out.loss.dtype)
        router = self.student.router_loss(outputs)
        if router is not None:  # a mean over tokens, so each micro-batch weighs by its own
            loss = loss + router.to(loss) * (out.tokens / count)
        # Through the outputs, which reach every parameter and where sharded backwards begin.
        return loss + (0.0 * outputs["logits"].float()).sum()

    def _follow(self, head: OutputHead) -> None:
        """Once in a step, and where the head is whole."""
        step = self.state.global_step
        if self.distillation is None or step == self._followed_step:
            return
        self._followed_step = step
        self.distillation.follow(step, head)

    # ---- metrics -----------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means since the last log to training logs."""
        if "loss" in logs:
            logs |= self.samples.metrics()
            self.reports.log(logs)
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Add the means over the evaluation set to its metrics."""
        if not self._is_set_up:
            self._open_for_evaluations(trains=False)
        self.reports.begin_evaluation()
        output = super().evaluation_loop(*args, **kwargs)
        dataloader: Any = kwargs.get("dataloader", args[0] if args else None)
        prefix = kwargs.get("metric_key_prefix", "eval")
        self.reports.end_evaluation(prefix, dataloader.dataset, output.metrics)
        found = {name.removeprefix(f"{prefix}_"): x for name, x in output.metrics.items()}
        self.samples.evaluated(found, self.state.global_step)
        return output

    # ---- checkpoints -------------------------------------------------------------------------

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.sidecar is not None and self.args.should_save:
            self.sidecar.save(output_dir)
            self.samples.save(self.sidecar.folder(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.sidecar is not None:
            self.sidecar.load(checkpoint)
            self.samples.load(self.sidecar.folder(checkpoint))
