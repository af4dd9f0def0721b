"""Describe where a figure was measured: processor or GPU, threads, versions, commit, load, clocks."""

from __future__ import annotations

import datetime
import functools
import hashlib
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
    "torch", "triton", "transformers", "numpy", "liger-kernel", "trl", "cut-cross-entropy", "quack-kernels",
    "flash-attn", "peft",
)  # fmt: skip


def device() -> torch.device:
    """Return the device that is measured: CUDA where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def processor() -> str:
    """Return the name of the GPU, or of the CPU with its vector instructions."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or "unknown CPU"
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as info:
            name = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), name)
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def slug() -> str:
    """Return the name of the folder for results of this kind of machine."""
    text = processor() if torch.cuda.is_available() else f"{processor()} {torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def installed(package: str) -> str | None:
    """Return the version of a package, or None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Return the versions of Python and of PACKAGES, "not installed" for those that are not."""
    packages = {package: installed(package) or "not installed" for package in PACKAGES}
    return {"python": platform.python_version(), **packages}


@functools.cache
def commit() -> str:
    """Return the short hash of the checkout, with + if tracked files other than results have changed.

    A copy without .git is identified by a hash of the sources of repo_kernels. Cached, so that it is the state when the
    process first asks.
    """
    try:
        head, changed = [
            subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for words in (
                ["rev-parse", "--short=12", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"],
            )
        ]
    except (OSError, subprocess.CalledProcessError):
        return f"unknown (no git; repo_kernels has sha256 {sources()})"
    return head + ("+" if changed else "")


def sources() -> str:
    """Return the start of a hash over the Python files of repo_kernels."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "repo_kernels").rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


@functools.cache
def load() -> float:
    """Return the load average of the minute before this process first asked: what else the machine was doing."""
    return os.getloadavg()[0]


def gpu_state() -> dict[str, str]:
    """Return clocks, power, temperature and driver of the GPU from nvidia-smi; empty where there is none."""
    fields = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu,driver_version".split(",")
    try:
        command = [
            "nvidia-smi",
            "-i",
            str(torch.cuda.current_device()),
            f"--query-gpu={','.join(fields)}",
            "--format=csv,noheader",
        ]
        line = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return {}
    return dict(zip(fields, (value.strip() for value in line.split(",")), strict=False))


def provenance() -> dict[str, Any]:
    """Return everything that a result records about where it was measured."""
    where: dict[str, Any] = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": round(load(), 2),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": versions(),
    }
    return where | ({"gpu": gpu_state()} if torch.cuda.is_available() else {})


def told(where: dict[str, Any]) -> str:
    """Return one line that describes a provenance."""
    packages = ", ".join(f"{name} {number}" for name, number in where["versions"].items() if number != "not installed")
    gpu = "".join(f", {name} {value}" for name, value in where.get("gpu", {}).items())
    return (
        f"{where['processor']}, {where['threads']} threads of {where['cores']} cores, load {where['load']}{gpu}; "
        f"{packages}; commit {where['commit']}, {where['date']}"
    )


def machine() -> str:
    """Return one line about this machine, for the head of a printed table."""
    return told(provenance())
