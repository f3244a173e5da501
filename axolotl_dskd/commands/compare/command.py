"""The command itself: from options to runs, and from their results to table and files."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from axolotl_dskd.commands.compare.launch import only_one, run_all
from axolotl_dskd.commands.compare.outcome import check_same_rows, write_json
from axolotl_dskd.commands.compare.page import html_page
from axolotl_dskd.commands.compare.picture import curves
from axolotl_dskd.commands.compare.plan import plan_runs, shown, versions
from axolotl_dskd.commands.compare.reporter import Reporter
from axolotl_dskd.commands.compare.summary import Method, as_dict, summarise
from axolotl_dskd.commands.compare.terminal import print_methods
from axolotl_dskd.config import CompareConfig

RESULTS, CURVES, PAGE = "results.json", "curves.png", "compare.html"


def run_compare(
    read_yaml: Callable[[Path], dict[str, Any]],
    config: Path,
    *,
    runs: str | None = None,
    seeds: str | None = None,
    held_out: str | None = None,
    out: Path | None = None,
    jobs: int | None = None,
    gpus_per_run: int = 1,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train all runs of a comparison and say what they found; see `axolotl-dskd compare --help`.

    Returns:
        What `results.json` holds.

    Raises:
        click.ClickException: the comparison cannot be made, or a run failed.
    """
    console = console or Console()
    try:
        raw = read_yaml(config)
        compare = _options(raw.pop("compare", None) or {}, runs, seeds, held_out)
        folder = out or Path(raw.get("output_dir") or "outputs") / "compare"
        places = _places(jobs, gpus_per_run)
        planned = plan_runs(raw, compare, folder, gpus_per_run)
        with only_one(folder) as lock, Reporter(console, [r.name for r in planned]) as reporter:
            outcomes, failures = run_all(planned, places, reporter, lock)
        remarks = check_same_rows(outcomes)
        if not outcomes:
            raise ValueError(f"all runs failed: {', '.join(f.name for f in failures)}.")
        methods = summarise(outcomes)
        remarks += _uneven(methods)
        results = {
            "config": shown(raw),
            "compare": compare.model_dump(exclude_none=True),
            "versions": versions(),
            "held_out_rows": len(outcomes[0].last.rows),
            "failed": [failure.name for failure in failures],
            "remarks": remarks,
            **as_dict(outcomes, methods),
        }
        write_json(folder / RESULTS, results)
        picture = curves(outcomes)
        (folder / CURVES).write_bytes(picture)
        page = html_page(results, planned, outcomes, methods, picture)
        (folder / PAGE).write_text(page, encoding="utf-8", errors="replace")
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    print_methods(methods, results["held_out_rows"], console)
    for remark in remarks:
        console.print(remark, markup=False, highlight=False)
    written = ", ".join(str(folder / name) for name in (RESULTS, CURVES, PAGE))
    console.print(f"Written: {written}", markup=False, highlight=False, soft_wrap=True)
    if failures:
        raise click.ClickException(
            f"{len(failures)} of {len(planned)} runs failed: {', '.join(f.name for f in failures)}."
            " The same command tries them again; the others are kept."
        )
    return results


def _options(
    block: dict[str, Any], runs: str | None, seeds: str | None, held_out: str | None
) -> CompareConfig:
    """The YAML's block with what the command line says in its place.

    Names of runs on the command line may be those of the block; others are methods.
    """
    block = CompareConfig.model_validate(block).model_dump(exclude_none=True)
    if runs is not None:
        known = block.get("runs", {})
        block["runs"] = {name: known.get(name, {}) for name in _names(runs)}
    if seeds is not None:
        try:
            block["seeds"] = [int(seed) for seed in _names(seeds)]
        except ValueError:
            raise ValueError(f"--seeds {seeds}: write whole numbers, such as 1,2,3.") from None
    if held_out is not None:
        try:
            block["held_out"] = float(held_out)
        except ValueError:
            block["held_out"] = held_out
    return CompareConfig.model_validate(block)


def _uneven(methods: Sequence[Method]) -> list[str]:
    """Which methods' means are of fewer seeds, since runs failed."""
    all_seeds = sorted({seed for method in methods for seed in method.seeds})
    return [
        f"{method.name} has means of the seeds {sorted(method.seeds)} alone, not of {all_seeds}: "
        "compare it by its differences, which are of common seeds."
        for method in methods
        if sorted(method.seeds) != all_seeds
    ]


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _places(jobs: int | None, gpus_per_run: int) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each run that may run at a time.

    Raises:
        ValueError: a run, or so many at a time, needs more GPUs than there are.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        import torch

        gpus = [str(k) for k in range(torch.cuda.device_count())]
    else:
        gpus = _names(visible)
    if not gpus:
        return [""] * (jobs or 1)
    if gpus_per_run > len(gpus):
        raise ValueError(f"--gpus-per-run {gpus_per_run}, but there are {len(gpus)} GPUs.")
    groups = [gpus[k : k + gpus_per_run] for k in range(0, len(gpus), gpus_per_run)]
    whole = [",".join(group) for group in groups if len(group) == gpus_per_run]
    if jobs is not None and jobs > len(whole):
        raise ValueError(
            f"--jobs {jobs}, but {len(gpus)} GPUs have room for {len(whole)} runs of {gpus_per_run}"
            " at a time."
        )
    return whole[:jobs]
