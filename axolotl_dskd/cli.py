"""`axolotl-dskd`: the commands beside Axolotl's own. Training stays `axolotl train`.

Knows how a config file becomes a validated configuration and how errors reach the terminal; the
work of each command lives with its subject. Heavy imports happen inside the commands, so `--help`
answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from axolotl_dskd.config import DSKDConfig


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="axolotl-dskd")
def main() -> None:
    """Dual-space knowledge distillation for Axolotl: what to do before and beside training."""


def read_config(path: Path) -> tuple[Any, DSKDConfig]:
    """Axolotl's validated configuration and its typed `dskd:` block.

    Raises:
        click.ClickException: Axolotl or we refuse the file, or it has no `dskd:` block.
    """
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
