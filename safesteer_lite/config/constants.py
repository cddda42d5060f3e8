"""Figures that were settings once, that nobody had a reason to change, and that are the same in every run now."""

from __future__ import annotations

DEPTH_LIMIT = 0.8
"""Share of the depth from which on a block is too late for the refusal direction (arXiv 2406.11717)."""
TEACHER_TOKENS = 20
"""Tokens of each answer that a steering strength is judged by (used by the demo; not compared)."""
TOP_K = 50
"""The teacher's likeliest tokens that the objective `top-k` reads: as many as the paper has safety tokens."""
CHECK_PROMPTS = 8
"""Prompts that the merged weights, loaded again, have to answer as the trained model does (this project; not compared)."""
