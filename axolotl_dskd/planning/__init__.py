"""What a training step holds in memory: the step itself, run on tensors without storage.

Knows models, objectives and settings; nothing of rows, configurations or reports.
"""
