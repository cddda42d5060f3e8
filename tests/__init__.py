"""The tests mirror the package; helpers that several of them need stand beside `conftest.py`."""

from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
