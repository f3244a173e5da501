"""`axolotl-dskd`: the commands beside Axolotl's own. Training stays `axolotl train`.

Knows how a config file becomes a validated configuration and how errors reach the terminal; the
work of each command lives with its subject. Heavy imports happen inside the commands, so `--help`
answers at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import click
import yaml

from axolotl_dskd.commands.streams import logs_on_stderr, quiet
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

    _raw(path)
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
    assert config is not None
    return cfg, config


def _raw(path: Path) -> dict[str, Any]:
    """A configuration file as it is, checked to name the plugin and to have a `dskd:` block.

    Raises:
        click.ClickException: it is none, or lacks one of the two.
    """
    raw = _yaml(path)
    if not isinstance(raw, dict):
        raise click.ClickException(
            f"{path} is no configuration: its top level is {type(raw).__name__ if raw else 'empty'}"
            ", not `key: value` lines."
        )
    if not isinstance(raw.get("dskd"), dict) or not raw["dskd"]:
        raise click.ClickException(
            f"{path} has no `dskd:` block. Add the plugin and\n"
            "dskd:\n  teacher:\n    base_model: <hub id or folder>"
        )
    named = [str(p).replace(":", ".") for p in raw.get("plugins") or []]
    if not any(p.endswith("DSKDPlugin") for p in named):
        raise click.ClickException(
            f"{path} has a `dskd:` block but does not name the plugin, so Axolotl would fine-tune "
            f"without a teacher. Add\nplugins:\n  - {PLUGIN_NAME}"
        )
    return raw


def _yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise click.ClickException(f"{path} is no readable YAML: {error}") from error


_config = click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))


_teacher = click.option("--teacher", metavar="NAME", help="Which of several teachers.")


class _CacheGroup(click.Group):
    """Subcommands, with an answer for those who name a config file right away."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does.

        Raises:
            click.UsageError: the first argument is a file, or no subcommand.
        """
        name = args[0]
        if name not in self.commands and (name.endswith((".yaml", ".yml")) or Path(name).is_file()):
            flags = [flag.removeprefix("--") for flag in args[1:]]
            wanted = next((flag for flag in flags if flag in self.commands), "write")
            others = ", ".join(sorted(self.commands.keys() - {wanted}))
            raise click.UsageError(
                f"say first what to do with the cache of {name}: "
                f"`axolotl-dskd cache {wanted} {name}` (or {others}).",
                ctx,
            )
        return super().resolve_command(ctx, args)


@main.group(cls=_CacheGroup)
def cache() -> None:
    """Hidden states of a teacher on disk: write them ahead of training, look at them, check them,
    remove what is not used."""


def _part(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, int]:
    """I/N as (I - 1, N)."""
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", value)
    if match is None or int(match[1]) > int(match[2]):
        raise click.BadParameter(f"{value!r} is no part such as 1/4", ctx, param)
    return int(match[1]) - 1, int(match[2])


@cache.command()
@_config
@click.option(
    "--part",
    default="1/1",
    callback=_part,
    metavar="I/N",
    help="Do the I-th of N parts of the rows.",
)
def write(config: Path, part: tuple[int, int]) -> None:
    """Run the teacher of CONFIG once over its data and keep its hidden states.

    Training on CONFIG then never loads the teacher's layers. What is cached already is skipped, so
    a run that was killed goes on where it was. Several may run at once: one per GPU with
    CUDA_VISIBLE_DEVICES and --part.
    """
    with _work(config) as (cfg, dskd, out):
        from axolotl_dskd.commands.cache import cached_teachers, write_cache

        for number, one in cached_teachers(dskd):
            write_cache(cfg, one, out, part=part, teacher=number)


@cache.command()
@_config
def info(config: Path) -> None:
    """Show what the cache holds, and how much of CONFIG's rows."""
    with _work(config) as (cfg, dskd, out):
        from axolotl_dskd.commands.cache import cached_teachers
        from axolotl_dskd.commands.upkeep import show_cache

        for number, one in cached_teachers(dskd):
            show_cache(cfg, one, out, teacher=number)


@cache.command()
@_config
def verify(config: Path) -> None:
    """Read every byte of the teacher's states and take out what is damaged."""
    with _work(config) as (_, dskd, out):
        from axolotl_dskd.commands.cache import cached_teachers
        from axolotl_dskd.commands.upkeep import verify_cache

        damage = [line for _, one in cached_teachers(dskd) for line in verify_cache(one)]
        for line in damage:
            click.echo(line, out)
        if damage:
            raise click.ClickException(
                f"{len(damage)} damaged files, now without their damaged parts. "
                f"`axolotl-dskd cache write {config}` computes what was lost."
            )
        click.echo("No damage.", out)


