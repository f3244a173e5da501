"""From a loaded causal language model to its `OutputHead` and to the states its head receives.

Both work on any transformers model whose forward calls its output embedding as a module, wrapped
by peft or not, patched by Liger or cut-cross-entropy or not. What a family does to its logits
after the head (softcap, scale) is read from its config and then *checked* against the model's own
logits: a family that does something else is refused instead of distilled wrongly.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from axolotl_dskd.output_head import Gate, OutputHead
from axolotl_dskd.ranks import gathered, is_sharded, whole

T = TypeVar("T")


def head_module(model: Any) -> Any:
    """The module that maps final hidden states to logits.

    Raises:
        ValueError: the model has none (it is no causal language model).
    """
    module = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if module is None:
        raise ValueError(
            f"{type(model).__name__} has no output embedding, so it gives no next-token "
            "distribution to distil. Use a causal language model (AutoModelForCausalLM)."
        )
    # modules_to_save: the trained copy stands beside the original.
    saved = getattr(module, "modules_to_save", None)
    if isinstance(saved, nn.ModuleDict):
        return saved[_active(module)]
    return module


def _active(module: Any) -> str:
    active = module.active_adapter
    names = [active] if isinstance(active, str) else list(active)
    if len(names) != 1:
        raise ValueError(
            f"the output head has {len(names)} active adapters {names}; distillation supports one."
        )
    return names[0]


def _text_config(model: Any) -> Any:
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _scale_of(config: Any) -> float:
    """Factor between the linear head's output and the logits."""
    if getattr(config, "logits_scaling", None) is not None:  # Granite divides
        return 1.0 / float(config.logits_scaling)
    scale = getattr(config, "logit_scale", None)
    if isinstance(scale, int | float):  # Cohere multiplies; MPT's may be a name
        return float(scale)
    return 1.0


def _dequantized(module: Any) -> Tensor:
    weight = module.weight
    state = getattr(weight, "quant_state", None)
    if state is not None:
        import bitsandbytes.functional as bnb

        return bnb.dequantize_4bit(weight.data, state)
    if hasattr(weight, "SCB"):  # 8-bit: int8 rows with one scale each
        scale = weight.SCB if weight.SCB is not None else module.state.SCB
        return weight.data.float() * (scale.float() / 127.0).unsqueeze(1)
    if weight.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"the output head's weight has dtype {weight.dtype}, which cannot be read as plain "
            "numbers. Exclude lm_head from this quantisation."
        )
    return whole(weight)


def output_head(model: Any, vocab_size: int | None = None) -> OutputHead:
    """The model's head as plain tensors that share storage (and gradients) with its parameters.

    Call it anew each step: a training head's tensors are only current while its graph is.

    Args:
        model: a causal language model, wrapped by peft or not.
        vocab_size: ids that the tokenizer can emit; rows from there on are padding.

    Raises:
        ValueError: no head, several active adapters on it, a quantisation that can't be read.
    """
    module = head_module(model)
    config = _text_config(model)
    lora_A = lora_B = None
    lora_scale = 1.0
    base = module
    if hasattr(module, "base_layer"):
        base = module.get_base_layer()
        adapter = _active(module)
        adapters = getattr(module, "lora_A", {})
        if adapter in adapters and not module.disable_adapters and not module.merged:
            variants = (getattr(module, "use_dora", {}), getattr(module, "lora_variant", {}))
            if any(v.get(adapter) for v in variants if isinstance(v, dict)):
                raise ValueError(
                    "DoRA and other LoRA variants on the output head are not supported; use plain "
                    "LoRA there."
                )
            if module.lora_B[adapter].bias is not None:
                raise ValueError(
                    "lora_bias on the output head is not supported; remove it, or keep lm_head "
                    "out of lora_target_modules."
                )
            lora_A, lora_B = whole(adapters[adapter].weight), whole(module.lora_B[adapter].weight)
            lora_scale = float(module.scaling[adapter])
    weight = _dequantized(base)
    bias = getattr(base, "bias", None)
    return OutputHead(
        weight=weight,
        bias=None if bias is None else whole(bias),
        lora_A=lora_A,
        lora_B=lora_B,
        lora_scale=lora_scale,
        scale=_scale_of(config),
        softcap=getattr(config, "final_logit_softcapping", None),
        vocab_size=min(vocab_size or weight.shape[0], weight.shape[0]),
    )


