"""safesteer-lite: make a local instruct model safer on one consumer GPU, and show honestly what changed."""

__version__ = "0.2.0"
