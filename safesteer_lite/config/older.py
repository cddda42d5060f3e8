"""What older files of settings have: names that changed, and settings that are there no longer."""

from __future__ import annotations

GONE = {
    "distill.first_layer": "became distill.depth_start, a share of the depth: divide by the model's number of blocks"
}

RENAMED = {"direction.strengths": "direction.steering_strengths"}
"""Older names, which run folders and people's own files still have."""