def _itself(hidden: Tensor) -> Tensor:
    return hidden


def _as_computed(hidden: Tensor) -> Tensor:
    """States in the dtype in which the model's own head would take them, here and now."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return hidden.to(torch.get_autocast_dtype(device))
    return hidden


@contextmanager
def captured_head_input(model: Any, then: Callable[[Tensor], Any] = _itself) -> Iterator[list[Any]]:
    """While open, a forward of `model` computes no logits: the head hands its input on instead.

    Yields a list that holds, after one forward, `then` of the head's input [B, L, d] with its
    graph; as default that input itself. The model's `logits` are then a meaningless [B, L, 1].
    Nothing needs the model to know of this, and unlike `output_hidden_states` it keeps no other
    layer alive.

    `then` runs inside the head's forward: there and only there the head of a sharded model (FSDP,
    ZeRO-3) is whole without being gathered once more. Their backward starts at the model's
    outputs, so what `then` returns must be added to them by whoever differentiates it.
    """
    module = head_module(model)
    captured: list[Any] = []

    def keep(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        hidden = _as_computed(hidden)
        # ZeRO-3 gathers a module's own parameters for its forward, not those of the layers within.
        with gathered(module.parameters()):
            captured.append(then(hidden))
            out = hidden[..., :1]
            # DDP looks for the parameters that a forward used: the head's are used, by the loss.
            for parameter in module.parameters():
                if parameter.requires_grad and not is_sharded(parameter):
                    out = out + 0.0 * parameter.flatten()[:1].to(out)
        return out

    with _other_forward(module, keep):
        yield captured


@contextmanager
def gated(model: Any, gate: Gate | None) -> Iterator[None]:
    """While open, the model's own forward gives the logits of a head with this gate, if any."""
    if gate is None:
        yield
        return

    def forward(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        vocabulary = sum(len(ids) for ids in gate.ids)
        return replace(output_head(model, vocabulary), gate=gate).linear(_as_computed(hidden))

    with _other_forward(head_module(model), forward):
        yield


@contextmanager
def _other_forward(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    # On the instance, so the class stays as it is; accelerate's hooks live there too.
    before = module.__dict__.get("forward")
    if "torch._dynamo" in sys.modules:  # a compiled model calls it as it is
        forward = torch.compiler.disable(forward)
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def single(captured: list[T], model: Any) -> T:
    """The one thing captured.

    Raises:
        ValueError: the forward did not call its head exactly once.
    """
    if len(captured) != 1:
        raise ValueError(
            f"the forward of {type(model).__name__} called its output head {len(captured)} times; "
            "distillation needs exactly one call. This architecture is not supported."
        )
    return captured[0]


@torch.no_grad()
def check_output_head(model: Any, name: str, tolerance: float = 0.02) -> None:
    """Compare `output_head` with the model's own logits on a few tokens.

    Args:
        model: the model, in any mode; it is run twice on eight tokens.
        name: how messages call it ("student", "teacher").
        tolerance: largest difference allowed, relative to the largest logit.

    Raises:
        ValueError: they differ.
    """
    was_training = model.training
    model.eval()
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(8, device=device).unsqueeze(0) + 3

    def rebuilt(hidden: Tensor) -> Tensor:
        head = output_head(model)
        return head.frozen().logits(hidden.to(head.weight.device)).float()

    with captured_head_input(model, rebuilt) as captured:
        model(input_ids=ids, use_cache=False)
    ours = single(captured, model)
    theirs = model(input_ids=ids, use_cache=False).logits.float()
    model.train(was_training)
    if not torch.isfinite(theirs).all():
        raise ValueError(
            f"the {name} ({type(model).__name__}) gives logits that are not finite on eight plain "
            "tokens. Its weights are damaged, or its dtype is too narrow: use bfloat16 or float32."
        )
    if ours.shape != theirs.shape:
        found = f"shape {tuple(ours.shape)} against the model's {tuple(theirs.shape)}"
    else:
        difference = float((ours - theirs.to(ours.device)).abs().max())
        if difference <= tolerance * max(1.0, float(theirs.abs().max())):
            return
        found = f"logits that differ by {difference:.3g}"
    raise ValueError(
        f"the {name}'s output head ({type(model).__name__}) does something to its logits that "
        f"axolotl-dskd does not know: rebuilding them from the hidden states gave {found}. "
        "Distilling through it would be wrong; please report this architecture."
    )
