"""Prompt sets, bundled and the user's own."""
