"""Runs: pre-training and fine-tuning."""
