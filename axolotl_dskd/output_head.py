"""The output head: everything between final hidden states and logits, as plain tensors.

Knows tensors; no model, vocabulary or loss. Reading a model's head is `models.heads`' part.
Dimension letters as in `types`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Gate:
    """How much of each block of a state the logits of each group of tokens see.

    Attributes:
        scale: [K, n] float32 or wider: group k's factor of block j, d / n channels of a state.
        ids: K times [V_k] int64, the tokens of each group; together every id once.
    """

    scale: Tensor
    ids: tuple[Tensor, ...]

    def factors(self, hidden_size: int) -> Tensor:
        """[K, d] the factor of each channel."""
        return self.scale.repeat_interleave(hidden_size // self.scale.shape[1], 1)

    def groups(self) -> Tensor:
        """[V] int64, the group of each token."""
        groups = self.ids[0].new_empty(sum(len(ids) for ids in self.ids))
        for k, ids in enumerate(self.ids):
            groups[ids] = k
        return groups

    def to(self, device: torch.device) -> Gate:
        """The gate on a device."""
        return Gate(self.scale.to(device), tuple(ids.to(device) for ids in self.ids))


@dataclass(frozen=True)
class OutputHead:
    """Everything between the final hidden state and the logits; the one way to logits here.

    `logits(hidden)` equals

        softcap(scale * (hidden @ (weight + lora_scale * lora_B @ lora_A).T + bias))[:, :vocab_size]

    with `softcap(x) = cap * tanh(x / cap)` (Gemma 2), `scale` as in Granite and Cohere, `bias` as
    in Phi. Rows from `vocab_size` on are padding that no tokenizer emits: they get no logit, so
    no probability.

    With a gate, token v of group k sees `hidden * gate.factors(d)[k]` in the states' place. That is
    K heads of V/K rows each, so the products of a plain head, in K pieces.

    Attributes:
        weight: [rows >= vocab_size, d].
        bias: [rows] or None.
        lora_A, lora_B: [r, d] and [rows, r], or both None.
        gate: over all `vocab_size` tokens, or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    lora_scale: float = 1.0
    scale: float = 1.0
    softcap: float | None = None
    vocab_size: int = 0
    gate: Gate | None = None

    def __post_init__(self) -> None:
        rows = self.weight.shape[0]
        if not self.vocab_size:
            object.__setattr__(self, "vocab_size", rows)
        assert 0 < self.vocab_size <= rows, (self.vocab_size, rows)
        assert (self.lora_A is None) == (self.lora_B is None)

    @property
    def hidden_size(self) -> int:
        """Size of the hidden states that the head takes."""
        return self.weight.shape[1]

    @property
    def trainable(self) -> bool:
        """Whether any of the head's tensors wants a gradient."""
        return any(t.requires_grad for t in self.tensors() if t is not None)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """`(weight, bias, lora_A, lora_B, gate.scale)`, as `backward` takes buffers."""
        scale = None if self.gate is None else self.gate.scale
        return self.weight, self.bias, self.lora_A, self.lora_B, scale

    def frozen(self, dtype: torch.dtype | None = None) -> OutputHead:
        """The same head cut from the autograd graph and from padding rows, in `dtype`.

        Views, no copy, unless the dtype changes.
        """

        def cut(tensor: Tensor | None, rows: slice) -> Tensor | None:
            return None if tensor is None else tensor.detach()[rows].to(dtype or tensor.dtype)

        rows = slice(None, self.vocab_size)
        weight = cut(self.weight, rows)
        assert weight is not None
        return OutputHead(
            weight=weight,
            bias=cut(self.bias, rows),
            lora_A=cut(self.lora_A, slice(None)),
            lora_B=cut(self.lora_B, rows),
            lora_scale=self.lora_scale,
            scale=self.scale,
            softcap=self.softcap,
            gate=self.gate and replace(self.gate, scale=self.gate.scale.detach()),
        )

    @torch.no_grad()
    def rows(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows of the matrix and the bias that the logits (before a softcap) come from.

        LoRA's product is in float32, also within autocast.

        Args:
            ids: [k] int64, on the head's device.

        Returns:
            [k, d] and [k] or None, detached, with LoRA, gate and scale in.
        """
        weight = self.weight.detach()[ids]
        if self.lora_A is not None and self.lora_B is not None:
            with _dtypes_as_given(ids.device):
                low = self.lora_B.detach()[ids].float() @ self.lora_A.detach().float()
            weight = weight + self.lora_scale * low.to(weight.dtype)
        if self.gate is not None:
            groups = self.gate.groups()[ids.to(self.gate.scale.device)]
            weight = weight * self.gate.factors(self.hidden_size).detach()[groups].to(weight)
        bias = None if self.bias is None else self.bias.detach()[ids] * self.scale
        return weight * self.scale, bias

    def to(self, device: torch.device) -> OutputHead:
        """The head on a device (itself if it is there already)."""
        names = ("weight", "bias", "lora_A", "lora_B", "gate")
        moved = {n: t.to(device) for n in names if (t := getattr(self, n)) is not None}
        return replace(self, **moved)

    def logits(self, hidden_Nd: Tensor) -> Tensor:
        """[N, d] -> [N, vocab_size], in the dtype of the hidden states."""
        return self.activation(self.linear(hidden_Nd))

    def linear(self, hidden_Nd: Tensor, out: Tensor | None = None) -> Tensor:
        """What the head gives before scale and softcap: [N, vocab_size], in the states' dtype.

        Also within autocast, which would give the products of the parts dtypes of its own.

        Args:
            hidden_Nd: [N, d].
            out: a contiguous [N, vocab_size] to write to (without autograd), or None.
        """
        with _dtypes_as_given(hidden_Nd.device):
            return self._linear(hidden_Nd, out)

    def _linear(self, hidden_Nd: Tensor, out: Tensor | None) -> Tensor:
        if self.gate is not None:
            if out is None:
                out = hidden_Nd.new_empty((*hidden_Nd.shape[:-1], self.vocab_size))
            for ids, factors_d, head in self._groups():
                out.index_copy_(-1, ids, head.linear(hidden_Nd * factors_d.to(hidden_Nd.dtype)))
            return out
        dtype, rows = hidden_Nd.dtype, slice(None, self.vocab_size)
        weight = self.weight[rows].to(dtype)
        bias = None if self.bias is None else self.bias[rows].to(dtype)
        if out is None:
            out = F.linear(hidden_Nd, weight, bias)
        else:
            torch.mm(hidden_Nd, weight.T, out=out)
            if bias is not None:
                out += bias
        if self.lora_A is not None and self.lora_B is not None:
            low_Nr = F.linear(hidden_Nd, self.lora_A.to(dtype)).flatten(0, -2)
            lora_B = self.lora_B[rows].to(dtype)
            out.flatten(0, -2).addmm_(low_Nr, lora_B.T, alpha=self.lora_scale)
        return out

    def activation(self, linear_NV: Tensor) -> Tensor:
        """Scale and softcap, elementwise; the tensor itself where the head has neither."""
        logits_NV = linear_NV * self.scale if self.scale != 1.0 else linear_NV
        if self.softcap is not None:
            logits_NV = self.softcap * torch.tanh(logits_NV / self.softcap)
        return logits_NV

    def activation_backward(self, logits_NV: Tensor, grad_logits_NV: Tensor) -> Tensor:
        """From the gradient of `activation`'s result to that of its input; may work in place."""
        if self.softcap is not None:
            grad_logits_NV = grad_logits_NV * (1 - (logits_NV / self.softcap).square())
        return grad_logits_NV * self.scale if self.scale != 1.0 else grad_logits_NV

    def backward(
        self,
        hidden_Nd: Tensor,
        grad_NV: Tensor,
        buffers: tuple[Tensor | None, ...] = (None, None, None, None, None),
    ) -> Tensor:
        """Gradient of the hidden states, given that of `linear`'s result.

        Args:
            hidden_Nd: what `linear` was given.
            grad_NV: [N, vocab_size], in the dtype of the hidden states.
            buffers: tensors shaped as `tensors()` to add the head's own gradients to, or None.

        Returns:
            [N, d] in the dtype of the hidden states.
        """
        dtype, rows = hidden_Nd.dtype, slice(None, self.vocab_size)
        assert grad_NV.dtype == dtype
        if self.gate is not None:
            return self._gated_backward(hidden_Nd, grad_NV, buffers)
        grad_hidden_Nd = grad_NV @ self.weight[rows].to(dtype)
        into_weight, into_bias, into_A, into_B, _ = buffers
        if into_weight is not None:
            _add_product(into_weight[rows], grad_NV, hidden_Nd)
        if into_bias is not None:
            into_bias[rows].add_(grad_NV.sum(0, dtype=into_bias.dtype))
        if self.lora_A is not None and self.lora_B is not None:
            low_Nr = F.linear(hidden_Nd, self.lora_A.to(dtype))
            grad_low_Nr = self.lora_scale * (grad_NV @ self.lora_B[rows].to(dtype))
            grad_hidden_Nd = grad_hidden_Nd + grad_low_Nr @ self.lora_A.to(dtype)
            if into_A is not None:
                _add_product(into_A, grad_low_Nr, hidden_Nd)
            if into_B is not None:
                _add_product(into_B[rows], grad_NV, low_Nr * self.lora_scale)
        return grad_hidden_Nd

    def _groups(self) -> Iterator[tuple[Tensor, Tensor, OutputHead]]:
        """Each group's ids [V_k], its factors of the channels [d], and the plain head of its rows.

        The rows are picked anew for every chunk: that reads the head once more, a product of many
        tokens with it takes far longer, and no second head has to be held.
        """
        assert self.gate is not None
        for ids, factors in zip(self.gate.ids, self.gate.factors(self.hidden_size), strict=True):
            head = replace(
                self,
                weight=self.weight[ids],
                bias=None if self.bias is None else self.bias[ids],
                lora_B=None if self.lora_B is None else self.lora_B[ids],
                vocab_size=len(ids),
                gate=None,
            )
            yield ids, factors, head

    def _gated_backward(
        self, hidden_Nd: Tensor, grad_NV: Tensor, buffers: tuple[Tensor | None, ...]
    ) -> Tensor:
        """`backward`, group by group. With R_k what group k's own head hands back, the states get
        Σ_k factors_k ∘ R_k, and the scale of (k, j) Σ_i ⟨hidden_ij, R_k,ij⟩: no further product."""
        wide = torch.promote_types(hidden_Nd.dtype, torch.float32)
        grad_hidden_Nd = torch.zeros_like(hidden_Nd, dtype=wide)
        into_weight, into_bias, into_A, into_B, into_scale = buffers
        for k, (ids, factors_d, head) in enumerate(self._groups()):
            by_row = (into_weight, into_bias, into_B)
            weight, bias, lora_B = (None if b is None else b[ids] for b in by_row)
            back_Nd = head.backward(
                hidden_Nd * factors_d.to(hidden_Nd.dtype),
                grad_NV.index_select(1, ids),
                (weight, bias, into_A, lora_B, None),
            )
            for into, rows in zip(by_row, (weight, bias, lora_B), strict=True):
                if into is not None and rows is not None:
                    into[ids] = rows
            grad_hidden_Nd.addcmul_(back_Nd.to(wide), factors_d.to(wide))
            if into_scale is not None:
                per_channel_d = (back_Nd.to(wide) * hidden_Nd.to(wide)).sum(0)
                into_scale[k] += per_channel_d.view(into_scale.shape[1], -1).sum(1)
        return grad_hidden_Nd.to(hidden_Nd.dtype)


def _dtypes_as_given(device: torch.device) -> torch.autocast:
    """Where autocast is off."""
    return torch.autocast(device.type, enabled=False)


def _add_product(into: Tensor, grad: Tensor, states: Tensor) -> None:
    """into += gradᵀ states, accumulated in the (wider) dtype of `into`."""
    if into.dtype == grad.dtype:
        into.addmm_(grad.T, states)
    elif grad.is_cuda:
        # Tensor cores take narrow factors and give float32; in slices, which bounds the copy.
        for part, columns in zip(into.split(16384), grad.split(16384, dim=1), strict=True):
            part += torch.mm(columns.T, states, out_dtype=into.dtype)
    else:
        into.addmm_(grad.T.to(into), states.to(into))
