"""What can be done to a model: each a pure function."""
