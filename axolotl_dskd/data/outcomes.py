"""What can become of a row on its way to training, in words, and when a run must not go on.

Knows counts; nothing of how rows are tokenized or compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

KEPT, CUT, EMPTY, TOO_LONG, DIFFERENT = "kept", "cut", "empty", "teacher too long", "different text"
#: Before the two sides are compared.
UNTOKENIZED, STUDENT_LENGTH = "not tokenized", "student too long or empty"

#: More than this share of rows with different texts means that something is wrong with the pair
#: of tokenizers or templates, not with the rows.
MAX_DIFFERING_SHARE = 0.1

#: Outcome -> what it means, for people.
MEANING = {
    KEPT: "trained on as it is",
    CUT: "trained on, cut to the text that both sides supervise",
    STUDENT_LENGTH: "dropped: longer than sequence_len in student tokens, or nothing in it",
    TOO_LONG: "dropped: longer than the teacher's limit in teacher tokens",
    EMPTY: "dropped: one side supervises no text",
    DIFFERENT: "dropped: the two sides do not supervise the same text",
    UNTOKENIZED: "dropped: the dataset's `type:` made nothing of it",
}

#: Outcome -> what to look at where too many rows have it.
_REMEDY = {
    STUDENT_LENGTH: "raise sequence_len, or set excess_length_strategy: truncate",
    TOO_LONG: "raise dskd.teacher.sequence_len, or set excess_length_strategy: truncate",
    EMPTY: "the template marks nothing to train on; look at roles_to_train, train_on_inputs and "
    "the fields of the rows",
    DIFFERENT: "look at chat_template, dskd.teacher.chat_template, and whether both tokenizers "
    "keep the text as it is (no lower-casing or Unicode normalisation)",
    UNTOKENIZED: "look at the dataset's type and its fields",
}


def refusal(counts: Counter[str], examples: Sequence[str]) -> str | None:
    """Why a run on such rows stops, and what to do; None where it does not.

    Args:
        counts: outcome -> rows.
        examples: of rows whose texts differ, see `reconcile.differing_example`.
    """
    total = counts.total()
    if counts[DIFFERENT] > MAX_DIFFERING_SHARE * total:
        said = (
            f"{counts[DIFFERENT]} of {total} rows do not have the same supervised text for student "
            f"and teacher, more than {MAX_DIFFERING_SHARE:.0%}; {_REMEDY[DIFFERENT]}."
        )
        return "\n".join([said, *examples[:3]])
    if not counts[KEPT] + counts[CUT]:
        reasons = (f"{n} {MEANING[what]}; {_REMEDY[what]}." for what, n in counts.items() if n)
        return "\n".join([f"none of the {total} rows can be distilled on.", *reasons])
    return None
