"""The worker program with a stand-in for vLLM, to test frames, errors and ends.

    python fake_vllm.py serve FOLDER

It answers what a prompt's first token id asks for: see ASK.
"""

import os
import runpy
import sys
import time
from pathlib import Path

WORKER = Path(__file__).parents[3] / "repo" / "rollout" / "vllm" / "worker.py"
# alone, without our packages, as the Python of vLLM's environment runs it
PROGRAM = runpy.run_path(str(WORKER), run_name="worker")
ASK = {"answer": 5, "print": 6, "raise": 7, "die": 8, "wait": 9, "lie": 10}


class FakeEngine:
    """Samples tokens 3, 4 with log-probabilities -1, -2."""

    def start(self, model: str, **options) -> dict:
        self.step = PROGRAM["step_of"](model)
        return {"version": "0", "device": "cpu", "step": self.step, "options": options}

    def load(self, folder: str) -> dict:
        self.step = PROGRAM["step_of"](folder)
        return {"step": self.step}

    def sample(self, prompts: list[list[int]], seeds: list[int], **options) -> dict:
        asked, step = prompts[0][0], self.step
        if asked == ASK["print"]:
            print("a line on stdout", flush=True)
            os.system("echo and one of a child")
        elif asked == ASK["raise"]:
            raise ValueError("no such token\nand more")
        elif asked == ASK["die"]:
            print("the last words", file=sys.stderr)
            os._exit(3)
        elif asked == ASK["wait"]:
            time.sleep(60)
        elif asked == ASK["lie"]:
            step = 99
        return {"tokens": [[3, 4]] * len(prompts), "logps": [[-1.0, -2.0]] * len(prompts), "step": step}


if __name__ == "__main__":
    PROGRAM["serve"](FakeEngine(), sys.argv[2])
