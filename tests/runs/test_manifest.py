"""The manifest: canonical fingerprints, damaged content, and files that are no longer what was published."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from safesteer_lite.errors import RunFolderError
from safesteer_lite.runs.creation import create_run
from safesteer_lite.runs.folder import RunFolder, open_run
from safesteer_lite.runs.listing import list_runs
from safesteer_lite.runs.manifest import fingerprint
from tests.runs.run_files import files_of, publish


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return create_run(tmp_path / "runs", "tiny")


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


@pytest.mark.parametrize(
    ("written", "instead"),
    [
        ('"layer": 3', '"layer": 7'),
        ('"layer": 3', '"layer": NaN'),
        ('"layer": 3', '"layer": [' + "[" * 100_000),
        ('"layer": 3', '"place": 3'),
        ('"result": {', '"outcome": {'),
        ('"seconds": ', '"seconds": 1'),
        ('"01-baseline"', '"02-baseline"'),
        ('"a.bin"', '"../a.bin"'),
        ('"size": 1000', '"size": 999'),
        ('"run_date": "2', '"run_date": "3'),
        ('"planned": []', '"planned": ["baseline"]'),
        ('"sum": "', '"sum": "0'),
    ],
)
def test_an_edited_manifest_is_refused_and_named(run: RunFolder, written: str, instead: str) -> None:
    with run.publish("baseline", 1, "x") as publication:
        (publication.path / "a.bin").write_bytes(b"x" * 1000)
        publication.result["layer"] = 3
    path = run.path / "manifest.json"
    assert path.read_text().count(written) == 1
    path.write_text(path.read_text().replace(written, instead))
    with pytest.raises(RunFolderError, match=r"manifest\.json, the list of this run's results, is damaged") as caught:
        open_run(run.path)
    assert "Restore it from a copy" in caught.value.hint
    assert "is damaged" in list_runs(run.path.parent)[0].damage


def test_a_manifest_of_the_first_versions_is_read(run: RunFolder) -> None:
    """They wrote no sum, no date and no hash of the settings; their types are looked at one by one."""
    publish(run, "baseline", 1, "x")
    document = json.loads((run.path / "manifest.json").read_text())
    for name in ("sum", "run_date", "config_sha256", "made_from", "loaded"):
        del document[name]
    (run.path / "manifest.json").write_text(json.dumps(document))
    assert run.verify("baseline") == []
    assert run.manifest.run_date == document["created"][:10]
    run.config_path.write_text("anything = 1\n")
    assert run.settings() == "anything = 1\n"
    for name, value in (("../a.bin", None), ("/etc/passwd", None), ("a.bin", "many")):
        damaged = json.loads(json.dumps(document))
        files = damaged["stages"]["baseline"]["artifacts"]
        files[name] = {"size": value or 1, "sha256": files["a.bin"]["sha256"]}
        (run.path / "manifest.json").write_text(json.dumps(damaged))
        with pytest.raises(RunFolderError, match="is damaged"):
            open_run(run.path)
