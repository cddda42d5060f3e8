"""An export is whole, kept aside, or not there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from safesteer_lite.errors import DiskSpaceError, ExportError
from safesteer_lite.export.folder import exported
from safesteer_lite.export.weights.verify import FailedCheck


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_good_end_gives_the_name(tmp_path: Path) -> None:
    with exported(tmp_path / "out") as draft:
        (draft / "a.gguf").write_bytes(b"1")
        assert names(tmp_path) == ["out.safesteer-draft", "out.safesteer-draft/a.gguf"]
    assert names(tmp_path) == ["out", "out/a.gguf"]


def test_a_failed_check_keeps_the_files_under_another_name_and_says_which(tmp_path: Path) -> None:
    for name in ("out.failed-check", "out.failed-check-2"):
        with pytest.raises(FailedCheck) as caught, exported(tmp_path / "out") as draft:
            (draft / "a.gguf").write_bytes(b"1")
            raise FailedCheck("It answers nonsense.", "Export again.")
        assert str(tmp_path / name) in caught.value.hint and caught.value.hint.startswith("Export again.")
    assert names(tmp_path) == [
        *("out.failed-check", "out.failed-check-2", "out.failed-check-2/a.gguf", "out.failed-check/a.gguf")
    ]


@pytest.mark.parametrize(
    ("raised", "expected", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), DiskSpaceError, "disk ran full"),
        (PermissionError(errno.EACCES, "Permission denied"), ExportError, "could not be written"),
        (ExportError("The converter failed."), ExportError, "The converter failed"),
        (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
    ],
)
def test_any_other_end_leaves_nothing(
    tmp_path: Path, raised: BaseException, expected: type[BaseException], told: str
) -> None:
    with pytest.raises(expected, match=told), exported(tmp_path / "out") as draft:
        (draft / "a.gguf").write_bytes(b"1")
        raise raised
    assert names(tmp_path) == []


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs a user whom rights hold back")
def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ExportError, match="could not be written"), exported(tmp_path / "out"):
        pass
    tmp_path.chmod(0o700)


def test_a_place_below_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ExportError, match="could not be written"), exported(tmp_path / "file" / "out"):
        pass


def test_what_a_killed_export_left_goes_and_what_others_left_stays(tmp_path: Path) -> None:
    left = tmp_path / "out.safesteer-draft"
    for name in (
        "work/merged/merge.json",
        "work/merged.safesteer-draft/merge.json",
        "work/16-bit.gguf",
        "work/other/a",
        "m-Q8_0.gguf",
        "m-Q4_K_M.gguf.tmp",
        "Modelfile.Q4_K_M",
        "README.md",
    ):
        (left / name).parent.mkdir(parents=True, exist_ok=True)
        (left / name).write_bytes(b"half")
    with exported(tmp_path / "out") as draft:
        # Merged weights are what takes long, and the merge knows how to check them.
        kept = [
            *("work", "work/merged", "work/merged.safesteer-draft", "work/merged.safesteer-draft/merge.json"),
            "work/merged/merge.json",
        ]
        assert names(draft) == kept
    assert names(tmp_path / "out") == []
    own = tmp_path / "other.safesteer-draft"
    own.mkdir()
    (own / "thesis.txt").write_text("mine")
    with pytest.raises(ExportError, match="in the way"), exported(tmp_path / "other"):
        pass
    assert (own / "thesis.txt").read_text() == "mine"


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_what_a_link_in_a_draft_leads_to_stays(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    (mine / "merged").mkdir(parents=True)
    (mine / "letter.txt").write_text("dear")
    draft = tmp_path / "out.safesteer-draft"
    draft.mkdir()
    (draft / "work").symlink_to(mine)
    (draft / "README.md").symlink_to(mine / "letter.txt")
    with exported(tmp_path / "out") as draft:
        assert names(draft) == []
    draft.mkdir()
    (draft / "work").mkdir()
    (draft / "work" / "merged").symlink_to(mine)
    (draft / "work" / "16-bit.gguf").symlink_to(mine / "letter.txt")
    with exported(tmp_path / "second-out"), exported(tmp_path / "out-again"):
        pass
    (tmp_path / "out").rmdir()
    with exported(tmp_path / "out") as draft:
        assert names(draft) == ["work"]
    draft.parent.joinpath("link.safesteer-draft").symlink_to(mine)
    with pytest.raises(ExportError, match="in the way"), exported(tmp_path / "link"):
        pass
    assert names(mine) == ["letter.txt", "merged"] and (mine / "letter.txt").read_text() == "dear"


def test_a_folder_of_ones_own_that_is_called_tmp_is_no_draft(tmp_path: Path) -> None:
    own = tmp_path / "out.tmp"
    own.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (own / name).write_bytes(b"mine")
    with exported(tmp_path / "out"):
        pass
    assert names(own) == ["config.json", "model.safetensors", "tokenizer.json"]
