"""Rows with two sides: Axolotl's own data pipeline, run for the student and for the teacher.

Knows tokenizers, rows and batches; nothing of models, heads or losses.
"""
