"""How faithful a quantised teacher is to its unquantised form, on the user's own rows.

The two forms are loaded one after the other, never at once. Knows rows, heads and two models'
distributions; nothing of students.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from axolotl_dskd.config import TeacherConfig
from axolotl_dskd.models.heads import captured_head_input, output_head, single
from axolotl_dskd.output_head import OutputHead
from axolotl_dskd.teacher import load_teacher
from axolotl_dskd.types import labels_ahead, supervised_mask

#: Tokens whose two distributions are compared at once.
_CHUNK = 128

#: A row of the probe: ids and labels of the teacher's side.
ProbeRow = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Fidelity:
    """Means over the supervised teacher tokens of the probed rows.

    Attributes:
        kl: KL(unquantised ‖ quantised) per token, in nats, at temperature 1; `kl_worst`: of the
            row where it is highest.
        agreement: share of tokens where both have the same most likely token.
        cross_entropy, quantised_cross_entropy: of the rows' own tokens, in nats.
    """

    rows: int
    tokens: int
    kl: float
    kl_worst: float
    agreement: float
    cross_entropy: float
    quantised_cross_entropy: float

    def words(self, quantisation: str) -> str:
        """The numbers and what they mean."""
        return (
            f"On {self.tokens:,} supervised tokens of {self.rows} rows, the teacher in "
            f"{quantisation} differs from its unquantised form by KL {self.kl:.4f} nats a token "
            f"(worst row {self.kl_worst:.4f}) and has the same first choice on "
            f"{self.agreement:.1%} of them; cross-entropy {self.cross_entropy:.4f} unquantised, "
            f"{self.quantised_cross_entropy:.4f} quantised. {self.verdict}"
        )

    @property
    def verdict(self) -> str:
        """Whether to distil from the quantised form, in words."""
        if self.kl < 0.02 and self.agreement > 0.95:
            return "Hardly a difference: distil from it."
        if self.kl < 0.1 and self.agreement > 0.9:
            return "A small difference, usual for 4 bits: fine to distil from."
        if self.kl < 0.3:
            return (
                "A clear difference: if memory allows, use 8 bits, or no quantisation, or a "
                "smaller teacher unquantised."
            )
        return (
            "A large difference: this is another teacher than the one you chose. Use 8 bits or no "
            "quantisation."
        )


class _Body:
    """A loaded teacher: states of its supervised tokens, row by row, and its head."""

    def __init__(self, config: TeacherConfig, device: torch.device, vocab_size: int) -> None:
        self.model = load_teacher(config, device)
        self.head: OutputHead = output_head(self.model, vocab_size).frozen()

    @torch.no_grad()
    def states(self, row: ProbeRow) -> tuple[Tensor, Tensor]:
        """Final hidden states [m, D] and labels [m] of a row's supervised tokens."""
        device = self.model.get_input_embeddings().weight.device
        ids, labels = (torch.tensor([side], device=device) for side in row)
        mask = supervised_mask(labels, torch.zeros_like(ids))
        with captured_head_input(self.model) as captured:
            self.model(input_ids=ids, use_cache=False)
        return single(captured, self.model)[mask], labels_ahead(labels)[mask]


def check_quantised(config: TeacherConfig) -> None:
    """Refuse a probe of a teacher that is not quantised.

    Raises:
        ValueError: see above.
    """
    if not (config.load_in_4bit or config.load_in_8bit):
        raise ValueError(
            "--probe compares a quantised teacher with its unquantised form, but dskd.teacher has "
            "neither load_in_4bit nor load_in_8bit. Set one of them, or leave --probe out."
        )


def probe(
    config: TeacherConfig,
    rows: Sequence[ProbeRow],
    vocab_size: int,
    device: torch.device,
    progress: Callable[[str], None] = lambda _: None,
) -> Fidelity:
    """Compare the teacher as configured with the same teacher unquantised.

    Between the two loads only the unquantised form's hidden states and its head stay, on the CPU.

    Args:
        rows: teacher sides, with labels.
        vocab_size: ids that the teacher's tokenizer emits.

    Raises:
        ValueError: the teacher is not quantised, or cannot be loaded.
    """
    check_quantised(config)
    plain = config.model_copy(update={"load_in_4bit": False, "load_in_8bit": False})
    progress("loading the teacher unquantised")
    body = _Body(plain, device, vocab_size)
    full: list[Tensor] = []
    for number, row in enumerate(rows, 1):
        progress(f"unquantised teacher, row {number} of {len(rows)}")
        full.append(body.states(row)[0].cpu())
    # A copy: the head's tensors share storage with the model, which has to go.
    head = _copied(body.head)
    del body
    _free()
    progress("loading the teacher as configured")
    body = _Body(config, device, vocab_size)
    head = head.to(device)
    per_row = []
    for number, (row, states) in enumerate(zip(rows, full, strict=True), 1):
        progress(f"quantised teacher, row {number} of {len(rows)}")
        quantised, labels = body.states(row)
        per_row.append(_compare(states.to(device), head, quantised, body.head, labels))
    del body
    _free()
    sums = torch.stack(per_row)  # [rows, (tokens, kl, same, ce, ce quantised)]
    tokens, kl, same, ce, quantised_ce = sums.sum(0).tolist()
    return Fidelity(
        rows=len(rows),
        tokens=int(tokens),
        kl=kl / tokens,
        kl_worst=float((sums[:, 1] / sums[:, 0]).max()),
        agreement=same / tokens,
        cross_entropy=ce / tokens,
        quantised_cross_entropy=quantised_ce / tokens,
    )


@torch.no_grad()
def _compare(
    states: Tensor, head: OutputHead, quantised: Tensor, quantised_head: OutputHead, labels: Tensor
) -> Tensor:
    """[5] float64 sums over a row: tokens, KL, same first choice, both cross-entropies."""
    total = torch.zeros(5, dtype=torch.float64)
    for part in zip(*(t.split(_CHUNK) for t in (states, quantised, labels)), strict=True):
        log_p = head.logits(part[0]).float().log_softmax(-1)
        log_q = quantised_head.logits(part[1]).float().log_softmax(-1)
        kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        own = part[2].unsqueeze(-1)
        values = (
            torch.ones_like(kl),
            kl,
            (log_p.argmax(-1) == log_q.argmax(-1)).float(),
            -log_p.gather(-1, own).squeeze(-1),
            -log_q.gather(-1, own).squeeze(-1),
        )
        total += torch.stack([v.double().sum() for v in values]).cpu()
    return total


def _copied(head: OutputHead) -> OutputHead:
    tensors = {n: getattr(head, n) for n in ("weight", "bias", "lora_A", "lora_B")}
    return replace(head, **{n: t.cpu().clone() for n, t in tensors.items() if t is not None})


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def probe_rows(rows: Sequence[dict[str, Any]], count: int) -> list[ProbeRow]:
    """`count` teacher sides, evenly over the sampled rows."""
    step = max(1, len(rows) // count)
    chosen = rows[::step][:count]
    return [(list(r["teacher_input_ids"]), list(r["teacher_labels"])) for r in chosen]
