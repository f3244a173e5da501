"""What an optimizer holds for its parameters, by Axolotl's names. Knows parameters only."""

from __future__ import annotations

from torch import nn

#: States per trained parameter, each in the parameter's own dtype, by Axolotl's names. (A `paged_`
#: in front changes where they lie, not how many they are.)
_PLAIN = {
    "sgd": 0,
    **dict.fromkeys(["adagrad", "rmsprop", "muon", "lion_pytorch", "lion_32bit"], 1),
    **dict.fromkeys(["adamw_hf", "adamw_torch", "adamw_torch_fused", "adamw_apex_fused"], 2),
    **dict.fromkeys(["adamw_32bit", "optimi_adamw", "schedule_free_adamw"], 2),
    **dict.fromkeys(["ademamix", "ademamix_32bit"], 3),
}
#: One byte a state, and one float32 absmax per 256 of them.
_BYTE = 1 + 4 / 256
#: The same for quantised states: bytes per trained parameter.
_QUANTIZED = {
    **{"lion_8bit": _BYTE, "ao_adamw_4bit": 1.0, "ao_adamw_fp8": 2.0, "ademamix_8bit": 3 * _BYTE},
    **dict.fromkeys(("ao_adamw_8bit", "adamw_8bit", "adamw_bnb_8bit"), 2 * _BYTE),
}
#: Those that keep float32 sums of a matrix' rows and columns, and how many of them.
_FACTORED = {"adafactor": 1, "came_pytorch": 2}
#: The quantised optimizers keep float32 states for tensors smaller than this.
_SMALL = 4096


def optimizer_bytes(name: str, parameters: list[nn.Parameter]) -> tuple[int, str | None]:
    """Bytes of the optimizer's states, and a note where `name` is not known."""
    kind, count = name.removeprefix("paged_"), sum(p.numel() for p in parameters)
    if kind in _FACTORED:
        sums = (sum(p.shape) if p.dim() > 1 else p.numel() for p in parameters)
        return 4 * _FACTORED[kind] * sum(sums), None
    if kind in _QUANTIZED:
        small = sum(n for p in parameters if (n := p.numel()) < _SMALL)
        return int((count - small) * _QUANTIZED[kind] + 8 * small), None
    note = None if kind in _PLAIN else f"optimizer {name} is not known here: counted as AdamW"
    return _PLAIN.get(kind, 2) * sum(p.numel() * p.element_size() for p in parameters), note


def step_bytes(name: str, parameters: list[nn.Parameter], *, on_gpu: bool) -> int:
    """What an optimizer step allocates and frees.

    PyTorch's own optimizers work on all tensors at once on a GPU (fused ones in place), on one
    after the other on a CPU.
    """
    sizes = [p.numel() * p.element_size() for p in parameters]
    if on_gpu:
        return sum(sizes) if name in ("adamw_torch", "adamw_hf") else 0
    return 2 * max(sizes, default=0)
