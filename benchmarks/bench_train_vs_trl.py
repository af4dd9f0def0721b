"""How many samples per hour and how much memory does a training step take, beside TRL's GRPOTrainer?

    pytest benchmarks/bench_train_vs_trl.py                          # table; --quick, --save, --compare OLD.json
    python -m benchmarks.bench_train_vs_trl --curves 30 --seeds 2    # KL and reward of both sides over the steps

Both sides train all weights of the same model in fp32 on the same prompts in the same order with the same reward
function, group size, response length, optimiser and KL weight: one optimiser step per rollout, no gradient
checkpointing, no evaluation, no cost. In terms of GRPOTrainer: loss_type dapo (the mean over the batch's tokens, our
token-mean), beta times ratio times k3 (use_bias_correction_kl, our kl_importance_weighted), scale_rewards none,
num_iterations 1. Its advantage is the reward minus the mean of the whole group; ours leaves the sample itself out,
which is k / (k - 1) times that, so its reward weight is set to k / (k - 1) and the two agree. Both log the mean k3 per
response token. They differ in the sampler (the same seed gives other samples), in padding and prefix sharing, and in
that ours keeps freed memory (repo.common.malloc), which the side trl-kept gives to TRL's process too.

The side repo-trl is RePOTrainer, the adapter for TRL, without a cost: TRL samples, scores and forms the advantages as
in trl, and only the log-probabilities and the loss are ours.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.conftest import free_memory
from benchmarks.harness.machine import ROOT, device, machine, provenance
from benchmarks.harness.results import OURS, PEER, Case, Row
from benchmarks.workloads.models import EMBEDDED, folder_of
from benchmarks.workloads.peers import missing
from benchmarks.workloads.trainers import PARTS, Measured
from benchmarks.workloads.training_step import load_step

SIDES = ("ours", "trl", "trl-kept", "repo-trl")
PROMPTS, SAMPLES, TOKENS, BETA = 4, 4, 40, 0.04
BATCH = PROMPTS * SAMPLES
GIB = 2.0**30


def our_command(options: argparse.Namespace, steps: int, seed: int, out: Path) -> list[str]:
    """Return the arguments of repo.train."""
    settings = {
        "out": out,
        "steps": steps,
        "seed": seed,
        "save_every": 0,
        "sample_every": 0,
        "model.path": options.model,
        "model.device": device().type,
        "data.train": options.prompts,
        "rollout.prompts_per_step": PROMPTS,
        "rollout.samples_per_prompt": SAMPLES,
        "rollout.max_response_tokens": TOKENS,
        "scoring.reward": "benchmarks.workloads.trainers:echo",
        "scoring.cost": "benchmarks.workloads.trainers:no_cost",
        "algorithm.method": "ppo",
        "algorithm.beta": BETA,
        "optimizer.lr": options.lr,
        "optimizer.warmup_steps": 0,
        "evaluation.prompts": 0,
    }
    return [str(word) for name, value in settings.items() for word in (f"--{name}", value)]


def trl_job(command: list[str]) -> dict[str, Any]:
    """Return the arguments of train_trl (but `keep`) for the run that this command of ours describes."""
    from rich.console import Console
    from transformers import AutoConfig, AutoTokenizer

    from repo.command import read_command
    from repo.data.prompts import batch_at
    from repo.data.sources import load_data
    from repo.setup import find_assets, model_path

    config = read_command(command, "")[1]
    rollout, algorithm, optimizer, console = config.rollout, config.algorithm, config.optimizer, Console(quiet=True)
    folder = find_assets(config, console)
    path = model_path(config, folder)
    shape, tokenizer = AutoConfig.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    prompts = load_data(config, folder, tokenizer, (), shape, console)[0]
    drawn = [batch_at(prompts, step, PROMPTS, config.seed) for step in range(config.steps)]
    algorithm_arguments = {
        "num_generations": SAMPLES,
        "max_completion_length": TOKENS,
        "temperature": rollout.temperature,
        "top_p": rollout.top_p,
        "top_k": 0,
        "loss_type": "dapo",
        "beta": algorithm.beta,
        "use_bias_correction_kl": algorithm.kl_importance_weighted,
        "epsilon": algorithm.clip_range[0],
        "epsilon_high": algorithm.clip_range[1],
        "num_iterations": optimizer.epochs,
        "scale_rewards": "none",
        "reward_weights": [SAMPLES / (SAMPLES - 1)],
        "shuffle_dataset": False,
    }
    training_arguments = {
        "output_dir": str(Path(command[1]) / "trl"),
        "max_steps": config.steps,
        "seed": config.seed,
        "per_device_train_batch_size": BATCH,
        "steps_per_generation": 1,
        "gradient_checkpointing": config.model.gradient_checkpointing,
        "optim": "adamw_torch_fused",
        "learning_rate": optimizer.lr,
        "lr_scheduler_type": "constant",
        "adam_beta1": optimizer.betas[0],
        "adam_beta2": optimizer.betas[1],
        "weight_decay": optimizer.weight_decay,
        "max_grad_norm": optimizer.clip_norm,
        "use_cpu": device().type == "cpu",
        "bf16": False,
        "model_init_kwargs": {"dtype": "float32"},
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
    }
    rows = [{"messages": p.conversation, "token_ids": list(p.token_ids)} for step in drawn for p in step]
    return {"model": path, "prompts": rows, "arguments": {**algorithm_arguments, **training_arguments}}


def measure(options: argparse.Namespace, side: str, steps: int, seed: int) -> Measured:
    """Run one training in a fresh process."""
    with tempfile.TemporaryDirectory() as name:
        command, job = our_command(options, steps, seed, Path(name) / "run"), Path(name) / "job"
        trl = None if side == "ours" else trl_job(command)
        job.write_text(json.dumps({"command": command, "steps": steps, "trl": trl}))
        arguments = [sys.executable, "-m", "benchmarks.workloads.trainers", side, str(job)]
        done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{side} failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
        measured = Measured(**json.loads(job.with_suffix(".result").read_text()))
    seconds = statistics.median(measured.seconds)
    print(f"{side}, seed {seed}: {seconds:.2f} s per step, {measured.peak / GIB:.2f} GiB", file=sys.stderr, flush=True)
    return measured


def middle(values: Sequence[float], form: str = ".2f") -> str:
    """Format median [least, most]."""
    return f"{statistics.median(values):{form}} [{min(values):{form}}, {max(values):{form}}]"


def cases(quick: bool) -> dict[str, dict[str, Any]]:
    """Return the embedded model, or a tiny one with --quick."""
    steps = {"steps": 3, "lr": 5e-5, "model": "tiny"} if quick else {"steps": 5, "lr": 5e-5, "model": EMBEDDED}
    return {steps["model"]: steps}


def test_train_vs_trl(request, record, benchmark, case) -> None:
    """Run processes of both sides in turn. pytest-benchmark shows whole processes, the table shows steps."""
    name, parameters = case
    rounds = request.config.getoption("--rounds") or (1 if request.config.getoption("--quick") else 2)
    model = EMBEDDED if parameters["model"] == EMBEDDED else folder_of(parameters["model"])
    options = argparse.Namespace(**{**parameters, "model": model}, prompts=EMBEDDED)
    sides = {"ours": OURS} if missing("trl") else {"ours": OURS, "trl": PEER, "trl-kept": PEER, "repo-trl": OURS}
    if request.config.getoption("--quick"):
        sides = {side: role for side, role in sides.items() if side in ("ours", "trl")}
    load_step.cache_clear()
    free_memory()
    runs_of: dict[str, list[Measured]] = {side: [] for side in sides}
    where = provenance()

    def run(side: str) -> None:
        runs_of[side].append(measure(options, side, options.steps, len(runs_of[side])))

    def others() -> None:
        for side in [s for s in sides if s != "ours"]:
            run(side)

    benchmark.pedantic(lambda: run("ours"), setup=others, rounds=rounds)
    rows = [
        Row(
            side,
            role,
            seconds=[second for run in runs_of[side] for second in run.seconds],
            work=BATCH,
            extra_peak=statistics.median(run.peak for run in runs_of[side]),
            tokens=statistics.mean(t for run in runs_of[side] for t in run.tokens[1:]),
        )
        for side, role in sides.items()
    ]
    if reason := missing("trl"):
        rows.append(Row("trl", PEER, reason=reason))
    parts = {name: [s for run in runs_of["ours"] for s in run.parts[name][1:]] for name in PARTS}
    notes = {"Our step, median seconds": ", ".join(f"{n} {statistics.median(v):.2f}" for n, v in parts.items())}
    formula = (
        f"Seconds per step of {PROMPTS} prompts x {SAMPLES} samples x {TOKENS} tokens, beta {BETA}, fp32; the first "
        "step of a process left out. Peak: of the process, loading included"
    )
    record(Case("train_vs_trl", name, parameters, "samples", formula, "ours", rows, where, notes))


def curve_table(runs_of: dict[str, list[Measured]], steps: int) -> str:
    """Return Markdown with KL and reward of both sides over the steps, and their spread over seeds."""
    blocks = min(10, steps)
    bounds = [steps * i // blocks for i in range(blocks + 1)]
    rows = [(f"{a + 1}-{b}", a, b) for a, b in itertools.pairwise(bounds)]
    rows.append(("last third", steps - max(1, steps // 3), steps))
    lines = [f"| steps | {' | '.join(f'{what} {side}' for what in ('KL', 'reward') for side in runs_of)} |"]
    lines.append("|---" * (1 + 2 * len(runs_of)) + "|")

    def cells(values: Callable[[Measured], list[float]], a: int, b: int, form: str) -> list[str]:
        return [middle([statistics.mean(values(run)[a:b]) for run in runs], form) for runs in runs_of.values()]

    for name, a, b in rows:
        told = cells(lambda run: run.kl, a, b, ".4f") + cells(lambda run: run.reward, a, b, ".2f")
        lines.append(f"| {name} | {' | '.join(told)} |")
    return "\n".join(lines)


def main() -> None:
    """Print KL and reward of both sides over the steps; write them to --out if given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", type=int, default=30, metavar="STEPS", help="steps of each run")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each side")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["ours", "trl"], help="sides to train")
    parser.add_argument("--model", default=EMBEDDED, help="folder of another model")
    parser.add_argument("--prompts", default=EMBEDDED, help="JSON lines with other single questions")
    parser.add_argument("--lr", type=float, default=5e-5, help="learning rate of both")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    if options.curves < 2:
        parser.error(f"--curves must be at least 2, since the first step is not timed; got {options.curves}")
    first, curves = machine(), dict[str, list[Measured]]()
    for seed in range(options.seeds):
        for side in options.sides:
            curves.setdefault(side, []).append(measure(options, side, options.curves, seed))
    text = (
        f"{first}. {options.model} model, lr {options.lr:g}. Mean k3 to the reference in nats per token and mean "
        f"reward, median [least, most] over {options.seeds} seeds.\n\n{curve_table(curves, options.curves)}\n"
    )
    print(text)
    if options.out:
        command = " ".join(["python -m benchmarks.bench_train_vs_trl", *sys.argv[1:]])
        options.out.write_text(f"# Training beside TRL's GRPOTrainer\n\n`{command}`\n\n{text}", encoding="utf-8")


if __name__ == "__main__":
    main()
