"""`python -m cluster` is the `slimrank` command, for a job that runs from its working directory."""

from cluster.cli import main

main()
