"""`axolotl-dskd`: the commands beside Axolotl's own. Training stays `axolotl train`.

Knows how a config file becomes a validated configuration and how errors reach the terminal; the
work of each command lives with its subject. Heavy imports happen inside the commands, so `--help`
answers at once.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from axolotl_dskd.config import PLUGIN_NAME, DSKDConfig


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="axolotl-dskd")
def main() -> None:
    """Dual-space knowledge distillation for Axolotl: what to do before and beside training."""


def read_config(path: Path) -> tuple[Any, DSKDConfig]:
    """Axolotl's validated configuration and its typed `dskd:` block.

    Raises:
        click.ClickException: Axolotl or we refuse the file, or it has no `dskd:` block.
    """
    import yaml

    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise click.ClickException(f"{path} is no readable YAML: {error}") from error
    if not isinstance(raw, dict):
        raise click.ClickException(
            f"{path} is no configuration: its top level is {type(raw).__name__ if raw else 'empty'}"
            ", not `key: value` lines."
        )
    named = [str(p).replace(":", ".") for p in raw.get("plugins") or []]
    if raw.get("dskd") and not any(p.endswith("DSKDPlugin") for p in named):
        raise click.ClickException(
            f"{path} has a `dskd:` block but does not name the plugin, so Axolotl would fine-tune "
            f"without a teacher. Add\nplugins:\n  - {PLUGIN_NAME}"
        )
    from axolotl.cli.config import load_cfg

    try:
        cfg = load_cfg(str(path))
    except ValueError as error:  # pydantic's ValidationError is one
        raise click.ClickException(f"{path} is refused: {error}") from error
    config = DSKDConfig.of(cfg)
    if config is None:
        raise click.ClickException(
            f"{path} has no `dskd:` block. Add the plugin and\n"
            "dskd:\n  teacher:\n    base_model: <hub id or folder>"
        )
    return cfg, config


@main.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--verify", "action", flag_value="verify", help="Read every byte; take damage out.")
@click.option("--info", "action", flag_value="info", help="Show what the cache holds.")
@click.option("--prune", "action", flag_value="prune", help="Remove what CONFIG does not use.")
@click.option("--yes", is_flag=True, help="Prune without asking.")
@click.option("--part", default="1/1", metavar="I/N", help="Do the I-th of N parts of the rows.")
def cache(config: Path, action: str | None, yes: bool, part: str) -> None:
    """Run the teacher of CONFIG once over its data and keep its hidden states.

    Training on CONFIG then never loads the teacher's layers. What is cached already is skipped, so
    a run that was killed goes on where it was. Several may run at once: one per GPU with
    CUDA_VISIBLE_DEVICES and --part.
    """
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", part)
    if match is None or int(match[1]) > int(match[2]):
        raise click.BadParameter(f"{part!r} is no part such as 1/4", param_hint="--part")
    cfg, dskd = read_config(config)

    from axolotl_dskd import cache_command as work

    try:
        if action == "verify":
            damage = work.verify_cache(dskd)
            for line in damage:
                click.echo(line)
            if damage:
                raise click.ClickException(
                    f"{len(damage)} damaged files, now without their damaged parts. "
                    f"`axolotl-dskd cache {config}` computes what was lost."
                )
            click.echo("No damage.")
        elif action == "info":
            work.show_cache(cfg, dskd)
        elif action == "prune":
            plan, lines = work.prune_cache(cfg, dskd)
            for line in lines:
                click.echo(line)
            if lines and (yes or click.confirm(f"Remove these {plan.saved:,} bytes?")):
                work.carry_out(plan)
            elif not lines:
                click.echo("Nothing to remove.")
        else:
            work.write_cache(cfg, dskd, part=(int(match[1]) - 1, int(match[2])))
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error


@main.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--gpu-memory", metavar="SIZE", help="Plan for a card of this size, such as 24GiB.")
@click.option("--rows", default=200, show_default=True, type=click.IntRange(1), help="Per dataset.")
@click.option(
    "--html", type=click.Path(dir_okay=False, path_type=Path), help="Where the page goes."
)
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--probe",
    metavar="N",
    type=click.IntRange(1),
    help="Also measure what quantising the teacher changes, on N rows (loads it twice).",
)
def inspect(**options: Any) -> None:
    """Tokenizer pair, sample of your rows and memory plan of CONFIG, before anything is trained."""
    with _quiet():
        from axolotl_dskd.inspect import run_inspect

        run_inspect(read_config, **options)


@contextmanager
def _quiet() -> Iterator[None]:
    """While open, libraries log errors only, and datasets draws no bars: the report is the output.

    Entered before they are imported, since some of them log while they are.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import datasets

            bars = datasets.are_progress_bars_disabled()
            datasets.disable_progress_bars()
            yield
    finally:
        logging.disable(before)
        if not bars:
            datasets.enable_progress_bars()
