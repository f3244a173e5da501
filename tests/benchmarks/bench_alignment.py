"""Speed of the byte alignment, and how many tokens of real tokenizers are exactly aligned.

One process, one thread. Per pair of tokenizers, on the same rows of mixed text, once:

    prepare      all of what preparing a row adds: comparing the texts, spans, pairs
    spans+pairs  of that, spans and pairs from the tokens' lengths

and in every step, for batches of eight rows:

    read         the stored columns out of the data set (in the data workers, if there are any)
    collate      from the columns of a batch: spans, exact and start pairs, groups
    use          what exact token alignment makes of the pairs: targets, states at their places
    loop: pairs  the published way to find pairs (songmzhang/DSKDv2): per row, token strings from
                 the label tensors, markers stripped, both texts grown token by token and compared
    loop: all    that, and per pair: the teacher's choice as a string looked up in the student's
                 vocabulary, the projected states of both sides written to their places

The loops are written anew here and do what the published code does between its matrix products, no
more: it looks at one element of a tensor at a time. On a GPU each such look also waits for the
device; here everything is on the CPU.

Last, the projectors' least-squares start against the pseudo-inverse by SVD.

    python tests/benchmarks/bench_alignment.py
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from axolotl_dskd.data.byte_spans import exact_pairs, tile
from axolotl_dskd.data.collator import find_matches
from axolotl_dskd.data.reconcile import SPANS, TEACHER_SPANS, Reconcile
from axolotl_dskd.data.shared_text import writes_dummy_space
from axolotl_dskd.data.token_bytes import translation
from axolotl_dskd.objectives.dual_space.align import exchange_pairs
from axolotl_dskd.objectives.dual_space.targets import teacher_targets
from axolotl_dskd.types import Matches, Side, View
from tests.support.dual_space import least_squares
from tests.support.tokenizers import FRAGMENTS, TOKENIZERS, byte_table, end_token, one_side

PAIRS = [
    ("Mistral v1", "DeepSeek"),
    ("DeepSeek", "Mistral v3"),
    ("Mistral v1", "Mistral v3"),
    ("tiny byte-level", "DeepSeek"),
]
KINDS = [kind for kind in FRAGMENTS if kind != "short"]
#: Of the states: with the narrow ones the bookkeeping shows, with the wide ones copying decides.
WIDTHS = (8, 768)
#: The projections themselves are matrix products in both forms, and left out of both.
PROJECTED: Any = SimpleNamespace(t2s=lambda states: states, s2t=lambda states: states)


def rows_of(kind: str, count: int) -> list[list[tuple[str, str]]]:
    """Rows of one kind of text, about a thousand characters each."""
    parts = FRAGMENTS[kind]
    return [
        [("Question?", " ".join(parts[(i + k) % len(parts)] for k in range(18)))]
        for i in range(count)
    ]


def stripped(tokenizer: Any, ids: Tensor) -> list[str]:
    """The strings of tokens without the marks that stand for spaces."""
    return [t.replace("▁", "").replace("Ġ", "") for t in tokenizer.convert_ids_to_tokens(ids)]


def pairs_by_strings(tokenizers: list[Any], labels: Tensor, teacher_labels: Tensor) -> list[Any]:
    """Pairs found by comparing token strings of one row: indices of both sides' tokens."""
    ours, theirs = (
        stripped(tokenizer, side)
        for tokenizer, side in zip(tokenizers, (labels, teacher_labels), strict=True)
    )
    ends = tuple(t.eos_token for t in tokenizers)
    i = j = 0
    text, other, found = "", "", []
    while i < len(ours) and j < len(theirs):
        if text == other and (ours[i] == theirs[j] or (ours[i], theirs[j]) == ends):
            found.append((i, j))
            text, other, i, j = text + ours[i], other + theirs[j], i + 1, j + 1
        elif len(text) < len(other):
            text, i = text + ours[i], i + 1
        elif len(text) > len(other):
            other, j = other + theirs[j], j + 1
        else:
            text, other, i, j = text + ours[i], other + theirs[j], i + 1, j + 1
    return found


