"""Virtual attention for a language model, beside any objective.

From KDExplainer (Xue et al. 2021, arXiv 2105.04181): the parts of an existing layer are regarded
as virtual blocks; each task attends to them by a softmax of its own, a parameter and no function of
the input (as in the authors' published gates); low entropy of this attention is an added loss;
distillation itself is unchanged. The authors publish the explainer, not this module, and only for
images.

This project's, for a language model: the layer is the final hidden state, the tasks are groups of
tokens, what attention does to a block, and how it leaves the student. With d channels in n blocks,
K groups and a gate A [K, n] that starts at 0:

    α_k = softmax(A_k / τ),   s_kj = 1 + λ (n α_kj − 1),   z_iv = Σ_j s_k(v)j ⟨W_vj, h_ij⟩
    loss += γ · N · H̄,   H̄ = −Σ_kj α_kj log α_kj / (K log n)

So the student is untouched at the start. It is untouched again at the end where λ fades to 0
(`leave: anneal`, γ fading with it), or s is multiplied into the head (`leave: merge`): what is
exported is a plain model. That this helps a language model is not claimed.

Knows a gate, tokens and steps; nothing of objectives or of how the gate is optimised.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from axolotl_dskd.config import VirtualAttentionConfig
from axolotl_dskd.data.token_bytes import token_bytes
from axolotl_dskd.output_head import Gate, OutputHead
from axolotl_dskd.virtual_attention.groups import CLASSES, by_class, by_clusters, scrambled


class VirtualAttention(nn.Module):
    """See the module.

    Args:
        config: its keys.
        tokenizer: the student's.
        vocab_size: ids that it can emit.
        head: the student's, as training begins; may hold its storage on rank 0 alone.
        device: where the losses are computed.
        seed: of clusters and of what is shuffled.

    Raises:
        ValueError: the blocks do not divide the state.

    Attributes:
        logits: [K, n] float32, A.
        group_of_token: [V] int64 from 0 to K - 1.
        names: of the groups.
    """

    group_of_token: Tensor

    def __init__(
        self,
        config: VirtualAttentionConfig,
        tokenizer: Any,
        vocab_size: int,
        head: OutputHead,
        device: torch.device,
        seed: int,
    ) -> None:
        super().__init__()
        if head.hidden_size % config.blocks:
            divisors = [n for n in range(2, 65) if head.hidden_size % n == 0]
            raise ValueError(
                f"dskd.virtual_attention.blocks: {config.blocks} does not divide the student's "
                f"hidden size {head.hidden_size}. Choose one of {divisors}."
            )
        self.config = config
        if config.groups == "kmeans":
            groups = by_clusters(head, config.group_count, seed, device)
        else:
            groups = by_class(token_bytes(tokenizer)[:vocab_size])
        used, groups = groups.unique(return_inverse=True)
        self.names = [f"{config.groups} {k + 1}" for k in range(len(used))]
        if config.groups == "classes":
            self.names = [CLASSES[k] for k in used.tolist()]
        if config.groups == "scrambled":
            groups = scrambled(groups, seed)
        self.logits = nn.Parameter(torch.zeros(len(used), config.blocks))
        self.register_buffer("group_of_token", groups)
        self._ids = self._members()
        self.to(device)

    def _members(self) -> tuple[Tensor, ...]:
        """[V_k] ids of each group, ascending."""
        sizes = self.group_of_token.bincount().tolist()
        return self.group_of_token.argsort(stable=True).split(sizes)

    def strength(self, step: int, steps: int) -> float:
        """λ at a step: constant, then half a cosine down to 0 at the last one.

        Args:
            step: optimizer steps made so far.
            steps: of the whole training; 0 where it is not known yet.
        """
        if self.config.leave == "merge" or not steps:
            return self.config.strength
        begin = math.floor((1 - self.config.anneal) * steps)
        if step < begin:
            return self.config.strength
        done = min(1.0, (step - begin) / (steps - 1 - begin)) if step < steps - 1 else 1.0
        return self.config.strength * 0.5 * (1 + math.cos(math.pi * done))

    def alpha(self) -> Tensor:
        """[K, n] the attention of each group, with graph."""
        return (self.logits / self.config.temperature).softmax(-1)

    def entropy(self) -> Tensor:
        """H̄, between 0 (each group attends to one block) and 1 (to all alike), with graph."""
        log_alpha = (self.logits / self.config.temperature).log_softmax(-1)
        return -(log_alpha.exp() * log_alpha).sum(-1).mean() / math.log(self.config.blocks)

    def gate(self, strength: float) -> Gate:
        """What scales the blocks of states in front of the student's head, with graph."""
        self._ids = self._ids or self._members()
        scale = 1 + strength * (self.config.blocks * self.alpha() - 1)
        return Gate(scale, self._ids)

    def examples(self, tokens: list[bytes], count: int = 12) -> list[list[str]]:
        """Some tokens of each group, those with the lowest ids that stand for text.

        Args:
            tokens: bytes of each id.
        """
        found: list[list[str]] = [[] for _ in self.names]
        for token, group in zip(tokens, self.group_of_token.tolist(), strict=False):
            if token and len(found[group]) < count:
                found[group].append(token.decode(errors="backslashreplace"))
        return found

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._ids = tuple(fn(ids) for ids in self._ids)
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._ids = ()  # groups come with a checkpoint
        super()._load_from_state_dict(*args, **kwargs)
