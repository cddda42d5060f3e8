"""Transfers from the model hub: a break costs nothing, the hub's hashes are checked, and progress counts what is there."""

from __future__ import annotations

import os
import random
import re
import threading
from pathlib import Path

import httpx
import pytest
from filelock import FileLock

from safesteer_lite.errors import DiskSpaceError, ModelError
from safesteer_lite.events import Event, Note, Progress, discard
from safesteer_lite.sources import transfer
from safesteer_lite.sources.hub import ask_hub
from safesteer_lite.sources.transfer import Download, hub_store, offered_files, partial_file
from tests.sources.local_hub import COMMIT, HUB_ID, LocalHub, hub_hash

WEIGHTS, SETTINGS = "model.safetensors", "config.json"
CONTENT = random.Random(0).randbytes(3_000_000)
DIGEST = hub_hash(WEIGHTS, CONTENT)


def download(events: list[Event] | None = None) -> Download:
    files = list(offered_files(ask_hub(HUB_ID, None)).values())
    return Download(HUB_ID, COMMIT, files, discard if events is None else events.append, "model")


@pytest.fixture
def weights(hub: type[LocalHub]) -> type[LocalHub]:
    hub.files.update({WEIGHTS: CONTENT, SETTINGS: b"{}"})
    return hub


def here() -> dict[str, int]:
    """Every file that is kept, links aside, and its size."""
    files = [path for path in hub_store(HUB_ID).rglob("*") if path.is_file() and not path.is_symlink()]
    return {path.name: path.stat().st_size for path in files}


def test_a_connection_that_breaks_is_taken_up_where_it_broke(weights: type[LocalHub]) -> None:
    weights.breaks[WEIGHTS] = [0, 1_000_000, 999, 0, 0, 0, 1]
    events: list[Event] = []
    arriving = download(events)
    arriving.fetch()
    assert weights.starts[WEIGHTS] == [0, 0, 1_000_000, *[1_000_999] * 4, 1_001_000]
    assert (arriving.folder / WEIGHTS).read_bytes() == CONTENT
    assert (arriving.folder / SETTINGS).read_bytes() == b"{}"
    assert here() == {DIGEST: 3_000_000, hub_hash(SETTINGS, b"{}"): 2}
    assert events[-1] == Progress("model", "bytes fetched", 3_000_002, 3_000_002)


def test_the_next_attempt_goes_on_and_counts_what_is_there(weights: type[LocalHub]) -> None:
    weights.breaks[WEIGHTS] = [2_000_000, *[0] * 5]
    with pytest.raises(httpx.TransportError):
        download().fetch()
    assert here() == {f"{DIGEST}.incomplete": 2_000_000}
    events: list[Event] = []
    again = download(events)
    assert again.missing == 1_000_002
    again.fetch()
    assert weights.starts[WEIGHTS][-1] == 2_000_000 and again.missing == 0
    assert all(event.done >= 2_000_000 for event in events if isinstance(event, Progress))
    assert (again.folder / WEIGHTS).read_bytes() == CONTENT
    weights.starts.clear()
    download().fetch()
    assert not weights.starts


def test_what_killed_clients_left_is_not_counted_and_is_cleared(weights: type[LocalHub]) -> None:
    blobs = hub_store(HUB_ID) / "blobs"
    blobs.mkdir(parents=True)
    old, growing, other = (
        blobs / f"{name}.incomplete" for name in (f"{DIGEST}.0a1b", f"{DIGEST}.2c3d", "f" * 64 + ".4e")
    )
    for path in (old, growing, other):
        path.write_bytes(b"x" * 500_000)
    for path in (old, other):
        os.utime(path, (1e9, 1e9))
    events: list[Event] = []
    arriving = download(events)
    assert arriving.missing == 3_000_002
    arriving.fetch()
    assert not old.exists() and growing.exists() and other.exists()
    assert events[-1] == Progress("model", "bytes fetched", 3_000_002, 3_000_002)


