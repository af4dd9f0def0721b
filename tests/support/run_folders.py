"""Run the training command, and read what stands in its folder."""

import json
from pathlib import Path

from repo import train

TIME_FIELDS = ("seconds_", "tokens_per_second", "update_tokens_per_second")


def run(arguments: list[str], out: Path, *more: str) -> Path:
    """Train into `out` and return it."""
    train.run_command([*arguments, f"--out={out}", *more])
    return out


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    """Records of a file of JSON lines."""
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def without_times(records: list[dict]) -> list[dict]:
    """Records without the fields that differ from run to run."""
    return [{k: v for k, v in r.items() if not k.startswith(TIME_FIELDS)} for r in records]


def files(folder: Path) -> dict[Path, bytes]:
    """Contents of all files below a folder."""
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
