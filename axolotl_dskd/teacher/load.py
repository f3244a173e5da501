"""Load a frozen teacher without what Axolotl has set up for the student leaking into it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import transformers.integrations.deepspeed
import transformers.modeling_utils
from axolotl.utils.logging import get_logger
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.integrations.deepspeed import (
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from axolotl_dskd.config import TeacherConfig, loading

LOG = get_logger(__name__)


@contextmanager
def apart_from_the_student() -> Iterator[None]:
    """Undo, while a second model loads, the process-wide switches of sharded students.

    With FSDP_CPU_RAM_EFFICIENT_LOADING every rank but the first would get a teacher of zeros;
    under ZeRO-3 the teacher would be partitioned, and Axolotl says that ZeRO-3 is on for good.
    """
    key = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    before = os.environ.get(key)
    os.environ[key] = "false"
    zero = _zero_config()
    modules: tuple[Any, ...] = (
        transformers.integrations.deepspeed,
        transformers.modeling_utils,
    )
    switches = [module.is_deepspeed_zero3_enabled for module in modules]
    for module in modules:
        module.is_deepspeed_zero3_enabled = lambda: False
    if zero is not None:
        unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if zero is not None:
            set_hf_deepspeed_config(zero)
        for module, switch in zip(modules, switches, strict=True):
            module.is_deepspeed_zero3_enabled = switch
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before


def _zero_config() -> Any:
    """What transformers holds (weakly) as the process' DeepSpeed configuration, or None."""
    held = transformers.integrations.deepspeed._hf_deepspeed_config_weak_ref
    return None if held is None else held()


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU that has it, else float32; other names stand for themselves.

    Where there is no GPU, one is only planned for, and taken to have it.
    """
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type != "cuda":
        return torch.float32
    planned = not torch.cuda.is_available()
    has_it = planned or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_it else torch.float32


def quantization_of(config: TeacherConfig, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """How the teacher is quantised, computing in `dtype`; None where it is not."""
    if config.load_in_4bit:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if config.load_in_8bit else None


def load_teacher(config: TeacherConfig, device: torch.device) -> Any:
    """The teacher in eval mode with frozen weights, its adapter merged.

    Args:
        config: where from and how.
        device: where to, unless `config.device_map` says otherwise.

    Raises:
        ValueError: it cannot be loaded; the message says from where and why.
    """
    dtype = resolve_dtype(config.dtype, device)
    quantization = quantization_of(config, dtype)
    kwargs: dict[str, Any] = {
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code,
        "dtype": dtype,
        "device_map": config.device_map or {"": device},
        "max_memory": config.max_memory,
        "quantization_config": quantization,
        "attn_implementation": config.attn_implementation,
    }
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    LOG.info(f"Loading the teacher {config.base_model} ({dtype}, {quantization or 'unquantised'})")
    with apart_from_the_student():
        advice = "If memory ran out, try dskd.teacher.load_in_4bit: true or a device_map."
        with loading(f"the teacher {config.base_model!r}", advice):
            model = AutoModelForCausalLM.from_pretrained(config.base_model, **kwargs)
        if config.adapter:
            model = _merged(model, config.adapter)
    return freeze(model)


def freeze(model: Any) -> Any:
    """The model in eval mode with frozen weights, free of what Axolotl binds to the student."""
    _undo_attention_patches(model)
    model.eval()
    model.requires_grad_(False)
    return model


def _merged(model: Any, adapter: str) -> Any:
    from peft import PeftModel

    advice = "Check dskd.teacher.adapter, and that it was trained on dskd.teacher.base_model."
    with loading(f"the teacher's adapter {adapter!r}", advice):
        return PeftModel.from_pretrained(model, adapter).merge_and_unload()


def _undo_attention_patches(model: Any) -> None:
    """Give a teacher of the student's class its own projections back.

    Axolotl's LoRA kernels rewrite the attention *class* to call `self.apply_qkv` and
    `self.apply_o`, which they bind on the student's layers only.
    """
    from axolotl.monkeypatch import lora_kernels

    for module in model.modules():
        if not (hasattr(module, "q_proj") and hasattr(module, "o_proj")):
            continue
        if not hasattr(module, "apply_qkv"):
            module.apply_qkv = MethodType(lora_kernels.original_apply_qkv, module)
        if not hasattr(module, "apply_o"):
            module.apply_o = MethodType(lora_kernels.original_apply_o, module)
