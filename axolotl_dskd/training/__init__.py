"""Axolotl's trainer with a teacher: steps, what is trained beside the student, metrics."""
