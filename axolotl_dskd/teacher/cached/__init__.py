"""A teacher whose hidden states are kept on disk."""
