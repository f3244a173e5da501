"""What held-out rows say of a student, in numbers that need no common tokenizer.

`measure` and `scores` work on batches; `rows` and `record` on what they have found. Nothing here
knows objectives or trainers.
"""