@dataclass(frozen=True)
class Batch:
    """Rows of both sides, padded, as the loop takes them; and the same tokens compact, as we do.

    Attributes:
        labels, teacher_labels: [B, L] and [B, L'] int64, -100 where nothing is supervised.
        choices: [B, L'] int64, what the teacher would say.
        t2s, s2t: [B, L', width] and [B, L, width], projected states.
        stored: our columns of the rows.
    """

    labels: Tensor
    teacher_labels: Tensor
    choices: Tensor
    t2s: Tensor
    s2t: Tensor
    stored: list[dict[str, bytes]]

    @classmethod
    def of(cls, rows: list[dict[str, Any]], stored: list[dict[str, bytes]], width: int) -> Batch:
        """Pad rows; the teacher says the label three times in four, else something at random."""
        generator = torch.Generator().manual_seed(0)
        labels, teacher_labels = (
            pad_sequence([torch.tensor(row[c]) for row in rows], True, -100)
            for c in ("labels", "teacher_labels")
        )
        other = teacher_labels.flatten()[
            torch.randperm(teacher_labels.numel(), generator=generator)
        ]
        wrong = torch.rand(teacher_labels.shape, generator=generator) < 0.25
        choices = torch.where(wrong, other.view_as(wrong).clamp_min(0), teacher_labels)
        states = (
            torch.randn(*x.shape, width, generator=generator) for x in (teacher_labels, labels)
        )
        return cls(labels, teacher_labels, choices, *states, stored)

    def matches(self) -> Matches:
        """What the collator finds."""
        return find_matches(*([row[c] for row in self.stored] for c in (SPANS, TEACHER_SPANS)))

    def compact(self) -> tuple[Side, View, Tensor, Tensor]:
        """Student and teacher tokens with their states, and the teacher's choices."""
        ours, theirs = self.labels != -100, self.teacher_labels != -100
        student, teacher = (
            Side(y[mask], y[mask], torch.where(mask)[0])
            for y, mask in ((self.labels, ours), (self.teacher_labels, theirs))
        )
        hidden = self.t2s[theirs]
        signal = View(teacher, hidden=hidden, embedded=(hidden, hidden))
        return student, signal, self.s2t[ours], self.choices[theirs]


def loop_pairs(batch: Batch, tokenizers: list[Any]) -> int:
    """Number of pairs of a batch, row by row."""
    found = 0
    for labels, teacher_labels in zip(batch.labels, batch.teacher_labels, strict=True):
        ours, theirs = (torch.where(y != -100)[0] for y in (labels, teacher_labels))
        sides = labels[ours[0] : ours[-1] + 1], teacher_labels[theirs[0] : theirs[-1] + 1]
        found += len(pairs_by_strings(tokenizers, *sides))
    return found


