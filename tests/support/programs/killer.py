"""Run `repo.train` in child processes that are killed (SIGKILL) at random moments, until the run is complete.

    python -m tests.support.programs.killer KILLS SEED OUT ARGUMENT...

Children are forked from a process that has imported everything, so that starting one takes no time. Prints a JSON list
of the places at which the children were killed.
"""

import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

from repo import loop, train
from repo.common import files
from repo.evaluation import statistics
from repo.models import actor
from repo.rollout import sample
from repo.runs import checkpoint, state_files
from repo.training import descent

# place -> (module, function): a child is killed at one of the calls of the function, or shortly after it
PLACES = {
    "rollout": (sample, "decode"),
    "reference": (loop, "read_reference"),
    "update": (descent, "lr_at"),
    "weights": (files, "_write_all"),
    "fsync": (files, "fsync_path"),
    "publish": (checkpoint, "write_text"),
    "evaluation": (statistics, "measured"),
    "collect": (state_files, "collect"),
    "state": (actor, "unflat"),
}
CALLS = 6  # a child is killed at one of the first CALLS calls of its place
TRIES = 4  # children that may end before they reach their place until another place is chosen


def die_at(place: str, call: int, later: float) -> None:
    """Arrange for this process to be killed at the `call`-th call of a place, or `later` seconds after it."""
    module, name = PLACES[place]
    function, left = getattr(module, name), [call]

    def wrapped(*arguments, **options):
        left[0] -= 1
        if left[0] == 0 and later:
            timer = threading.Timer(later, os.kill, (os.getpid(), signal.SIGKILL))
            timer.daemon = True
            timer.start()
        elif left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    setattr(module, name, wrapped)


def child(arguments: list[str], death: tuple[str, int, float] | None, log: Path) -> int:
    """Fork a child that runs repo.train, and return its id.

    death: place, call and seconds, as die_at takes them; None: the child is not killed. log: file for its output.
    """
    pid = os.fork()
    if pid:
        return pid
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    status = 3
    try:
        if death is not None:
            die_at(*death)
        train.run_command(arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def places(draw: random.Random) -> Iterator[str | None]:
    """Yield without end where to kill the next child: in a round each place once, and None (any moment) four times."""
    while True:
        yield from draw.sample([*PLACES, *[None] * 4], len(PLACES) + 4)


def run_killed(kills: int, seed: int, out: Path, arguments: list[str], seconds: float) -> list[str]:
    """Kill `kills` children, then let one end. Returns the place at which each was killed, or "any moment"."""
    draw, log, deaths = random.Random(seed), out.with_suffix(".log"), []
    planned, place, tries = places(draw), None, 0
    while True:
        resumes = out.is_dir()
        command = ["--resume", str(out)] if resumes else [*arguments, f"--out={out}"]
        if len(deaths) < kills:
            if tries == 0:
                place = next(planned)
            # If a child ended before that call, the next one is killed at the first call of the place.
            call = draw.randint(1, CALLS) if tries == 0 else 1
            later = draw.choice((0.0, draw.uniform(0.001, 0.05)))
            pid = child(command, (place, call, later) if place else None, log)
            deadline = time.monotonic() + (seconds if place else draw.uniform(0.1, seconds))
            ended, status = os.waitpid(pid, os.WNOHANG)
            while not ended and time.monotonic() < deadline:
                time.sleep(0.002)
                ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                os.kill(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
        else:
            _, status = os.waitpid(child(command, None, log), 0)
            place = "none"
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            deaths.append(place or "any moment")
            tries = 0
        elif status:
            raise SystemExit(f"a child ended with status {status}: {log.read_text()[-3000:]}")
        else:
            tries = (tries + 1) % TRIES
        if (out / "final").is_dir():  # done, maybe killed in its last instructions
            if len(deaths) >= kills:
                return deaths
            remove_end(out, draw)


def remove_end(out: Path, draw: random.Random) -> None:
    """Make a finished run unfinished: move its export away and, in 70 % of cases, damage its newest checkpoint."""
    final = out / "final"
    final.rename(out.with_name(f"{out.name}-final-{time.monotonic_ns()}"))
    folders = sorted(checkpoint.steps_of(out / "checkpoints").items())
    if len(folders) > 1 and draw.random() < 0.7:
        (folders[-1][1] / "manifest.json").unlink()


def main() -> None:
    kills, seed, out, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    started = time.monotonic()
    whole = Path(out).with_name(f"{Path(out).name}-whole")
    _, status = os.waitpid(child([*arguments, f"--out={whole}"], None, whole.with_suffix(".log")), 0)
    if status:
        raise SystemExit(f"the run without kills ended with status {status}: {whole.with_suffix('.log').read_text()}")
    seconds = 1.2 * (time.monotonic() - started)
    print(json.dumps(run_killed(int(kills), int(seed), Path(out), arguments, seconds)))


if __name__ == "__main__":
    main()
