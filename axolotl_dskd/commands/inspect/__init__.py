"""`axolotl-dskd inspect`: what will happen, before anything is trained.

Joins what the trainer joins, on tokenizers, configs and a sample of rows instead of weights.
"""

from axolotl_dskd.commands.inspect.command import run_inspect

__all__ = ["run_inspect"]
