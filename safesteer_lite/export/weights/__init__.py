"""Merged weights: streamed safetensors, the adapter, the base, and the checks of what was written."""
