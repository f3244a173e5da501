"""`axolotl-dskd explain`: what the virtual attention of a training has learned, in pictures."""

from axolotl_dskd.commands.explain.command import run_explain

__all__ = ["run_explain"]
