"""`axolotl-dskd compare`: several methods on the same rows, each in a process of its own."""

from axolotl_dskd.commands.compare.command import run_compare

__all__ = ["run_compare"]
