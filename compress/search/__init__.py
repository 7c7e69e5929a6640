"""What should be done to a model: profile, exact trials, objective, search."""