def test_what_another_process_fetches_is_waited_for_and_not_fetched_twice(weights: type[LocalHub]) -> None:
    first, told = download(), threading.Event()
    events: list[Event] = []

    def tell(event: Event) -> None:
        events.append(event)
        if isinstance(event, Note):
            told.set()

    store = hub_store(HUB_ID)
    lock = store.parent / ".locks" / store.name / f"{DIGEST}.lock"
    lock.parent.mkdir(parents=True)
    files = list(offered_files(ask_hub(HUB_ID, None)).values())
    second = threading.Thread(target=Download(HUB_ID, COMMIT, files, tell, "model").fetch)
    with FileLock(lock):
        second.start()
        assert told.wait(30)
    second.join()
    first.fetch()
    assert weights.starts[WEIGHTS] == [0]
    assert [event.message for event in events if isinstance(event, Note)] == [
        f"Another process is fetching {WEIGHTS}; waiting for it."
    ]


@pytest.mark.parametrize("name", [WEIGHTS, SETTINGS])
def test_what_is_not_what_the_hub_states_never_joins_the_cache(weights: type[LocalHub], name: str) -> None:
    weights.sent[name] = weights.files[name][:-1] + b"?"
    with pytest.raises(ModelError, match=re.escape(f"{name} of {HUB_ID} arrived damaged")):
        download().fetch()
    assert hub_hash(name, weights.files[name]) not in here() and not list(hub_store(HUB_ID).rglob("*.incomplete"))
    del weights.sent[name]
    arriving = download()
    arriving.fetch()
    assert (arriving.folder / name).read_bytes() == weights.files[name]


@pytest.mark.parametrize("beginning", [b"x" * 1_500_000, b"x" * 3_000_000, b"x" * 4_000_000, CONTENT])
def test_a_wrong_beginning_is_replaced_without_a_word(weights: type[LocalHub], beginning: bytes) -> None:
    partial = partial_file(HUB_ID, DIGEST)
    partial.parent.mkdir(parents=True)
    partial.write_bytes(beginning)
    arriving = download()
    arriving.fetch()
    assert (arriving.folder / WEIGHTS).read_bytes() == CONTENT
    assert (WEIGHTS in weights.starts) == (beginning != CONTENT)


def test_a_file_that_is_longer_than_stated_is_cut_off_and_refused(weights: type[LocalHub]) -> None:
    weights.sent[WEIGHTS] = CONTENT + b"x" * 20_000_000
    with pytest.raises(ModelError, match="arrived damaged"):
        download().fetch()


def test_a_hub_that_sends_whole_files_only_is_taken_as_it_is(weights: type[LocalHub]) -> None:
    weights.ranges = False
    weights.breaks[WEIGHTS] = [2_000_000]
    arriving = download()
    arriving.fetch()
    assert (arriving.folder / WEIGHTS).read_bytes() == CONTENT
    assert weights.starts[WEIGHTS] == [0, 2_000_000]


def test_a_hub_that_keeps_its_files_elsewhere_is_followed_there_each_time(weights: type[LocalHub]) -> None:
    weights.elsewhere = True
    weights.breaks[WEIGHTS] = [2_000_000]
    arriving = download()
    arriving.fetch()
    assert (arriving.folder / WEIGHTS).read_bytes() == CONTENT
    assert weights.starts[WEIGHTS] == [0, 2_000_000]


def test_a_hub_without_hashes_is_left_to_its_own_client(weights: type[LocalHub]) -> None:
    weights.hashes = False
    events: list[Event] = []
    arriving = download(events)
    arriving.fetch()
    assert (arriving.folder / WEIGHTS).read_bytes() == CONTENT
    assert events[-1] == Progress("model", "bytes fetched", 3_000_002, 3_000_002)


def test_without_links_a_file_lies_in_the_snapshot_itself(
    weights: type[LocalHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, *_: object) -> None:
        raise OSError("this system makes no links")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    download().fetch()
    assert here() == {WEIGHTS: 3_000_000, SETTINGS: 2}
    weights.starts.clear()
    download().fetch()
    assert not weights.starts


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
def test_a_full_disk_and_a_folder_that_cannot_be_written_are_told_apart_from_the_network(
    weights: type[LocalHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = partial_file(HUB_ID, DIGEST)
    partial.parent.mkdir(parents=True)
    partial.symlink_to("/dev/full")
    with pytest.raises(DiskSpaceError, match="disk ran full"):
        download().fetch()
    partial.unlink()
    partial.mkdir()
    with pytest.raises(ModelError, match="cannot be written: Is a directory"):
        download().fetch()
    assert transfer.PAUSE_SECONDS == 0
