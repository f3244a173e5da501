"""What is said of one of the two models before its weights are loaded.

Knows skeletons, tokenizers and prepared rows; nothing of the other side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
        vocabulary: ids that its tokenizer can emit; `head_rows` that its output head has.
        trained: parameters that train.
        begins_with_bos: whether a row's first token is the beginning-of-sequence token.
        turn_end: the last supervised token of a row, where all rows agree on it.
        prompt: the tokens of one row in front of its supervised ones, as text.
        table: label -> what else there is to say, in words.
    """

    name: str
    tokenizer: str
    vocabulary: int
    head_rows: int
    trained: int
    begins_with_bos: bool
    turn_end: str | None
    prompt: str
    table: dict[str, str]


def side_facts(
    model: Any, tokenizer: Any, name: str, rows: Sequence[Mapping[str, Any]], prefix: str
) -> SideFacts:
    """The facts of a side.

    Args:
        model: its skeleton.
        rows: prepared ones, whose columns of this side begin with `prefix`.
    """
    head, size = output_head(model), vocabulary_size(tokenizer)
    rows_of_head, padding = head.weight.shape[0], max(0, head.weight.shape[0] - size)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    tied = getattr(embedding, "weight", None) is getattr(output, "weight", embedding)
    whole = sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    ids, labels = ([row[prefix + c] for row in rows] for c in ("input_ids", "labels"))
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    begins = bos is not None and all(row[0] == tokenizer.bos_token_id for row in ids)
    ends = {next(label for label in row[::-1] if label != IGNORE_INDEX) for row in labels}
    end = str(tokenizer.convert_ids_to_tokens(ends.pop())) if len(ends) == 1 else None
    begin = next(i for i, label in enumerate(labels[0]) if label != IGNORE_INDEX)
    prompt = tokenizer.decode(ids[0][:begin])
    shown = prompt if len(prompt) < 90 else f"{prompt[:86]} …"
    table = {
        "model": f"{name} ({type(base).__name__})",
        "parameters": count(whole) + (f", {count(trained)} train" if trained else ""),
        "vocabulary": f"{size:,} ids",
        "output head": f"{rows_of_head:,} × {head.hidden_size:,}"
        + (f", {padding:,} padding rows" if padding else "")
        + (", tied to the embedding" if tied else ""),
        "BOS, EOS": f"{bos or 'none'}{' (first in every row)' if begins else ''}, {eos or 'none'}",
        "a turn ends with": visible(end) if end else "(varies)",
        "a prompt reads": " ".join(map(visible, shown.split(" "))),
    }
    return SideFacts(
        name=name,
        tokenizer=tokenizer.name_or_path or type(tokenizer).__name__,
        vocabulary=size,
        head_rows=rows_of_head,
        trained=trained,
        begins_with_bos=begins,
        turn_end=end,
        prompt=prompt,
        table=table,
    )


def side_remarks(facts: SideFacts, tokenizer: Any, name: str) -> Iterator[str]:
    """What deserves attention, in words."""
    if changes := normalisations(tokenizer):
        yield (
            f"The {name}'s tokenizer changes text before it splits it ({', '.join(changes)}): "
            "rows that this changes are dropped."
        )
    if facts.head_rows < facts.vocabulary:
        yield (
            f"The {name}'s tokenizer has ids up to {facts.vocabulary - 1}, but its output "
            f"head only {facts.head_rows} rows: training will refuse this pair."
        )
