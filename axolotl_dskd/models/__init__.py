"""The models: their output heads, and the student whole or sharded."""
