"""Where a figure was measured: processor or GPU, threads, versions, commit, load, clocks; and a name for all that."""

from __future__ import annotations

import datetime
import functools
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "torch", "triton", "transformers", "numpy", "liger-kernel", "trl", "cut-cross-entropy", "flash-attn", "peft",
)  # fmt: skip


def device() -> torch.device:
    """The device that is measured: CUDA where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def processor() -> str:
    """Name of the GPU, or of the CPU with its vector instructions."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or "unknown CPU"
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as info:
            name = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), name)
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def slug() -> str:
    """Name of the folder that results of this kind of machine go to."""
    text = processor() if torch.cuda.is_available() else f"{processor()} {torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def installed(package: str) -> str | None:
    """Its version; None where it is not."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Installed versions of what is measured and compared; "not installed" where it is not."""
    found = {package: installed(package) or "not installed" for package in PACKAGES}
    return {"python": platform.python_version(), **found}


@functools.cache
def commit() -> str:
    """Short hash of the checkout when it is first asked for, with + where tracked files but for results differ."""
    try:
        found = [
            subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for words in (
                ["rev-parse", "--short=12", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"],
            )
        ]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found[0] + ("+" if found[1] else "")


@functools.cache
def load() -> float:
    """Processes that wanted to run in the minute before this process first asked: what else the machine had to do."""
    return os.getloadavg()[0]


def gpu_state() -> dict[str, str]:
    """Clocks, power, temperature and driver of the GPU by nvidia-smi; empty where there is none."""
    fields = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu,driver_version".split(",")
    try:
        command = [
            "nvidia-smi",
            "-i",
            str(torch.cuda.current_device()),
            f"--query-gpu={','.join(fields)}",
            "--format=csv,noheader",
        ]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return {}
    return dict(zip(fields, (value.strip() for value in told.split(",")), strict=False))


def provenance() -> dict[str, Any]:
    """All of it, as it goes into a result."""
    found: dict[str, Any] = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": round(load(), 2),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": versions(),
    }
    return found | ({"gpu": gpu_state()} if torch.cuda.is_available() else {})


def told(found: dict[str, Any]) -> str:
    """One line of a provenance."""
    packages = ", ".join(f"{name} {number}" for name, number in found["versions"].items() if number != "not installed")
    gpu = "".join(f", {name} {value}" for name, value in found.get("gpu", {}).items())
    return (
        f"{found['processor']}, {found['threads']} threads of {found['cores']} cores, load {found['load']}{gpu}; "
        f"{packages}; commit {found['commit']}, {found['date']}"
    )


def machine() -> str:
    """One line for the head of a printed table."""
    return told(provenance())
