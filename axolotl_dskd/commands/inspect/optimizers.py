"""What an optimizer holds for its parameters, by Axolotl's names. Knows parameters only."""

from __future__ import annotations

from torch import nn

#: One byte a state, and one float32 absmax per 256 of them.
_BYTE = 1 + 4 / 256
#: Optimizers by Axolotl's names: states per trained parameter, each in the parameter's own dtype.
_PLAIN = {
    "sgd": 0,
    "adagrad": 1,
    "rmsprop": 1,
    "muon": 1,
    "lion_pytorch": 1,
    "lion_32bit": 1,
    "paged_lion_32bit": 1,
    "adamw_hf": 2,
    "adamw_torch": 2,
    "adamw_torch_fused": 2,
    "adamw_apex_fused": 2,
    "paged_adamw_32bit": 2,
    "optimi_adamw": 2,
    "schedule_free_adamw": 2,
    "ademamix": 3,
    "paged_ademamix_32bit": 3,
}
#: The same for quantised states: bytes per trained parameter.
_QUANTIZED = {
    "lion_8bit": _BYTE,
    "paged_lion_8bit": _BYTE,
    "ao_adamw_4bit": 1.0,
    "ao_adamw_fp8": 2.0,
    "ao_adamw_8bit": 2 * _BYTE,
    "adamw_8bit": 2 * _BYTE,
    "adamw_bnb_8bit": 2 * _BYTE,
    "paged_adamw_8bit": 2 * _BYTE,
    "ademamix_8bit": 3 * _BYTE,
    "paged_ademamix_8bit": 3 * _BYTE,
}
#: Those that keep float32 sums of a matrix' rows and columns, and how many of them.
_FACTORED = {"adafactor": 1, "came_pytorch": 2}
#: The quantised optimizers keep float32 states for tensors smaller than this.
_SMALL = 4096


def optimizer_bytes(name: str, parameters: list[nn.Parameter]) -> tuple[int, str | None]:
    """Bytes of the optimizer's states, and a note where `name` is not known."""
    if name in _FACTORED:
        sums = (
            4 * _FACTORED[name] * (sum(p.shape) if p.dim() > 1 else p.numel()) for p in parameters
        )
        return sum(sums), None
    if name in _QUANTIZED:
        each = _QUANTIZED[name]
        return int(sum(p.numel() * (each if p.numel() >= _SMALL else 8) for p in parameters)), None
    note = None if name in _PLAIN else f"optimizer {name} is not known here: counted as AdamW"
    return _PLAIN.get(name, 2) * sum(p.numel() * p.element_size() for p in parameters), note


def step_bytes(name: str, parameters: list[nn.Parameter], *, on_gpu: bool) -> int:
    """What an optimizer step allocates and frees.

    PyTorch's own optimizers work on all tensors at once on a GPU (fused ones in place), on one
    after the other on a CPU.
    """
    sizes = [p.numel() * p.element_size() for p in parameters]
    if on_gpu:
        return sum(sizes) if name in ("adamw_torch", "adamw_hf") else 0
    return 2 * max(sizes, default=0)
