"""The campaign's luck: one seed, which a failure names together with the one line that makes it happen again."""

from __future__ import annotations

import os
import random
from collections.abc import Generator
from typing import Any

import pytest

from safesteer_lite.runs.folder import RunFolder
from tests.stages.test_resume import result_of

SEED = int(os.environ.get("SAFESTEER_LITE_TEST_SEED", "1"))


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> random.Random:
    """Random choices that depend on the seed and the test's name with its number, and on no other test."""
    return random.Random(f"{SEED} {request.node.nodeid}")


@pytest.fixture
def told() -> list[str]:
    """What a test did and saw, in its own words; shown where it fails."""
    return []


@pytest.fixture(scope="session")
def undisturbed(planted_run: RunFolder) -> dict[str, Any]:
    """What a run ends with that nothing disturbed."""
    return result_of(planted_run)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        report.sections.append(("what happened", "\n".join(getattr(item, "funcargs", {}).get("told", []))))
        again = f"SAFESTEER_LITE_TEST_SEED={SEED} python -m pytest -m faults '{item.nodeid}'"
        report.sections.append(("again", again))
    return report
