"""Processor, cores and memory as far as this process may use them: /proc and control groups on Linux, macOS's tools there.

Nothing raises: what a system does not tell is "", None or the careful guess. `root` is where /proc and /sys are looked for.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

KNOWN_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
TOOL_TIMEOUT_S = 5.0


def processor(root: Path) -> tuple[str, tuple[str, ...]]:
    """(model, known flags). Flags are those that every core has."""
    text = _read(root / "proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    sets = [set(line.split()) for line in re.findall(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)]
    flags = set.intersection(*sets) if sets else set()
    name = named[1].strip() if named else output_of("sysctl", "-n", "machdep.cpu.brand_string")
    return name or platform.processor() or platform.machine(), tuple(flag for flag in KNOWN_FLAGS if flag in flags)


def usable_cores(root: Path) -> int:
    """Cores that affinity and control groups leave this process, at least 1."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _cgroups(root, "cpu"):
        words = _read(folder / "cpu.max").split() or [_read(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
        quota, period = (_number(word) for word in (words if len(words) == 2 else ("", "")))
        if quota and period:
            usable = min(usable, quota // period)
    return max(usable, 1)


def memory(root: Path) -> tuple[int | None, int | None]:
    """(total, available) bytes: the machine's, or what the tightest control group leaves."""
    lines: dict[str, str] = dict(re.findall(r"^(\w+):\s+(\d+) kB$", _read(root / "proc/meminfo"), re.MULTILINE))
    total, free = (int(lines[key]) * 1024 if key in lines else None for key in ("MemTotal", "MemAvailable"))
    if total is None:
        total = _number(output_of("sysctl", "-n", "hw.memsize"))
        free = _free_by_vm_stat(output_of("vm_stat"))
    for limit, used in _memory_limits(root):
        total = limit if total is None else min(total, limit)
        free = max(limit - used, 0) if free is None else min(free, max(limit - used, 0))
    return total, free


def _memory_limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, used) of each control group that has a limit; file cache that can be dropped is not use."""
    for folder in _cgroups(root, "memory"):
        for limit_name, used_name, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, used = _number(_read(folder / limit_name)), _number(_read(folder / used_name))
            if limit is not None and used is not None and limit < 2**60:  # version 1 writes a huge number for "none"
                dropped = re.search(rf"^{cache} (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
                yield limit, used - (int(dropped[1]) if dropped else 0)


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """The folders that may limit this process: its control group and all above it. Inside a container the path that
    /proc names may not exist; its mount point does."""
    base = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if names and controller not in names.split(","):
            continue
        mount = base / controller if names else base
        own = mount / path.strip("/")
        yield from (folder for folder in (own, *own.parents) if folder == mount or mount in folder.parents)


def _free_by_vm_stat(text: str) -> int | None:
    """Available bytes by macOS's vm_stat: pages that are free, inactive or speculative."""
    size = re.search(r"page size of (\d+) bytes", text)
    pages = re.findall(r"^Pages (?:free|inactive|speculative):\s+(\d+)\.$", text, re.MULTILINE)
    return int(size[1]) * sum(map(int, pages)) if size and pages else None


def output_of(*command: str) -> str:
    """What a program prints, stripped; "" when it is absent, fails or takes too long."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=TOOL_TIMEOUT_S, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode("utf-8", "replace").strip() if done.returncode == 0 else ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _number(text: str) -> int | None:
    text = text.strip()
    return int(text) if text.isdecimal() and len(text) < 20 else None
