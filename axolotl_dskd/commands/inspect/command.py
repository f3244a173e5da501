"""The command itself: options to report, report to terminal, page and file, errors to words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from axolotl_dskd.commands.inspect.card import configured_for, find_card, parse_memory
from axolotl_dskd.commands.inspect.doctor import inspect_run
from axolotl_dskd.commands.inspect.shown import html_page, print_report
from axolotl_dskd.config import DSKDConfig

ReadConfig = Callable[[Path], tuple[Any, DSKDConfig]]


def run_inspect(
    read_config: ReadConfig,
    config: Path,
    gpu_memory: str | None,
    rows: int,
    html: Path | None,
    json_path: Path | None,
    probe: int | None,
    teacher: str | None,
) -> None:
    """Inspect a configuration; see the options of `axolotl-dskd inspect`.

    Raises:
        click.ClickException: the configuration or one of the options cannot be used, in words.
    """
    console = Console()
    try:
        card = find_card(parse_memory(gpu_memory) if gpu_memory else None)
        with configured_for(card):
            cfg, dskd = read_config(config)
        if not card.gpu and (cfg.bf16 or cfg.fp16):
            raise ValueError(
                f"{config} computes in {'bf16' if cfg.bf16 else 'fp16'}, which is for a GPU, and "
                "there is none here. Say which card to plan for, such as --gpu-memory 24GiB, or "
                "set bf16: false and fp16: false to train on this machine's CPU."
            )
        with console.status("tokenizers") as status:
            report = inspect_run(
                str(config),
                cfg,
                dskd,
                card=card,
                rows=rows,
                teacher=teacher,
                probe_count=probe,
                progress=status.update,
            )
        print_report(report, console)
        page = html or Path(cfg.output_dir) / "dskd-inspect.html"
        _write(page, html_page(report))
        console.print(f"The page with pictures: {page}", markup=False, highlight=False)
        if json_path is not None:
            _write(json_path, report.as_json())
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Text of rows may hold lone surrogates, which no encoding takes.
    path.write_text(text, encoding="utf-8", errors="replace")
