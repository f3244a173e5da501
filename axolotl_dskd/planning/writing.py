"""What writing answers holds, by running the prompts' forward on meta tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from axolotl_dskd.planning.simulate import LiveBytes, simulation

#: Of each row and id: logits and log-probabilities in float32, probabilities and sums in float64.
_DRAWING = 4 + 4 + 8 + 8
#: Where two models draw: of each the first three, and the sums of both together.
_DRAWING_TOGETHER = 2 * (4 + 4 + 8) + 8


def writing(
    student: Any,
    static: list[Tensor],
    shape: tuple[int, int],
    autocast: torch.dtype | None,
    partner: Any = None,
) -> dict[str, int]:
    """Bytes on top of weights at the fullest moment of writing, by name.

    As if prompts were as long as with their answers: then the cache of keys and values is full, and
    one forward reads all.

    Args:
        student: on the meta device, in eval mode or not.
        static: its tensors, and those of a partner.
        shape: rows and tokens that are written at once.
        autocast: dtype of mixed precision, if any.
        partner: a teacher that takes part in drawing, in eval mode; it reads after the student.
    """
    training = student.training
    student.eval()  # gradient checkpointing keeps no cache
    try:
        with simulation(static, autocast) as memory, torch.no_grad():
            cache, own, logits, kept = _read(student, shape, memory, autocast=True)
            drawing = logits * _DRAWING
            beside = 0
            if partner is not None:
                # Its dtype is its own, not that of the student's autocast.
                beside, of_partner, _, both = _read(partner, shape, memory, autocast=False)
                drawing = max(logits * _DRAWING_TOGETHER, of_partner)
                own -= beside  # which is not there yet when the student reads
                del both
            del kept
    finally:
        student.train(training)
    found = {"KV cache": cache, "teacher's KV cache": beside, "writing's own": max(own, drawing)}
    return {name: size for name, size in found.items() if size}


def _read(
    model: Any, shape: tuple[int, int], memory: LiveBytes, *, autocast: bool
) -> tuple[int, int, int, Any]:
    """Bytes of the cache that a forward leaves and most beside them, rows times ids of its last
    logits, and the cache."""
    ids = torch.zeros(shape, dtype=torch.long, device="meta")
    before = memory.live
    with torch.autocast("meta", enabled=autocast):
        out, peak = memory.peak_of(lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1))
    logits, kept = out.logits.numel(), out.past_key_values
    del out
    cache = memory.live - before
    return cache, peak - before - cache, logits, kept
