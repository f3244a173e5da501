"""What writing answers holds, by running the prompts' forward on meta tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from axolotl_dskd.planning.simulate import simulation

#: Of each row and id: logits and log-probabilities in float32, probabilities and sums in float64.
_DRAWING = 4 + 4 + 8 + 8


def writing(
    student: Any, static: list[Tensor], shape: tuple[int, int], autocast: torch.dtype | None
) -> dict[str, int]:
    """Bytes on top of weights at the fullest moment of writing, by name.

    As if prompts were as long as with their answers: then the cache of keys and values is full, and
    one forward reads all.

    Args:
        student: on the meta device, in eval mode or not.
        static: its tensors.
        shape: rows and tokens that are written at once.
        autocast: dtype of mixed precision, if any.
    """
    rows, _ = shape
    training = student.training
    student.eval()  # gradient checkpointing keeps no cache
    try:
        with simulation(static, autocast) as memory, torch.autocast("meta"), torch.no_grad():
            ids = torch.zeros(shape, dtype=torch.long, device="meta")
            before = memory.live
            out, peak = memory.peak_of(
                lambda: student(input_ids=ids, use_cache=True, logits_to_keep=1)
            )
            drawing = rows * out.logits.shape[-1] * _DRAWING
            kept = out.past_key_values
            del out
            cache = memory.live - before
            del kept
    finally:
        student.train(training)
    return {"KV cache": cache, "writing's own": max(peak - before - cache, drawing)}
