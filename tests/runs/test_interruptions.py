"""What ends a run early, in real processes: Ctrl-C, a full disk."""

import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import load_file

TIMES = ("seconds_", "tokens_per_second", "update_tokens_per_second")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "repo.train", *arguments]


def lines(folder: Path) -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith(TIMES)} for r in records]


def test_ctrl_c_saves_exits_0_and_prints_the_command_that_goes_on(tiny_arguments, tmp_path):
    options = [*tiny_arguments, "--evaluation.prompts=0", "--save_every=0"]
    out = tmp_path / "run"
    process = subprocess.Popen(command(*options, "--steps=100000", f"--out={out}"), stdout=subprocess.PIPE, text=True)
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    done = len(lines(out))
    assert f"python -m repo.train --resume {out}" in printed
    assert json.loads((out / "checkpoints" / f"step-{done:06d}" / "state.json").read_text())["step"] == done


def test_a_disk_that_fills_up_while_saving_leaves_the_previous_checkpoint(tiny_arguments, tmp_path):
    """The limit on file sizes stands for the disk: the operating system refuses the write in the middle of a file."""
    options = [*tiny_arguments, "--evaluation.prompts=0"]
    subprocess.run(command(*options, f"--out={tmp_path / 'whole'}"), check=True, capture_output=True, timeout=120)
    out = tmp_path / "run"
    subprocess.run(command(*options, "--steps=2", f"--out={out}"), check=True, capture_output=True, timeout=120)
    before = {p.name: p.read_bytes() for p in (out / "checkpoints" / "step-000002").iterdir()}
    failed = subprocess.run(
        command("--resume", str(out), "--steps=4"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: cannot write")
    assert "what was there before is intact" in failed.stderr
    assert len(failed.stderr.splitlines()) == 1
    assert {p.name: p.read_bytes() for p in (out / "checkpoints" / "step-000002").iterdir()} == before
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["best", "latest", "step-000002"]
    subprocess.run(command("--resume", str(out), "--steps=4"), check=True, capture_output=True, timeout=120)
    assert lines(out) == lines(tmp_path / "whole")
    whole, resumed = (load_file(f / "final" / "model.safetensors") for f in (tmp_path / "whole", out))
    assert all((whole[name] == resumed[name]).all() for name in whole)
