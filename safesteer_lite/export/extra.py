"""The extra [gguf], with what writes and runs GGUF files: how a user gets it."""

import sys

INSTALL = f'Run: "{sys.executable}" -m pip install "safesteer-lite[gguf]"'
"""For the Python that runs now: a bare `pip` may be another one's."""
