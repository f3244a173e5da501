"""Speed of the byte alignment, and how many tokens of real tokenizers are exactly aligned.

One process, one thread. Per pair of tokenizers, on the same rows of mixed text:

    prepare      all of what preparing a row adds: comparing the texts, spans, pairs
    spans+pairs  of that, spans and pairs from the tokens' lengths
    step         what a training step does with stored pairs: collecting a batch's columns
    loop         the usual Python loop over token strings, run in every step: strings from ids,
                 markers stripped, both sides' text grown token by token and compared

Last, the projectors' least-squares start against the pseudo-inverse by SVD.

    python tests/benchmarks/bench_alignment.py
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from axolotl_dskd.data.byte_spans import exact_pairs, tile
from axolotl_dskd.data.collator import _spans_and_pairs
from axolotl_dskd.data.reconcile import EXACT_PAIRS, SPANS, TEACHER_SPANS, Reconcile
from axolotl_dskd.data.shared_text import writes_dummy_space
from axolotl_dskd.projectors import least_squares
from tests.test_byte_spans import FRAGMENTS, one_side
from tests.test_token_bytes import TOKENIZERS, _table

PAIRS = [
    ("Mistral v1", "DeepSeek"),
    ("DeepSeek", "Mistral v3"),
    ("Mistral v1", "Mistral v3"),
    ("tiny byte-level", "DeepSeek"),
]
KINDS = [kind for kind in FRAGMENTS if kind != "short"]


def rows_of(kind: str, count: int) -> list[list[tuple[str, str]]]:
    """Rows of one kind of text, about a thousand characters each."""
    parts = FRAGMENTS[kind]
    return [
        [("Question?", " ".join(parts[(i + k) % len(parts)] for k in range(18)))]
        for i in range(count)
    ]


def string_loop(student: Any, teacher: Any, ids: list[int], teacher_ids: list[int]) -> int:
    """Pairs found by comparing token strings, as a loss would do in each step."""
    ours, theirs = (
        [t.replace("▁", "").replace("Ġ", "") for t in tokenizer.convert_ids_to_tokens(side)]
        for tokenizer, side in ((student, ids), (teacher, teacher_ids))
    )
    i = j = found = 0
    text, other = "", ""
    while i < len(ours) and j < len(theirs):
        if text == other and ours[i] == theirs[j]:
            found += 1
            text, other, i, j = text + ours[i], other + theirs[j], i + 1, j + 1
        elif len(text) < len(other):
            text, i = text + ours[i], i + 1
        elif len(text) > len(other):
            other, j = other + theirs[j], j + 1
        else:
            text, other, i, j = text + ours[i], other + theirs[j], i + 1, j + 1
    return found


def seconds(run: Callable[[], Any]) -> float:
    """Fastest of five."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


def main() -> None:
    """Print both tables."""
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}")
    print("\nShare of the student's tokens that are exactly aligned (found by the loop)")
    print(f"{'student <- teacher':36}" + "".join(f"{kind:>22}" for kind in KINDS))
    speeds = []
    for student, teacher in PAIRS:
        tokenizers, tables = (
            [TOKENIZERS[n]() for n in (student, teacher)],
            [_table(n) for n in (student, teacher)],
        )
        dummy = [writes_dummy_space(t, b) for t, b in zip(tokenizers, tables, strict=True)]
        reconcile = Reconcile(*tables, 1 << 20, False, False, *dummy)
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
            tokens = sum(len(row[SPANS]) // 2 for row in out)
            paired = sum(len(row[EXACT_PAIRS]) // 2 for row in out)
            by_loop = sum(string_loop(*tokenizers, *labelled(row)) for row in rows)
            cells.append(f"{paired / tokens:.1%} ({by_loop / tokens:.1%})")
            all_rows += rows
            made += out
        print(f"{f'{student} <- {teacher}':36}" + "".join(f"{cell:>22}" for cell in cells))
        speeds.append((student, teacher, *speed(reconcile, tokenizers, tables, all_rows, made)))
    print("\nStudent tokens a second, one thread")
    names = ("prepare", "spans+pairs", "step", "loop", "step/loop", "spans+pairs/loop")
    print(f"{'student <- teacher':36}" + "".join(f"{name:>18}" for name in names))
    for student, teacher, *rates in speeds:
        ratios = rates[2] / rates[3], rates[1] / rates[3]
        cells = [f"{rate:,.0f}" for rate in rates] + [f"{ratio:.0f}x" for ratio in ratios]
        print(f"{f'{student} <- {teacher}':36}" + "".join(f"{cell:>18}" for cell in cells))

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


def labelled(row: dict[str, Any]) -> list[list[int]]:
    """Supervised ids of both sides."""
    return [[y for y in row[c] if y != -100] for c in ("labels", "teacher_labels")]


def speed(
    reconcile: Reconcile,
    tokenizers: list[Any],
    tables: list[list[bytes]],
    rows: list[dict[str, Any]],
    made: list[dict[str, Any]],
) -> list[float]:
    """Tokens a second of `prepare`, `spans+pairs`, `step` and `loop`."""
    lengths = [np.array([len(b) for b in table]) for table in tables]
    ids = [labelled(row) for row in rows]
    arrays = [[np.array(side) for side in both] for both in ids]
    columns = (SPANS, TEACHER_SPANS, EXACT_PAIRS)
    stored = [{c: row[c].tolist() for c in columns} for row in made]
    batches = [stored[i : i + 8] for i in range(0, len(stored), 8)]
    tokens = sum(len(both[0]) for both in ids)
    runs = (
        lambda: [reconcile(row) for row in rows],
        lambda: [
            exact_pairs(*(tile(n[side]) for n, side in zip(lengths, both, strict=True)))
            for both in arrays
        ],
        lambda: [_spans_and_pairs(batch) for batch in batches],
        lambda: [string_loop(*tokenizers, *both) for both in ids],
    )
    return [tokens / seconds(run) for run in runs]


if __name__ == "__main__":
    main()
