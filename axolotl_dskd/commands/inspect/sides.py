"""What is said of one of the two models before its weights are loaded.

Knows skeletons, tokenizers and prepared rows; nothing of the other side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from axolotl_dskd.commands.words import count, visible
from axolotl_dskd.data.token_bytes import normalisations
from axolotl_dskd.data.tokenizers import vocabulary_size
from axolotl_dskd.models.heads import output_head
from axolotl_dskd.types import IGNORE_INDEX


@dataclass(frozen=True)
class SideFacts:
    """One model: its tokenizer, its output head, its size.

    Attributes:
        vocabulary: ids that its tokenizer can emit.
        table: label -> what there is to say, in words.
        remarks: what deserves attention, in words.
    """

    name: str
    vocabulary: int
    table: dict[str, str]
    remarks: list[str]


def side_facts(
    side: str, model: Any, tokenizer: Any, name: str, rows: Sequence[Mapping[str, Any]]
) -> SideFacts:
    """The facts of a side.

    Args:
        side: student or teacher.
        model: its skeleton; `name`: where it comes from.
        rows: prepared ones.
    """
    head, size = output_head(model), vocabulary_size(tokenizer)
    head_rows = head.weight.shape[0]
    whole = sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    prefix = "" if side == "student" else "teacher_"
    ids, labels = ([row[prefix + c] for row in rows] for c in ("input_ids", "labels"))
    bos = tokenizer.bos_token
    begins = bos is not None and all(row[0] == tokenizer.bos_token_id for row in ids)
    ends = {next(label for label in row[::-1] if label != IGNORE_INDEX) for row in labels}
    end = tokenizer.convert_ids_to_tokens(ends.pop()) if len(ends) == 1 else None
    begin = next(i for i, label in enumerate(labels[0]) if label != IGNORE_INDEX)
    prompt = tokenizer.decode(ids[0][:begin])
    shown = prompt if len(prompt) < 90 else f"{prompt[:86]} …"
    remarks = []
    if changes := normalisations(tokenizer):
        remarks.append(
            f"The {side}'s tokenizer changes text before it splits it ({', '.join(changes)}): "
            "rows that this changes are dropped."
        )
    if head_rows < size:
        remarks.append(
            f"The {side}'s tokenizer has ids up to {size - 1}, but its output head only "
            f"{head_rows} rows: training will refuse this pair."
        )
    table = {
        "model": name,
        "parameters": count(whole) + (f", {count(trained)} train" if trained else ""),
        "vocabulary": f"{size:,} ids",
        "output head": f"{head_rows:,} × {head.hidden_size:,}",
        "BOS": f"{bos or 'none'}{', first in every row' if begins else ''}",
        "EOS": tokenizer.eos_token or "none",
        # Of one row, in front of what is trained on.
        "a prompt reads": " ".join(map(visible, shown.split(" "))),
        "a turn ends with": visible(end) if end else "(varies)",
    }
    return SideFacts(name, size, table, remarks)
