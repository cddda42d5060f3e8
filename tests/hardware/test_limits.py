"""Control groups of both versions, from planted files."""

from __future__ import annotations

from pathlib import Path

from safesteer_lite.hardware.limits import cgroup_cores, cgroup_memory
from tests.hardware.examples import write


def test_control_groups_of_version_2_and_their_parents(tmp_path: Path) -> None:
    membership, root = tmp_path / "membership", tmp_path / "groups"
    membership.write_text("0::/outer/inner\n")
    write(root / "outer", memory__max="8000", memory__current="5000", memory__stat="anon 10\ninactive_file 1000")
    write(root / "outer" / "inner", memory__max="max", memory__current="200", cpu__max="150000 100000")
    write(root / "elsewhere", memory__max="10", memory__current="1")
    # The outer group limits, and its page cache counts as free: 8000 - (5000 - 1000).
    assert cgroup_memory(membership, root) == (8000, 4000)
    assert cgroup_cores(membership, root) == 1.5


def test_control_groups_of_version_1(tmp_path: Path) -> None:
    membership, root = tmp_path / "membership", tmp_path / "groups"
    membership.write_text("5:memory:/a\n4:cpu,cpuacct:/a\n1:name=systemd:/a\n")
    write(root / "memory", memory__limit_in_bytes=str((1 << 63) - 4096), memory__usage_in_bytes="9")
    write(root / "cpu", **{"cpu__cfs_quota_us": "-1", "cpu__cfs_period_us": "100000"})
    assert cgroup_memory(membership, root) is None
    assert cgroup_cores(membership, root) is None
    write(root / "memory" / "a", memory__limit_in_bytes="6000", memory__usage_in_bytes="7000")
    write(root / "cpu" / "a", **{"cpu__cfs_quota_us": "200000", "cpu__cfs_period_us": "100000"})
    assert cgroup_memory(membership, root) == (6000, 0)
    assert cgroup_cores(membership, root) == 2.0
    assert cgroup_memory(tmp_path / "no file", root) is None
