"""Where it runs: the `slimrank` command, the Ray connection, the demo."""
