"""Checkpoint -> artifact: what can be done to a model (methods) and what should be done (search)."""
