"""From the `dskd:` block to the settings of the loss, for training and the memory plan alike."""

from __future__ import annotations

import torch

from axolotl_dskd.config import DSKDConfig
from axolotl_dskd.losses import make_divergence
from axolotl_dskd.objectives.dual_space.loss import LossSettings, auto_chunk_tokens


def loss_settings(
    config: DSKDConfig,
    *,
    alignment: str,
    memory: int,
    vocab_sizes: tuple[int, int],
    dtype: torch.dtype,
    with_teacher: bool = True,
) -> LossSettings:
    """What the configuration says of the loss, with every `auto` resolved.

    Args:
        alignment: the resolved one: "positions", "eta" or "cma".
        memory: bytes of the device in total, for `chunk_tokens: auto`.
        vocab_sizes: ids that the student's and the teacher's tokenizer emit.
        dtype: of the products with the heads, the wider one where the two differ.
        with_teacher: without one the loss is the student's cross-entropy.
    """
    chunk, mask = config.chunk_tokens, config.agreement_mask
    return LossSettings(
        divergence=make_divergence(
            config.divergence,
            skew_lambda=config.skew_lambda,
            adaptive_alpha=config.adaptive_alpha,
            js_beta=config.js_beta,
        ),
        temperature=config.temperature,
        kd_ratio=config.kd_ratio if with_teacher else 0.0,
        student_space_weight=config.student_space_weight,
        teacher_space_weight=config.teacher_space_weight,
        mask_wrong_projections=alignment == "cma" if mask == "auto" else mask,
        chunk_tokens=auto_chunk_tokens(memory, vocab_sizes, dtype) if chunk == "auto" else chunk,
    )
