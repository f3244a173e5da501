"""`axolotl-dskd`: the commands beside Axolotl's own. Training stays `axolotl train`.

Knows how a config file becomes a validated configuration and how errors reach the terminal; the
work of each command lives with its subject. Heavy imports happen inside the commands, so `--help`
answers at once.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import click
import yaml

from axolotl_dskd.config import PLUGIN_NAME, DSKDConfig


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="axolotl-dskd")
def main() -> None:
    """Dual-space knowledge distillation for Axolotl: what to do before and beside training."""


class _Interrupted(click.ClickException):
    exit_code = 130  # as shells say it of SIGINT


def read_config(path: Path) -> tuple[Any, DSKDConfig]:
    """Axolotl's validated configuration and its typed `dskd:` block.

    Raises:
        click.ClickException: Axolotl or we refuse the file, or it has no `dskd:` block.
    """
    from axolotl.cli import config as axolotl_config

    raw = _yaml(path)
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
    start_log, start_ranks = axolotl_config.prepare_debug_log, axolotl_config.prepare_optim_env
    # One would delete the log that the last training left in output_dir, the other set up the ranks
    # that the file asks for (DeepSpeed opens a process group), where this process is alone.
    axolotl_config.prepare_debug_log = lambda _cfg: ""
    axolotl_config.prepare_optim_env = lambda _cfg: None
    try:
        cfg = axolotl_config.load_cfg(str(path))
    except ValueError as error:  # pydantic's ValidationError is one
        raise click.ClickException(f"{path} is refused: {error}") from error
    finally:
        axolotl_config.prepare_debug_log = start_log
        axolotl_config.prepare_optim_env = start_ranks
    config = DSKDConfig.of(cfg)
    if config is None:
        raise click.ClickException(
            f"{path} has no `dskd:` block. Add the plugin and\n"
            "dskd:\n  teacher:\n    base_model: <hub id or folder>"
        )
    return cfg, config


def _yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise click.ClickException(f"{path} is no readable YAML: {error}") from error


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
    if action and part != "1/1":
        raise click.UsageError(f"--part is for writing the cache; --{action} looks at all of it.")
    if yes and action != "prune":
        raise click.UsageError("--yes does nothing without --prune.")
    with _logs_on_stderr() as out:
        cfg, dskd = read_config(config)

        from axolotl_dskd.commands import cache as work

        try:
            if action == "verify":
                damage = work.verify_cache(dskd)
                for line in damage:
                    click.echo(line, out)
                if damage:
                    raise click.ClickException(
                        f"{len(damage)} damaged files, now without their damaged parts. "
                        f"`axolotl-dskd cache {config}` computes what was lost."
                    )
                click.echo("No damage.", out)
            elif action == "info":
                work.show_cache(cfg, dskd, out)
            elif action == "prune":
                plan, lines = work.prune_cache(cfg, dskd)
                for line in lines:
                    click.echo(line, out)
                if lines and (
                    yes or click.confirm(f"Remove these {plan.saved:,} bytes?", err=True)
                ):
                    click.echo(work.carry_out(plan), out)
                elif not lines:
                    click.echo("Nothing to remove.", out)
            else:
                work.write_cache(cfg, dskd, out, part=(int(match[1]) - 1, int(match[2])))
        except (ValueError, OSError) as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            raise _Interrupted(
                "interrupted. What was computed is kept; the same command goes on from there."
            ) from None


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
        from axolotl_dskd.commands.inspect import run_inspect

        run_inspect(read_config, **options)


@contextmanager
def _logs_on_stderr() -> Iterator[TextIO]:
    """While open, what libraries print and log goes to stderr. Yields stdout, for the answer.

    Entered before they are imported, since they keep the stream that they find.
    """
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        import axolotl.cli  # noqa: F401

        known = (logging.getLogger(name) for name in logging.root.manager.loggerDict)
        handlers = [h for logger in (logging.root, *known) for h in logger.handlers]
        moved = [
            handler
            for handler in handlers
            if isinstance(handler, logging.StreamHandler)
            and handler.stream in (out, sys.__stdout__)
        ]
        for handler in moved:
            handler.setStream(sys.stderr)
        try:
            yield out
        finally:
            for handler in moved:
                handler.setStream(out)


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
