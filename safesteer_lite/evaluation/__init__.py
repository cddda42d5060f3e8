"""Evaluation: what counts as a refusal, and the rates, intervals and verdict that follow from it."""
