"""The manifest: canonical fingerprints, damaged content, and files that are no longer what was published."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from safesteer_lite.errors import RunFolderError
from safesteer_lite.runs.folder import RunFolder, create, list_runs, open_run
from safesteer_lite.runs.manifest import fingerprint
from tests.runs.run_files import files_of, publish


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return create(tmp_path / "runs", "tiny")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b'{"schema": 2}',
        b"[" * 100_000,
        b'{"schema": 1, "created": "x", "versions": {}, "planned": [], "stages": {"a": 3}}',
        b'{"schema": 1, "created": "x", "versions": {}, "planned": [], "stages": {"a": {"fingerprint": "f", '
        b'"folder": "../..", "seconds": 1, "artifacts": {}, "result": {}}}}',
    ],
)
def test_a_damaged_manifest_is_an_error_for_open_and_a_line_for_list(run: RunFolder, content: bytes) -> None:
    (run.path / "manifest.json").write_bytes(content)
    with pytest.raises(RunFolderError):
        open_run(run.path)
    (summary,) = list_runs(run.path.parent)
    assert (summary.name, summary.stages, summary.finished) == (run.path.name, (), False)
    assert summary.damage


def test_a_fingerprint_is_the_hash_of_canonical_json() -> None:
    # Written out by hand, so that a change of the canonical form, which would redo every user's runs, is noticed.
    expected = hashlib.sha256(b'{"parts":{"a":[1,2.5,null],"b":{"x":"\\u00e9","y":true}},"schema":1}').hexdigest()
    assert fingerprint({"b": {"y": True, "x": "é"}, "a": [1, 2.5, None]}) == expected
    assert fingerprint({"a": (1, 2.5, None), "b": {"x": "é", "y": True}}) == expected
    assert fingerprint({"a": [1, 2.5, None], "b": {"x": "e", "y": True}}) != expected
    with pytest.raises(ValueError, match="not JSON compliant"):
        fingerprint({"a": float("nan")})
    with pytest.raises(TypeError):
        fingerprint({"a": Path("x")})  # type: ignore[dict-item]


@pytest.mark.parametrize("value", [float("nan"), Path("x")])
def test_a_result_that_is_not_json_publishes_nothing(run: RunFolder, value: object) -> None:
    publish(run, "baseline", 1, "x")
    before = files_of(run.path)
    with pytest.raises((TypeError, ValueError)), run.publish("baseline", 1, "y") as publication:
        publication.result["kl"] = value
    assert files_of(run.path) == before


def test_sizes_are_always_checked_and_contents_by_verify(run: RunFolder) -> None:
    publish(run, "baseline", 1, "x")
    (run.path / "01-baseline" / "a.bin").write_bytes(b"y" * 1000)
    assert run.is_done("baseline", "x")
    assert run.verify("baseline") == ["a.bin"]
    (run.path / "01-baseline" / "a.bin").write_bytes(b"x" * 999)
    assert not run.is_done("baseline", "x")
    (run.path / "01-baseline" / "a.bin").write_bytes(b"x" * 1000)
    (run.path / "01-baseline" / "sub" / "b.txt").unlink()
    assert not run.is_done("baseline", "x")
    assert run.verify("baseline") == ["sub/b.txt"]
