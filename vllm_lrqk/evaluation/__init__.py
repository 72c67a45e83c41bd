"""Evaluation: the same prompts through dense attention and LRQK, and what differs."""
