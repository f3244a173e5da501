"""`axolotl-dskd quantization`: how faithful a quantised teacher is to its unquantised form.

Measured on the user's own rows. The two forms are loaded one after the other, never at once. Knows
rows, heads and two models' distributions; nothing of students.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from axolotl.loaders import load_tokenizer

from axolotl_dskd.commands.sample import Sample, sample_rows
from axolotl_dskd.config import DSKDConfig, TeacherConfig, loading
from axolotl_dskd.data.outcomes import refusal
from axolotl_dskd.data.tokenizers import load_teacher_tokenizer, vocabulary_size
from axolotl_dskd.evaluation.agreement import TeacherAgreement
from axolotl_dskd.losses import Budget
from axolotl_dskd.teacher import TeacherSpec
from axolotl_dskd.teacher.live import load_live
from axolotl_dskd.teacher.part import of_rows
from axolotl_dskd.types import Needs, View

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


class QuantizationLoss(NamedTuple):
    """Means over the supervised teacher tokens of the rows.

    Attributes:
        kl: KL(unquantised ‖ quantised) per token, in nats, at temperature 1.
        agreement: share of tokens where both have the same most likely token.
    """

    rows: int
    tokens: int
    kl: float
    agreement: float

    @property
    def words(self) -> str:
        """The numbers, and whether to distil from the quantised form."""
        verdicts = (text for kl, same, text in _VERDICTS if self.kl < kl and self.agreement > same)
        return (
            f"On {self.tokens:,} supervised tokens of {self.rows} rows, the quantised teacher "
            f"differs from its unquantised form by KL {self.kl:.4f} nats a token and has the same "
            f"first choice on {self.agreement:.1%} of them. {next(verdicts, _ANOTHER)}"
        )


def measure_quantization(
    cfg: Any, config: DSKDConfig, count: int, teacher: str | None
) -> QuantizationLoss:
    """What quantising a configuration's teacher changes, on its own rows.

    Args:
        cfg: Axolotl's validated configuration; `config`: its `dskd:` block.
        count: rows to measure on.
        teacher: the name of the one to measure, where there are several.

    Raises:
        ValueError: the teacher is not quantised, or something cannot be loaded or used, in words.
    """
    number, _, one = config.choose(teacher)
    keys = one.one_teacher
    if not (keys.load_in_4bit or keys.load_in_8bit):
        raise ValueError(
            "there is nothing to measure: dskd.teacher has neither load_in_4bit nor load_in_8bit. "
            "Set the one that you think of using."
        )
    with loading(f"the student's tokenizer {cfg.tokenizer_config or cfg.base_model!r}"):
        tokenizer = load_tokenizer(cfg)
    whole = Sample.together(sample_rows(cfg, one, tokenizer, count=count, teacher=number))
    if not whole.kept:
        raise ValueError(refusal(whole.outcomes, whole.differing))
    size = vocabulary_size(load_teacher_tokenizer(one))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return compare_forms(keys, whole.rows, count, size, device)


def compare_forms(
    config: TeacherConfig,
    rows: Sequence[Mapping[str, Any]],
    count: int,
    vocab_size: int,
    device: torch.device,
) -> QuantizationLoss:
    """Compare the teacher as configured with the same teacher unquantised.

    Between the two loads only the unquantised form's hidden states and its head stay, on the CPU.

    Args:
        rows: prepared ones, of which the teacher's side is read; of `count` of them, evenly.
        vocab_size: ids that the teacher's tokenizer emits.

    Raises:
        ValueError: the teacher cannot be loaded.
    """
    rows = rows[:: max(1, len(rows) // count)][:count]
    batch = of_rows(rows, 0, device)

    def said(form: TeacherConfig) -> View:
        return load_live(TeacherSpec(form, vocab_size, device))(batch, Needs())

    plain = said(config.model_copy(update={"load_in_4bit": False, "load_in_8bit": False}))
    assert plain.hidden is not None and plain.head is not None
    hidden = plain.hidden.cpu()
    # A copy, where there is no other device: its tensors are the model's, which has to go.
    head = deepcopy(plain.head.to(hidden.device))
    del plain
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without CUDA
    quantised = said(config)
    plain = View(quantised.tokens, head.to(device), hidden.to(device))
    everything = range(vocab_size), range(vocab_size)
    same_tokens = torch.arange(len(plain), device=device)[:, None].expand(-1, 2)
    terms = TeacherAgreement(everything, Budget())(quantised, plain, same_tokens)
    kl, agreement = (
        float(terms[name].values.double().mean()) for name in ("teacher_kl", "teacher_agreement")
    )
    return QuantizationLoss(len(rows), len(plain), kl, agreement)
