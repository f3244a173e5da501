"""Models without weights: student and teacher on the meta device, as training would hold them.

Axolotl's own loader resizes, casts and adapts the student's skeleton, so every parameter has the
shape and dtype that it will have. Knows models and their bytes; nothing of rows or losses.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from axolotl_dskd.config import TeacherConfig, loading
from axolotl_dskd.teacher.load import quantization_of, resolve_dtype

#: bitsandbytes' 4-bit blocks: one absmax per 64 weights; double quantisation keeps that in one
#: byte, with a float32 per 256 of them.
_BLOCK, _NESTED_BLOCK = 64, 256


def stored_bytes(tensor: Tensor) -> int:
    """Bytes that a parameter or buffer takes once it is loaded, quantised ones included."""
    kind = type(tensor).__name__
    count = tensor.numel()
    if kind == "Params4bit":
        blocks = -(-count // _BLOCK)
        if getattr(tensor, "compress_statistics", True):
            return -(-count // 2) + blocks + 4 * -(-blocks // _NESTED_BLOCK)
        return -(-count // 2) + 4 * blocks
    if kind == "Int8Params":
        return count + 4 * tensor.shape[0]
    return count * tensor.element_size()


def model_bytes(tensors: Iterable[Tensor]) -> int:
    """Sum of `stored_bytes`, tied tensors counted once."""
    return sum(stored_bytes(t) for t in {id(t): t for t in tensors}.values())


def tensors_of(*models: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [t for model in models for t in (*model.parameters(), *model.buffers())]


def _on_meta(config: Any, dtype: torch.dtype, quantization: Any, trust: bool) -> Any:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust)
    if quantization is not None:
        from transformers.quantizers.auto import AutoHfQuantizer

        quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
        quantizer.preprocess_model(model=model, dtype=dtype, device_map=None)
        # What loading weights would have set, and peft looks for.
        bits = "4bit" if quantization.load_in_4bit else "8bit"
        setattr(model, f"is_loaded_in_{bits}", True)
        model.hf_quantizer = quantizer
    model.tie_weights()
    return model


def student_skeleton(cfg: Any, tokenizer: Any) -> Any:
    """The student as Axolotl would train it, on the meta device: adapters, dtypes, tied weights.

    Raises:
        ValueError: its config cannot be loaded, or the architecture cannot be built this way.
    """
    from axolotl.loaders import ModelLoader

    advice = "Check base_model; a gated model needs `hf auth login`."
    with loading(f"the student {cfg.base_model!r}", advice):
        loader = ModelLoader(cfg, tokenizer)
    loader._set_quantization_config()
    quantization = loader.model_kwargs.get("quantization_config")
    if quantization is not None and not isinstance(quantization, BitsAndBytesConfig):
        raise ValueError(
            f"the student is quantised by {type(quantization).__name__}; only bitsandbytes' 4 and "
            "8 bits can be planned for."
        )
    loader.model = _on_meta(
        loader.model_config, cfg.torch_dtype, quantization, bool(cfg.trust_remote_code)
    )
    # peft prints its count of parameters; the report has it.
    with torch.device("meta"), redirect_stdout(StringIO()):
        loader._apply_post_model_load_setup()
        loader._load_adapters()
    loader.model.train()
    return loader.model


def teacher_skeleton(config: TeacherConfig, device: torch.device) -> Any:
    """The frozen teacher on the meta device, quantised as configured.

    Args:
        device: what is planned for, on which `dtype: auto` depends.

    Raises:
        ValueError: its config cannot be loaded.
    """
    advice = "Check dskd.teacher.base_model and .revision; a gated model needs `hf auth login`."
    with loading(f"the teacher {config.base_model!r}", advice):
        model_config = AutoConfig.from_pretrained(
            config.base_model, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    dtype = resolve_dtype(config.dtype, device)
    quantization = quantization_of(config, dtype)
    model = _on_meta(model_config, dtype, quantization, config.trust_remote_code)
    return model.eval().requires_grad_(False)
