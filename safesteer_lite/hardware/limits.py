"""What of the machine this process may use: control groups and CPU affinity. Sizes are bytes."""

from __future__ import annotations

import os
from pathlib import Path

import psutil


def read_or_empty(path: Path) -> str:
    """The text of a system file, empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _cgroup_folders(membership: Path, root: Path, controller: str) -> list[Path]:
    """The folders of every control group, innermost first, that limits this process: versions 1 and 2."""
    folders = []
    for line in read_or_empty(membership).splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):
            continue
        base = root / controller if controllers else root
        inner = base / path.strip("/")
        folders += [folder for folder in (inner, *inner.parents) if folder == base or base in folder.parents]
    return folders


def cgroup_memory(membership: Path, root: Path) -> tuple[int, int] | None:
    """Memory limit and what is left of it, bytes; None where no control group sets a limit.

    A limit of an outer group counts as well, and page cache that the kernel would give back counts as free.

    Args:
        membership: the file that names the process's groups, `/proc/self/cgroup`.
        root: where the groups are mounted, `/sys/fs/cgroup`.
    """
    names = (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    )
    limits, left = [], []
    for folder in _cgroup_folders(membership, root, "memory"):
        for limit_name, usage_name, cache_name in names:
            limit, usage = read_or_empty(folder / limit_name).strip(), read_or_empty(folder / usage_name).strip()
            # Version 1 writes "no limit" as the largest multiple of the page size.
            if not limit.isdigit() or int(limit) >= 1 << 60:
                continue
            fields = [line.split() for line in read_or_empty(folder / "memory.stat").splitlines()]
            cache = next((int(pair[1]) for pair in fields if pair[:1] == [cache_name]), 0)
            used = max(int(usage) - cache, 0) if usage.isdigit() else 0
            limits.append(int(limit))
            left.append(max(int(limit) - used, 0))
    return (min(limits), min(left)) if limits else None


def ram() -> tuple[int, int]:
    """Memory of this machine and what is left of it, within the limits of this process's control groups."""
    memory = psutil.virtual_memory()
    limits = cgroup_memory(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")) or (memory.total, memory.total)
    return min(memory.total, limits[0]), min(memory.available, limits[1])


def cgroup_cores(membership: Path, root: Path) -> float | None:
    """How many CPUs' worth of time the control groups grant; None without a limit. Arguments as in `cgroup_memory`."""
    shares = []
    for folder in _cgroup_folders(membership, root, "cpu"):
        cells = read_or_empty(folder / "cpu.max").split()
        if not cells:
            cells = [read_or_empty(folder / name).strip() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")]
        if len(cells) == 2 and cells[0].isdigit() and cells[1].isdigit() and int(cells[1]):
            shares.append(int(cells[0]) / int(cells[1]))
    return min(shares, default=None)


def usable_cores() -> int:
    """Physical cores within this process's CPU affinity and control group, at least 1."""
    if hasattr(os, "sched_getaffinity"):
        cpus = os.sched_getaffinity(0)
        # Two hardware threads of one core list the same siblings, so distinct lists are distinct cores.
        topology = Path("/sys/devices/system/cpu")
        siblings = {
            read_or_empty(topology / f"cpu{cpu}/topology/thread_siblings_list").strip() or str(cpu) for cpu in cpus
        }
        cores = len(siblings)
    else:
        cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    granted = cgroup_cores(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return max(1, cores if granted is None else min(cores, int(granted)))
