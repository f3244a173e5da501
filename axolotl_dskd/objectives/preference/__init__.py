"""Preference distillation: of two answers, or of two tokens, the student learns to prefer one."""

from axolotl_dskd.objectives.preference.objective import Preference

__all__ = ["Preference"]