@cache.command()
@_config
@click.option("--yes", is_flag=True, help="Do not ask.")
def prune(config: Path, yes: bool) -> None:
    """List what CONFIG does not use and, when confirmed, remove it."""
    with _work(config) as (cfg, dskd, out):
        from axolotl_dskd.commands.upkeep import carry_out, prune_caches

        for plan, lines in prune_caches(cfg, dskd):
            for line in lines:
                click.echo(line, out)
            if not lines:
                click.echo("Nothing to remove.", out)
            elif yes or click.confirm(f"Remove these {plan.saved:,} bytes?", err=True):
                click.echo(carry_out(plan), out)


@contextmanager
def _work(path: Path) -> Iterator[tuple[Any, DSKDConfig, TextIO]]:
    """The configuration, its `dskd:` block and stdout; errors of the work end in one message."""
    with logs_on_stderr() as out:
        cfg, dskd = read_config(path)
        try:
            yield cfg, dskd, out
        except (ValueError, OSError) as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            raise _Interrupted(
                "interrupted. What was computed is kept; the same command goes on from there."
            ) from None


@main.command()
@_config
@click.option("--run", is_flag=True, help="Start it: this process becomes the (first) server.")
@click.option(
    "--python", default="python", show_default=True, help="Of the environment that has vLLM."
)
@_teacher
@click.argument("more", nargs=-1, type=click.UNPROCESSED)
def serve(config: Path, run: bool, python: str, teacher: str | None, more: tuple[str, ...]) -> None:
    """Print the commands that start the servers of CONFIG, each a stock vLLM: the teacher's, and
    the one that writes (`engine: {vllm: …}`).

    What follows `--` is handed on to the teacher's; --run starts that one.
    """
    with _work(config) as (cfg, dskd, out):
        from axolotl_dskd.commands.serve import (
            in_words,
            run_command,
            serve_commands,
            writer_in_words,
        )

        number, _, one = dskd.choose(teacher)
        if (writer := writer_in_words(cfg, one, python)) is not None:
            click.echo(writer, out)
            if one.one_teacher.server is None and not run:
                return
        commands = serve_commands(cfg, one, python, more, number)
        for command in commands.values():
            click.echo(in_words(one, command), out)
        if run:
            out.flush()
            run_command(one, *next(iter(commands.items())))


@main.command()
@_config
@click.option("--gpu-memory", metavar="SIZE", help="Plan for a card of this size, such as 24GiB.")
@click.option("--rows", default=200, show_default=True, type=click.IntRange(1), help="Per dataset.")
@click.option(
    "--html", type=click.Path(dir_okay=False, path_type=Path), help="Where the page goes."
)
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
@_teacher
def inspect(**options: Any) -> None:
    """Tokenizer pair, sample of your rows and memory plan of CONFIG, before anything is trained."""
    with quiet():
        from axolotl_dskd.commands.inspect import run_inspect

        run_inspect(read_config, **options)


@main.command()
@_config
@click.option("--rows", default=32, show_default=True, type=click.IntRange(1), help="In all.")
@_teacher
def quantization(config: Path, rows: int, teacher: str | None) -> None:
    """Measure on your rows what quantising the teacher of CONFIG changes.

    Loads it whole and as configured, in 4 or 8 bits, one after the other.
    """
    with _work(config) as (cfg, dskd, out):
        from axolotl_dskd.commands.quantization import measure_quantization

        click.echo(measure_quantization(cfg, dskd, rows, teacher).words, out)


@main.command()
@_config
@click.option("--runs", metavar="NAMES", help="Methods or runs of `compare:`, such as sft,dskd.")
@click.option("--seeds", metavar="NUMBERS", help="Such as 1,2,3; default: the YAML's seed.")
@click.option("--held-out", metavar="FILE|SHARE", help="Rows to compare on; default: the YAML's.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Where all goes.")
@click.option("--jobs", type=click.IntRange(1), help="Runs at a time; default: one per GPU.")
@click.option("--gpus-per-run", default=1, show_default=True, type=click.IntRange(1))
def compare(**options: Any) -> None:
    """Train CONFIG with several methods and seeds, and compare them on held-out rows.

    What each run changes under `dskd:` stands in CONFIG's `compare:` block, or is a method's name:
    sft (no teacher), dskd (as configured), or an objective. All else is the same. Each run is an
    `axolotl train` of its own; those that are finished are not trained again, so the same command
    goes on where it was interrupted.
    """
    from axolotl_dskd.commands.compare import run_compare

    try:
        run_compare(_raw, **options)
    except KeyboardInterrupt:
        raise _Interrupted(
            "interrupted. Finished runs are kept; the same command goes on from there."
        ) from None


@main.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--against",
    metavar="RUN",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The same training without a teacher (kd_ratio: 0), or another one.",
)
@click.option(
    "--html", type=click.Path(dir_okay=False, path_type=Path), help="Where the page goes."
)
def explain(run: Path, against: Path | None, html: Path | None) -> None:
    """Draw what the virtual attention of a training learned.

    RUN is the output_dir of a training with `dskd.virtual_attention`, or its folder in a
    comparison. The page goes to RUN/dskd-explain.html.
    """
    from axolotl_dskd.commands.explain import run_explain

    for line in run_explain(run, against=against, html=html):
        click.echo(line)