def loop_all(batch: Batch, tokenizers: list[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Targets [B, L] and the projected states where they belong, pair by pair."""
    student, teacher = tokenizers
    t2s, s2t = torch.zeros_like(batch.s2t), torch.zeros_like(batch.t2s)
    targets = torch.full_like(batch.labels, -100)
    for row, (labels, teacher_labels) in enumerate(
        zip(batch.labels, batch.teacher_labels, strict=True)
    ):
        ours, theirs = (torch.where(y != -100)[0] for y in (labels, teacher_labels))
        sides = labels[ours[0] : ours[-1] + 1], teacher_labels[theirs[0] : theirs[-1] + 1]
        choices, said = batch.choices[row][theirs[0] : theirs[-1] + 1], [-100] * len(sides[0])
        for i, j in pairs_by_strings(tokenizers, *sides):
            word = teacher.convert_ids_to_tokens([choices[j]])
            if choices[j] == teacher.eos_token_id:
                said[i] = student.eos_token_id
            else:
                index = student.convert_tokens_to_ids(word)[0]
                if index is None:
                    continue
                said[i] = index
            s2t[row, j + theirs[0]] = batch.s2t[row, i + ours[0]]
            t2s[row, i + ours[0]] = batch.t2s[row, j + theirs[0]]
        targets[row, ours[0] : ours[-1] + 1] = torch.tensor(said)
    return targets, t2s, s2t


def each(run: Callable[..., Any], *sequences: Any) -> list[Any]:
    """`run` on the first of each sequence, on the second, …"""
    return [run(*arguments) for arguments in zip(*sequences, strict=True)]


def use(compact: Any, matches: Matches, table: Tensor) -> tuple[Tensor, Any]:
    """What `loop_all` returns, from collated pairs, by the package's own functions."""
    student, signal, hidden, choices = compact
    pairs = matches.exact
    targets = teacher_targets(choices[pairs[:, 1]], pairs, student, signal.tokens, table)
    return targets, exchange_pairs(View(student, hidden=hidden), signal, pairs, PROJECTED)


def seconds(run: Callable[[], Any]) -> float:
    """Fastest of three."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


def main() -> None:
    """Print the tables."""
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}")
    print("\nShare of the student's tokens that are exactly aligned (found by the loop)")
    print(f"{'student <- teacher':36}" + "".join(f"{kind:>22}" for kind in KINDS))
    speeds = []
    for student, teacher in PAIRS:
        tokenizers, tables = (
            [TOKENIZERS[n]() for n in (student, teacher)],
            [byte_table(n) for n in (student, teacher)],
        )
        for name, tokenizer in zip((student, teacher), tokenizers, strict=True):
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end_token(name))
        dummy = [writes_dummy_space(t, b) for t, b in zip(tokenizers, tables, strict=True)]
        reconcile = Reconcile(*tables, 1 << 20, False, *dummy)
        cells, all_rows, made = [], [], []
        for kind in KINDS:
            sides = [
                [one_side(n, turns) for n in (student, teacher)] for turns in rows_of(kind, 60)
            ]
            rows = [
                {"input_ids": a, "labels": b, "teacher_input_ids": c, "teacher_labels": e}
                for (a, b), (c, e) in sides
            ]
            out = [reconcile(row) for row in rows]
            assert {row["dskd_status"] for row in out} == {"kept"}
            stored = [[row[column] for row in out] for column in (SPANS, TEACHER_SPANS)]
            matches = find_matches(*stored)
            tokens, paired = len(matches.spans), len(matches.exact)
            by_loop = sum(len(pairs_by_strings(tokenizers, *labelled(row))) for row in rows)
            cells.append(f"{paired / tokens:.1%} ({by_loop / tokens:.1%})")
            all_rows += rows
            made += out
        print(f"{f'{student} <- {teacher}':36}" + "".join(f"{cell:>22}" for cell in cells))
        # English, where the loop finds its pairs, and all kinds.
        of_kind = len(all_rows) // len(KINDS)
        for kinds, count in (("English", of_kind), ("all", len(all_rows))):
            found = speed(reconcile, tokenizers, tables, all_rows[:count], made[:count])
            speeds.append((f"{student} <- {teacher}, {kinds}", found))
    print("\nStudent tokens a second, one thread (numbers in a state)")
    print(f"{'student <- teacher, rows':38}" + "".join(f"{name:>16}" for name in speeds[0][1]))
    for name, rates in speeds:
        print(f"{name:38}" + "".join(f"{rate:>16,.0f}" for rate in rates.values()))
    print("\nTimes faster than the published loop")
    ratios = [f"a step / all ({width})" for width in WIDTHS]
    ratios = ["prepare / pairs", "spans+pairs / pairs", "read+collate / pairs", *ratios]
    print(f"{'student <- teacher, rows':38}" + "".join(f"{ratio:>22}" for ratio in ratios))
    for name, rates in speeds:
        stored = 1 / (1 / rates["read"] + 1 / rates["collate"])
        times = [rates[side] / rates["loop: pairs"] for side in ("prepare", "spans+pairs")]
        times.append(stored / rates["loop: pairs"])
        for width in WIDTHS:
            step = 1 / (1 / stored + 1 / rates[f"use ({width})"])
            times.append(step / rates[f"loop: all ({width})"])
        print(f"{name:38}" + "".join(f"{ratio:>21.1f}x" for ratio in times))

    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(20_000, n, generator=generator) for n in (576, 896))
    began = time.perf_counter()
    exact = torch.linalg.pinv(x.double()) @ y.double()
    middle = time.perf_counter()
    ours = least_squares(x, y)
    end = time.perf_counter()
    print(
        f"\nLeast squares over 20,000 tokens, 576 -> 896: {end - middle:.2f} s, pseudo-inverse "
        f"{middle - began:.2f} s ({(middle - began) / (end - middle):.1f}x), "
        f"relative difference {float((ours - exact).norm() / exact.norm()):.1e}"
    )


def labelled(row: dict[str, Any]) -> list[Tensor]:
    """Supervised ids of both sides."""
    return [torch.tensor([y for y in row[c] if y != -100]) for c in ("labels", "teacher_labels")]


def speed(
    reconcile: Reconcile,
    tokenizers: list[Any],
    tables: list[list[bytes]],
    rows: list[dict[str, Any]],
    made: list[dict[str, Any]],
) -> dict[str, float]:
    """Tokens a second of each thing that the module's docstring lists."""
    lengths = [np.array([len(b) for b in table]) for table in tables]
    arrays = [[side.numpy() for side in labelled(row)] for row in rows]
    stored = [{column: row[column] for column in (SPANS, TEACHER_SPANS)} for row in made]
    dataset = Dataset.from_list(stored)
    eight = [range(i, min(i + 8, len(rows))) for i in range(0, len(rows), 8)]
    batches = [Batch.of([rows[i] for i in at], [stored[i] for i in at], 1) for at in eight]
    matches = [batch.matches() for batch in batches]
    table = torch.tensor(translation(tokenizers[1], tokenizers[0]))
    runs: dict[str, Callable[[], Any]] = {
        "prepare": lambda: [reconcile(row) for row in rows],
        "spans+pairs": lambda: [
            exact_pairs(*(tile(n[side]) for n, side in zip(lengths, both, strict=True)))
            for both in arrays
        ],
        "read": lambda: [dataset.__getitems__(list(at)) for at in eight],
        "collate": lambda: [batch.matches() for batch in batches],
        "loop: pairs": lambda: [loop_pairs(batch, tokenizers) for batch in batches],
    }
    tokens = sum(len(both[0]) for both in arrays)
    found = {name: tokens / seconds(run) for name, run in runs.items()}
    for width in WIDTHS:
        wide = [Batch.of([rows[i] for i in at], [stored[i] for i in at], width) for at in eight]
        compact = [batch.compact() for batch in wide]
        everything: dict[str, Callable[[], Any]] = {
            "use": partial(each, partial(use, table=table), compact, matches),
            "loop: all": partial(each, partial(loop_all, tokenizers=tokenizers), wide),
        }
        found |= {f"{name} ({width})": tokens / seconds(run) for name, run in everything.items()}
    return found


if __name__ == "__main__":
    main()
