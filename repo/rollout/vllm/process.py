"""Process: the worker program as a child process, asked in JSON lines over pipes, and ended for certain."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...common.errors import UserError

PROGRAM = Path(__file__).with_name("worker.py")
SHOWN = 12  # last lines of the worker's stderr in an error
ASK_VERSION, LEAVE = 60.0, 10.0  # seconds


class Worker:
    """A running worker program. It ends when its stdin is closed, so also when this process is killed."""

    def __init__(self, command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
        """Start it. folder: gets its stderr, and is removed by the worker when it ends."""
        self.log = folder / "stderr.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=dict(environment),
                start_new_session=True,  # Ctrl-C in the terminal is for the loop, which first ends its step
            )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and wait for its answer. Raises UserError if the worker reports an error or has ended."""
        requests, answers = self.process.stdin, self.process.stdout
        assert requests is not None
        assert answers is not None
        try:
            requests.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            requests.flush()
            line = answers.readline()
        except BrokenPipeError:
            line = b""
        if not line.endswith(b"\n"):
            code = self.process.wait()
            raise UserError(f"rollout.engine: the vLLM worker ended with exit code {code}{self._last_lines()}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise UserError(f"rollout.engine: vLLM cannot {do}: {reply['error']}{self._last_lines()}")
        return reply

    def _last_lines(self) -> str:
        """Quote the end of the worker's stderr."""
        lines = self.log.read_text(errors="replace").splitlines()[-SHOWN:] if self.log.exists() else []
        return "; the last lines of its stderr:\n" + "\n".join(lines) if lines else "; it printed nothing on stderr"

    def close(self) -> None:
        """End the worker and wait for that."""
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # it has ended before
                pipe.close()
        try:
            self.process.wait(LEAVE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def worker_command(program: Sequence[str], folder: Path) -> list[str]:
    """Return the command of a worker program that serves. folder: see Worker."""
    return [*program, "serve", str(folder)]


def worker_environment(gpu: int | None, threads: int) -> dict[str, str]:
    """Return the environment of the worker: ours, with the policy's GPU alone and as many threads as we have.

    gpu: number of the policy's GPU among those that this process sees, None if it is on another device.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment.setdefault("OMP_NUM_THREADS", str(threads))  # without it vLLM takes one
    if gpu is not None:
        visible = environment.get("CUDA_VISIBLE_DEVICES", "")
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)
    return environment


def vllm_version(python: str) -> str:
    """Return the version of vLLM in the environment of a Python. Raises UserError if there is none."""
    make = "`make vllm-env` builds that environment"
    command = [python, "-I", str(PROGRAM), "version"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=ASK_VERSION, check=True).stdout.strip()
    except FileNotFoundError:
        raise UserError(f"rollout.vllm_python: there is no {python!r}; {make}") from None
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"rollout.vllm_python: {python!r} does not run: {error}; {make}") from None
    if not found:
        raise UserError(f"rollout.engine vllm: {python!r} has no vLLM; {make}, or: {python} -m pip install vllm")
    return found
