"""Checkpoints, the layouts of other projects, and published weights."""
