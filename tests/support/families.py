"""Tiny models of every family that treats its logits differently."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

#: Sizes that most of them take.
SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "llama_tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
    "gemma2_softcap": Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=3.0),
    "granite_scale": GraniteConfig(**SMALL, logits_scaling=4.0),
    "cohere_scale": CohereConfig(**SMALL, logit_scale=0.3),
    "phi_bias": PhiConfig(**{**SMALL, "num_key_value_heads": 4}),
    "gpt2_tied": GPT2Config(
        vocab_size=97,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "opt_projected": OPTConfig(
        vocab_size=97,
        hidden_size=32,
        word_embed_proj_dim=16,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        do_layer_norm_before=False,
    ),
}


def build(name: str, config: Any = None) -> PreTrainedModel:
    """A model of random weights, in which nothing that its head does is small."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config or CONFIGS[name]).eval()
    with torch.no_grad():  # biases start at 0 and would hide
        for parameter_name, parameter in model.named_parameters():
            if "bias" in parameter_name:
                parameter.normal_(std=0.5)
            elif parameter.dim() > 1:
                parameter.mul_(5)
    return model
