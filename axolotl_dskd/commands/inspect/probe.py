"""How faithful a quantised teacher is to its unquantised form, on the user's own rows.

The two forms are loaded one after the other, never at once. Knows rows, heads and two models'
distributions; nothing of students.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from axolotl_dskd.config import TeacherConfig
from axolotl_dskd.losses import Stream
from axolotl_dskd.losses.agreement import agreement
from axolotl_dskd.objectives.base import teacher_stream
from axolotl_dskd.teacher import TeacherSpec
from axolotl_dskd.teacher.live import load_live
from axolotl_dskd.types import DualBatch, Needs, View

#: Tokens whose two distributions are compared at once.
_CHUNK = 128

#: The most nats a token and the least agreement of each verdict.
_VERDICTS = (
    (0.02, 0.95, "Hardly a difference: distil from it."),
    (0.1, 0.9, "A small difference, usual for 4 bits: fine to distil from."),
    (
        0.3,
        0.0,
        "A clear difference: if memory allows, use 8 bits, or no quantisation, or a smaller "
        "teacher unquantised.",
    ),
)
_ANOTHER = (
    "A large difference: this is another teacher than the one you chose. Use 8 bits or no "
    "quantisation."
)


@dataclass(frozen=True)
class ProbeResult:
    """Means over the supervised teacher tokens of the probed rows.

    Attributes:
        bits: of the quantised form.
        kl: KL(unquantised ‖ quantised) per token, in nats, at temperature 1; `kl_worst`: of the
            row where it is highest.
        agreement: share of tokens where both have the same most likely token.
        cross_entropy, quantised_cross_entropy: of the rows' own tokens, in nats.
    """

    bits: int
    rows: int
    tokens: int
    kl: float
    kl_worst: float
    agreement: float
    cross_entropy: float
    quantised_cross_entropy: float

    @property
    def words(self) -> str:
        """The numbers, and whether to distil from the quantised form."""
        verdicts = (text for kl, same, text in _VERDICTS if self.kl < kl and self.agreement > same)
        return (
            f"On {self.tokens:,} supervised tokens of {self.rows} rows, the teacher in {self.bits} "
            f"bits differs from its unquantised form by KL {self.kl:.4f} nats a token (worst row "
            f"{self.kl_worst:.4f}) and has the same first choice on {self.agreement:.1%} of them; "
            f"cross-entropy {self.cross_entropy:.4f} unquantised, "
            f"{self.quantised_cross_entropy:.4f} quantised. {next(verdicts, _ANOTHER)}"
        )


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


def probe_rows(rows: Sequence[dict[str, Any]], count: int) -> Sequence[dict[str, Any]]:
    """`count` rows, evenly over the sampled ones."""
    return rows[:: max(1, len(rows) // count)][:count]


def probe(
    config: TeacherConfig,
    rows: Sequence[dict[str, Any]],
    vocab_size: int,
    device: torch.device,
    progress: Callable[[str], None] = lambda _: None,
) -> ProbeResult:
    """Compare the teacher as configured with the same teacher unquantised.

    Between the two loads only the unquantised form's hidden states and its head stay, on the CPU.

    Args:
        rows: prepared ones, of which the teacher's side is read.
        vocab_size: ids that the teacher's tokenizer emits.

    Raises:
        ValueError: the teacher cannot be loaded.
    """

    def views(form: TeacherConfig, name: str) -> Iterator[View]:
        progress(f"loading the teacher {name}")
        teacher = load_live(TeacherSpec(form, vocab_size, device))
        for number, row in enumerate(rows, 1):
            progress(f"teacher {name}, row {number} of {len(rows)}")
            yield teacher(_batch(row, device), Needs())

    unquantised = config.model_copy(update={"load_in_4bit": False, "load_in_8bit": False})
    states, head = [], None
    for view in views(unquantised, "unquantised"):
        stream = teacher_stream(view)
        states.append(stream.hidden.cpu())
        # A copy, where there is no other device: its tensors are the model's, which has to go.
        head = head or deepcopy(stream.head.to(torch.device("cpu")))
    assert head is not None
    del view, stream
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without CUDA
    head = head.to(device)
    per_row = [
        _sums(Stream(plain.to(device), head), teacher_stream(view), view.tokens.labels)
        for view, plain in zip(views(config, "as configured"), states, strict=True)
    ]
    sums = torch.stack(per_row)  # [rows, (tokens, kl, same, ce, ce quantised)]
    tokens, *totals = sums.sum(0).tolist()
    worst = float((sums[:, 1] / sums[:, 0]).max())
    kl, *others = (total / tokens for total in totals)
    bits = 4 if config.load_in_4bit else 8
    return ProbeResult(bits, len(rows), int(tokens), kl, worst, *others)


def _batch(row: dict[str, Any], device: torch.device) -> DualBatch:
    """A row's teacher side; the student's is empty."""
    columns = "teacher_input_ids", "teacher_labels"
    ids, labels = (torch.tensor([row[column]], device=device) for column in columns)
    nothing = ids[:0]
    return DualBatch(nothing, nothing, nothing, ids, labels, torch.ones_like(ids))


@torch.no_grad()
def _sums(plain: Stream, quantised: Stream, labels: Tensor) -> Tensor:
    """[5] float64 over a row: tokens, KL, same first choice, both cross-entropies."""
    total = torch.zeros(5, dtype=torch.float64)
    for at in torch.arange(len(labels)).split(_CHUNK):
        both = [s.head.logits(s.hidden[at]).float().log_softmax(-1) for s in (plain, quantised)]
        ces = (-log.gather(-1, labels[at, None])[:, 0] for log in both)
        values = (torch.ones(len(at)), *agreement(*both), *ces)
        total += torch.stack([value.double().sum().cpu() for value in values])
    return total
