"""The student as distillation sees it: its head, its embeddings, whole or sharded.

The one place that knows how FSDP2, ZeRO and mixed precision change where the student's parameters
are and when they can be read. Knows one model and an accelerator; nothing of teachers,
batches or losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from axolotl_dskd.models.heads import check_output_head, gated, head_module, output_head
from axolotl_dskd.output_head import Gate, OutputHead
from axolotl_dskd.ranks import first_for_all, gathered, is_first, is_sharded, multiply, whole
from axolotl_dskd.types import Needs, Side, View


class Student:
    """A model that is being trained.

    Args:
        model: gives it as the trainer holds it now (wrapped by peft, prepared, or not).
        accelerator: the trainer's.
        vocab_size: ids that its tokenizer can emit.

    Attributes:
        gate: what stands in front of its head at the moment, while it learns or (True) while it
            is evaluated.
    """

    def __init__(self, model: Callable[[], Any], accelerator: Accelerator, vocab_size: int) -> None:
        self._model = model
        self.gate: Callable[[bool], Gate | None] = lambda evaluates: None
        self.accelerator = accelerator
        self.vocab_size = vocab_size
        self._embedding = model().get_input_embeddings()
        # Asked for within a forward, ZeRO-3 would take it for a parameter of the head from then on.
        # Held under FSDP2, it would stay in memory beside the shards that take its place.
        self._partitioned = self._embedding.weight if self._zero_stage == 3 else None

    @property
    def position_limit(self) -> int | None:
        """Tokens that it can read, as its config says; None: it does not say."""
        return getattr(self._model().config.get_text_config(), "max_position_embeddings", None)

    @property
    def is_sharded(self) -> bool:
        """Whether a rank holds a part of the student only, once training has begun."""
        fsdp = getattr(self.accelerator.state, "fsdp_plugin", None) is not None
        return fsdp or self._zero_stage == 3

    @property
    def _zero_stage(self) -> int:
        plugin = self.accelerator.state.deepspeed_plugin
        return 0 if plugin is None else int(plugin.zero_stage)

    def view(self, tokens: Side, hidden: Tensor, needs: Needs, *, evaluates: bool = False) -> View:
        """The student on a batch; within its forward, and on every rank alike.

        Args:
            tokens: its supervised tokens.
            hidden: [N, d] what its head was given for them.
            needs: of the objective.
            evaluates: it is evaluated, and does not learn.
        """
        embedded = self.embed(tokens) if needs.embeddings else None
        return View(tokens, self.head(evaluates=evaluates), hidden, embedded)

    def head(self, *, evaluates: bool = False) -> OutputHead:
        """The output head as it is now, with its gate. Of a sharded student: within its forward or
        `gathered`."""
        head = output_head(self._model(), self.vocab_size)
        return replace(head, gate=self.gate(evaluates))

    @torch.no_grad()
    def check_merging(self) -> None:
        """Refuse a head into which a gate cannot be multiplied.

        Raises:
            ValueError: it is tied to the embedding, does not train, or only an adapter on it does.
        """
        head = head_module(self._model())
        weight = getattr(head, "weight", None)
        tied = weight is self._embedding.weight
        if tied or weight is None or not weight.requires_grad or hasattr(head, "base_layer"):
            why = "is tied to its input embedding" if tied else "does not train as a whole"
            raise ValueError(
                f"dskd.virtual_attention.leave: merge multiplies the attention into the output "
                f"head, but the student's {why}. Write leave: anneal"
                + ("." if tied else ", or train the head (lora_modules_to_save: [lm_head]).")
            )

    @torch.no_grad()
    def merge(self, gate: Gate) -> None:
        """Multiply a gate into the head, for good; every rank must call it."""
        weight = head_module(self._model()).weight
        factors = torch.ones(weight.shape, device=gate.scale.device)
        factors[: self.vocab_size] = gate.factors(weight.shape[1])[gate.groups()]
        multiply(weight, factors)

    @contextmanager
    def gathered(self) -> Iterator[tuple[OutputHead, Tensor]]:
        """Head and input embedding [V, d] outside a forward, before training has begun.

        Under FSDP2 rank 0 may be the only one whose tensors have storage (`device` meta).
        """
        head = head_module(self._model())
        embedding = self._embedding.weight
        with gathered((embedding, *head.parameters())):
            yield self.head(), embedding

    @property
    def runs_together(self) -> bool:
        """Whether each of its forwards needs all ranks, also within `running` (FSDP2)."""
        return self.is_sharded and self._zero_stage != 3

    @contextmanager
    def running(self, *, evaluates: bool = False) -> Iterator[Any]:
        """The model for forwards that train nothing, such as writing; on every rank alike.

        In eval mode, so without dropout and gradient checkpointing; each of its modules is in the
        mode of before afterwards. ZeRO-3's parameters are gathered once for all forwards.

        Args:
            evaluates: it is evaluated, and does not write what it will learn from.
        """
        model = self._model()
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            with (
                torch.no_grad(),
                self.accelerator.autocast(),
                self._gathered_for_long(),
                gated(model, self.gate(evaluates)),
            ):
                yield model
        finally:
            for module in training:
                module.training = True

    @contextmanager
    def _gathered_for_long(self) -> Iterator[None]:
        """Under ZeRO-3 all parameters, which its hooks would otherwise let go layer by layer; under
        FSDP2 those of no layer, for writing may run a model within an adapter's wrapper."""
        model: Any = self._model()
        prepared = getattr(self.accelerator, "deepspeed_engine_wrapped", None)
        if _is_fully_sharded(model):
            # Through the wrapper first: what runs first is otherwise taken for the whole.
            device = model.get_input_embeddings().weight.device
            model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=device), use_cache=False)
            model.unshard()
            try:
                yield
            finally:
                model.reshard()
            return
        if self._zero_stage != 3 or prepared is None:
            yield
            return
        from trl.models.utils import add_hooks, remove_hooks

        with gathered(model.parameters()):
            remove_hooks(prepared.engine)
            try:
                yield
            finally:
                add_hooks(prepared.engine)

    @property
    def adapter_rank(self) -> int | None:
        """Largest rank of its LoRA; None where it has none."""
        adapters = getattr(self._model(), "peft_config", None)
        return max(int(adapter.r) for adapter in adapters.values()) if adapters else None

    @torch.no_grad()
    def save(self, folder: Path) -> None:
        """Write it as users would have it: with LoRA the adapter, else all weights.

        On every rank alike; a sharded student is gathered tensor by tensor, to rank 0's main
        memory, and rank 0 writes.

        Args:
            folder: of its own.

        Raises:
            ValueError: on every rank, where it cannot be written.
        """
        model = self.accelerator.unwrap_model(self._model())
        adapter = self.adapter_rank is not None
        tensors: dict[str, Tensor] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if adapter and not tensor.requires_grad:
                continue
            with gathered([tensor]):
                full = whole(tensor).detach()
                if is_first():
                    tensors[name] = full.cpu() if is_sharded(tensor) else full
        keys: dict[str, Any] = {"save_embedding_layers": False} if adapter else {}
        first_for_all(
            lambda: model.save_pretrained(folder, state_dict=tensors, **keys),
            self.accelerator.device,
        )

    @torch.no_grad()
    def embed(self, tokens: Side) -> tuple[Tensor, Tensor]:
        """[N, d] the embeddings of inputs and labels, without graph; within a forward."""
        weight = self._embedding.weight if self._partitioned is None else self._partitioned
        with gathered([weight]):
            table = whole(weight)
            return table[tokens.input_ids], table[tokens.labels]

    @property
    def loss_scale(self) -> float:
        """What DeepSpeed multiplies the loss by in its next backward (float16), else 1.

        It may change it within the last backward of a step: ask before. Without DeepSpeed a
        gradient scaler does it, which knows by itself.
        """
        prepared = getattr(self.accelerator, "deepspeed_engine_wrapped", None)
        return float(getattr(prepared.engine.optimizer, "loss_scale", 1.0)) if prepared else 1.0

    def router_loss(self, outputs: Any) -> Tensor | None:
        """What a mixture of experts adds to its loss so that all experts are used, in its own
        weight; None for other models, and where its config does not ask for it.

        Args:
            outputs: of its forward, which adds nothing itself where it is given no labels.

        Raises:
            ValueError: the weight cannot be found.
        """
        found = outputs.get("aux_loss")
        if found is None:
            return None
        model = self._model()
        for name in ("router_aux_loss_coef", "aux_loss_coef"):
            if (weight := getattr(model, name, None)) is not None:
                return weight * found
        raise ValueError(
            f"{type(model).__name__} gives a loss for its router, but no weight of it under a name "
            "that is known here. Set output_router_logits: false in its config, or report it."
        )

    def check(self, *, training_has_begun: bool) -> None:
        """Refuse a student that cannot be distilled into; once, as early as it is whole.

        Args:
            training_has_begun: whether FSDP or DeepSpeed has taken hold of it. Only from then on
                can a sharded student be run, or one that DeepSpeed casts to one dtype.

        Raises:
            ValueError: it is spread over devices, or its head does something unknown to its logits.
        """
        placed = set((getattr(self._model(), "hf_device_map", None) or {"": ""}).values())
        if len(placed) > 1:
            raise ValueError(
                f"the student is spread over {sorted(map(str, placed))} by device_map, which is "
                "not supported. Start one process per GPU, or use one GPU."
            )
        with_deepspeed = self.accelerator.state.deepspeed_plugin is not None
        if training_has_begun == (self.is_sharded or with_deepspeed):
            # Axolotl may keep head, norms, embeddings in float32 under bf16: autocast joins them.
            with self.accelerator.autocast():
                check_output_head(self._model(), "student")

    def check_sizes(
        self, head: OutputHead, embedding: Tensor, *, compares_embeddings: bool
    ) -> None:
        """Refuse a head or an embedding that does not fit the tokenizer or the alignment.

        Raises:
            ValueError: with what does not fit.
        """
        if head.weight.shape[0] < self.vocab_size:
            raise ValueError(
                f"the student's tokenizer has ids up to {self.vocab_size - 1}, but its "
                f"output head only {head.weight.shape[0]} rows. Remove added tokens, or let "
                "Axolotl resize the embeddings (`tokens:`)."
            )
        if compares_embeddings and embedding.shape[1] != head.hidden_size:
            raise ValueError(
                f"the student embeds tokens in {embedding.shape[1]} numbers but its head takes "
                f"{head.hidden_size}; cross-model attention does not support such students."
            )


def _is_fully_sharded(model: Any) -> bool:
    return isinstance(model, FSDPModule)
