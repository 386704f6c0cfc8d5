"""Carrying out the steps that the scheduler plans, on a CPU or a GPU, and choosing their tokens."""
