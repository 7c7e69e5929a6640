"""Artifact -> answers: ranking in process, and behind Ray Serve."""
