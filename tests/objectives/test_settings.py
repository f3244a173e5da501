"""What the configuration says of the loss reaches the loss."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from axolotl_dskd.config import DSKDConfig
from axolotl_dskd.losses import Distribution
from axolotl_dskd.objectives.dual_space.loss import LossSettings, auto_chunk_tokens
from axolotl_dskd.objectives.dual_space.settings import loss_settings

ARGUMENTS: dict[str, Any] = {
    "alignment": "cma",
    "memory": 24 << 30,
    "vocab_sizes": (32_000, 152_000),
    "dtype": torch.bfloat16,
}


def resolved(block: dict[str, Any] | None = None, **changes: Any) -> LossSettings:
    config = DSKDConfig.model_validate({"teacher": {"base_model": "x"}, **(block or {})})
    return loss_settings(config, **(ARGUMENTS | changes))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", 1.5),
        ("kd_ratio", 0.25),
        ("student_space_weight", 0.75),
        ("teacher_space_weight", 0.0),
        ("chunk_tokens", 48),
    ],
)
def test_a_number_is_taken_as_it_is(key: str, value: float):
    assert getattr(resolved({key: value}), key) == value


@pytest.mark.parametrize(
    ("divergence", "key"),
    [
        ("skewed_forward_kl", "skew_lambda"),
        ("adaptive_kl", "adaptive_alpha"),
        ("js_divergence", "js_beta"),
    ],
)
def test_a_divergence_is_the_named_one_with_its_parameter(divergence: str, key: str):
    generator = torch.Generator().manual_seed(0)
    p, q = (Distribution.of(torch.randn(4, 30, generator=generator)) for _ in range(2))
    settings = [resolved({"divergence": divergence, key: x}) for x in (0.2, 0.4)]
    values = [s.divergence(p, q)[0] for s in (*settings, resolved())]
    assert not any(torch.allclose(a, b) for a, b in itertools.pairwise(values))


def test_automatic_values_are_resolved():
    assert resolved().mask_wrong_projections
    assert not resolved(alignment="eta").mask_wrong_projections
    assert resolved({"agreement_mask": True}, alignment="eta").mask_wrong_projections
    assert not resolved({"agreement_mask": False}).mask_wrong_projections
    chunks = [resolved(dtype=dtype).chunk_tokens for dtype in (torch.bfloat16, torch.float32)]
    assert chunks[0] == auto_chunk_tokens(24 << 30, (32_000, 152_000), torch.bfloat16)
    assert chunks[0] == 2 * chunks[1]


def test_without_a_teacher_the_loss_is_the_cross_entropy():
    assert resolved(with_teacher=False).kd_ratio == 0
