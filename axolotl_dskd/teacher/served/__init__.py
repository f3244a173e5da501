"""A teacher whose layers run in another process: a stock vLLM that gives final hidden states."""
