"""Policy gradient on the student's own text."""

from axolotl_dskd.objectives.policy.objective import Policy

__all__ = ["Policy"]
