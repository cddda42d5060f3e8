"""GGUF files: converted, quantised, run and compared in llama.cpp."""

import sys

INSTALL = f'Run: "{sys.executable}" -m pip install "safesteer-lite[gguf]"'
"""How a user gets what the extra [gguf] brings, for the Python that runs now: a bare `pip` may be another one's."""
