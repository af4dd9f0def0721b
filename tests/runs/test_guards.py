"""What goes wrong in a run is named, and nothing is lost by it."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from repo import train
from repo.common.distributed import ALONE
from repo.common.errors import UserError
from repo.config.schema import Config, ModelConfig, RolloutConfig, ScoringConfig
from repo.evaluation.evaluator import Evaluator
from repo.models.sharding import require_finite_weights
from repo.runs import checkpoint, state_files
from repo.runs.interrupts import Stopped, StopRequest
from repo.runs.model_card import model_card
from repo.training.mismatch import Agreement, agreement, describe_mismatch, likely_cause

from .tiny import make_tokenizer


@pytest.fixture
def options(tiny_arguments) -> list[str]:
    return [*tiny_arguments, "--evaluation.prompts=0", "--sample_every=0"]


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def files(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_agreement_by_hand():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    rollout = torch.tensor([[-1.0, -2.0, torch.nan], [-3.0, 0.0, 0.0]])
    same = agreement(rollout, rollout, mask)
    assert (same.gap, same.ess) == (0.0, 1.0)
    trainer = rollout + torch.tensor([[0.0, torch.log(torch.tensor(2.0)), 0.0], [-0.3, 9.0, 9.0]])
    found = agreement(rollout, trainer, mask)
    w = [1.0, 2.0, 2.718281828**-0.3]
    assert found.gap == pytest.approx((0 + 0.693147 + 0.3) / 3, rel=1e-5)
    assert found.ess == pytest.approx(sum(w) ** 2 / 3 / sum(x * x for x in w), rel=1e-5)
    assert agreement(rollout, trainer + 300.0, mask).ess == pytest.approx(found.ess, rel=1e-4)  # no overflow
    assert str(agreement(rollout, rollout, mask & False)) == "Agreement(gap=nan, ess=nan)"


@pytest.mark.parametrize(
    ("config", "cause"),
    [
        (Config(rollout=RolloutConfig(top_p=0.8)), "rollout.top_p=0.8"),
        (Config(model=ModelConfig(dtype="bfloat16")), "model.dtype bfloat16"),
        (Config(model=ModelConfig(compile=True)), "compiled layers"),
        (Config(), "its cache, positions or attention"),
    ],
)
def test_the_likely_cause_is_what_is_configured(config, cause):
    assert cause in likely_cause(config)
    assert cause in describe_mismatch(Agreement(0.2, 0.99), config)
    assert "effective sample size 50%" in describe_mismatch(Agreement(0.01, 0.5), config)
    assert describe_mismatch(Agreement(0.01, 0.99), config) is None
    assert describe_mismatch(Agreement(float("nan"), float("nan")), config) is None


def test_a_truncated_rollout_is_warned_of_once_and_a_plain_one_never(options, tmp_path, capsys):
    train.run_command([*options, f"--out={tmp_path / 'plain'}"])
    assert "is not quite the one that sampled" not in capsys.readouterr().out
    assert all(r["rollout_gap"] < 1e-5 and r["rollout_ess"] > 1 - 1e-6 for r in lines(tmp_path / "plain"))
    train.run_command([*options, "--rollout.top_p=0.5", f"--out={tmp_path / 'cut'}"])
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("the policy that is trained is not quite the one that sampled") == 1
    assert "rollout.top_p=0.5 samples from a truncated distribution" in printed
    assert all(r["rollout_gap"] > 0.1 for r in lines(tmp_path / "cut"))


def test_with_several_optimiser_steps_the_sampling_policy_is_compared(options, tmp_path):
    more = ["--optimizer.epochs=2", "--optimizer.minibatches=2", "--optimizer.lr=0.01"]
    train.run_command([*options, *more, f"--out={tmp_path / 'run'}"])
    assert all(r["rollout_gap"] < 1e-5 for r in lines(tmp_path / "run"))


def test_a_weight_that_is_no_number_is_named():
    model = torch.nn.Linear(3, 2)
    require_finite_weights(model, ALONE, "after step 3")
    with torch.no_grad():
        model.weight.fill_(3e38)  # whose sum overflows, which is no fault
    require_finite_weights(model, ALONE, "after step 3")
    with torch.no_grad():
        model.bias[1] = torch.inf
    with pytest.raises(UserError, match="weight bias is not finite after step 3"):
        require_finite_weights(model, ALONE, "after step 3")


def test_weights_that_explode_stop_the_run_and_leave_its_checkpoint(options, tmp_path, monkeypatch):
    out = tmp_path / "run"
    train.run_command([*options, "--steps=2", f"--out={out}"])
    before = files(out / "checkpoints")
    with pytest.raises(UserError, match=r"weight policy\.model\..* is not finite after step 2"):
        train.run_command(["--resume", str(out), "--steps=4", "--allow-change=optimizer.lr", "--optimizer.lr=1e39"])
    assert files(out / "checkpoints") == before
    train.run_command(["--resume", str(out), "--steps=4", "--allow-change=optimizer.lr", "--optimizer.lr=1e-3"])
    assert len(lines(out)) == 4


def test_a_model_with_a_nan_is_refused_by_name(tiny_model, options, tmp_path):
    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"weight model\.layers\.1\.mlp\.up_proj\.weight of .* is not finite"):
        train.run_command([*options, f"--model.path={broken}", f"--out={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mode", ["rectified", "split"])
@pytest.mark.parametrize("limit", [-100.0, 100.0], ids=["none safe", "all safe"])
def test_a_batch_without_safe_or_unsafe_samples_trains(limit, mode, options, tmp_path):
    more = [f"--algorithm.cost_limit={limit}", f"--algorithm.cost_mode={mode}", "--steps=2"]
    for advantages in ("group", "gae"):
        out = tmp_path / advantages
        train.run_command([*options, *more, f"--algorithm.advantages={advantages}", f"--out={out}"])
        assert all(r["skipped"] == 0 and r["safe_rate"] == float(limit > 0) for r in lines(out))


def test_a_prompt_at_the_limit_of_the_context_trains(tiny_model, options, tmp_path):
    tokenizer = make_tokenizer()
    text = "a"
    while len(tokenizer.apply_chat_template([{"role": "user", "content": text + " a"}])["input_ids"]) + 1 < 248:
        text += " a"
    prompts = tmp_path / "long.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in (text, "What is bread?")))
    more = [f"--data.train={prompts}", "--data.max_prompt_tokens=999", "--optimizer.micro_batch_tokens=100"]
    train.run_command([*options, *more, "--steps=2", f"--out={tmp_path / 'run'}"])
    assert all(r["skipped"] == 0 for r in lines(tmp_path / "run"))
    sizes = {len(json.loads(x)["prompt"]) for x in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()}
    assert len(text) in sizes


def test_a_file_that_lost_lines_is_not_gone_on_with(options, tmp_path):
    out = tmp_path / "run"
    train.run_command([*options, "--steps=2", f"--out={out}"])
    text = (out / "metrics.jsonl").read_text()
    (out / "metrics.jsonl").write_text(text.splitlines(keepends=True)[0])
    before = files(out)
    with pytest.raises(UserError, match=r"metrics.jsonl has \d+ bytes, \d+ when the checkpoint"):
        train.run_command(["--resume", str(out), "--steps=4"])
    assert files(out) == before


def test_a_changed_field_may_be_allowed_by_name(options, tmp_path, capsys):
    out = tmp_path / "run"
    train.run_command([*options, "--steps=1", f"--out={out}"])
    with pytest.raises(UserError, match="cannot become 0.5 unless --allow-change algorithm.beta is given"):
        train.run_command(["--resume", str(out), "--steps=2", "--algorithm.beta=0.5"])
    with pytest.raises(UserError, match="--allow-change takes fields of the configuration; got 'beta'"):
        train.run_command(["--resume", str(out), "--steps=2", "--algorithm.beta=0.5", "--allow-change=beta"])
    train.run_command(["--resume", str(out), "--steps=2", "--algorithm.beta=0.5", "--allow-change=algorithm.beta"])
    assert "warning: algorithm.beta was 0.02 in this run and is now 0.5" in capsys.readouterr().out
    train.run_command(["--resume", str(out), "--steps=3"])  # it stays so


def test_a_changed_input_is_refused_and_may_be_allowed_by_name(options, tiny_model, tiny_prompts, tmp_path, capsys):
    model, prompts = shutil.copytree(tiny_model, tmp_path / "model"), shutil.copy(tiny_prompts[0], tmp_path / "p.jsonl")
    code = tmp_path / "changing_scores.py"
    code.write_text("def cost(prompts, responses):\n    return [1.0] * len(responses)\n")
    mine = [f"--model.path={model}", f"--data.train={prompts}", "--scoring.cost=changing_scores:cost"]
    out, command = tmp_path / "run", [sys.executable, "-m", "repo.train"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path.cwd()}"}

    def call(*arguments):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, env=environment)
        return done.returncode, done.stderr + done.stdout

    assert call(*options, *mine, "--steps=1", f"--out={out}")[0] == 0
    before = files(out)
    code.write_text("def cost(prompts, responses):\n    return [2.0] * len(responses)\n")
    status, text = call("--resume", str(out), "--steps=2")
    assert status == 2
    assert "error: --resume: what scoring.cost names has changed since the run began" in text
    assert files(out) == before
    status, text = call("--resume", str(out), "--steps=2", "--allow-change=scoring.cost")
    assert status == 0
    assert "warning: what scoring.cost names has changed since the run began" in " ".join(text.split())
    again = ["--resume", str(out), "--steps=3", "--scoring.cost=tests.loop.scorers:cost"]
    Path(prompts).write_text(Path(prompts).read_text() + '{"prompt": "One more?"}\n')
    with pytest.raises(UserError, match="what data.train names has changed"):
        train.run_command([*again, "--allow-change=scoring.cost"])
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="what model.path names has changed"):
        train.run_command([*again, "--allow-change=scoring.cost", "--allow-change=data.train"])


def test_an_allowed_input_stays_allowed(options, tiny_prompts, tmp_path):
    prompts = Path(shutil.copy(tiny_prompts[0], tmp_path / "p.jsonl"))
    out = tmp_path / "run"
    train.run_command([*options, f"--data.train={prompts}", "--steps=1", f"--out={out}"])
    prompts.write_text(prompts.read_text() + '{"prompt": "One more?"}\n')
    train.run_command(["--resume", str(out), "--steps=2", "--allow-change=data.train"])
    train.run_command(["--resume", str(out), "--steps=3"])
    assert len(lines(out)) == 3


def test_a_scorer_may_be_any_callable(options, tmp_path):
    train.run_command(
        [*options, "--scoring.reward=tests.loop.scorers:counter", "--steps=1", f"--out={tmp_path / 'run'}"]
    )
    assert len(lines(tmp_path / "run")) == 1


def test_a_name_that_another_run_took_meanwhile_is_left_alone(options, tmp_path, monkeypatch):
    out, plain = tmp_path / "run", train.load_parts

    def slow(*arguments):
        if not out.exists():
            out.mkdir()
            (out / "theirs").write_text("precious")
        return plain(*arguments)

    monkeypatch.setattr(train, "load_parts", slow)
    with pytest.raises(UserError, match="cannot create .*run: it exists; choose another folder"):
        train.run_command([*options, f"--out={out}"])
    assert files(tmp_path) == {out / "theirs": b"precious"}


def test_an_error_in_a_step_does_not_cost_the_checkpoint_before_it(options, tmp_path, monkeypatch):
    """The checkpoint is still being written when the next step fails."""
    out, plain, scorers = tmp_path / "run", state_files.write, []

    def slow(*arguments):
        time.sleep(0.5)
        return plain(*arguments)

    def failing(prompts, responses):
        scorers.append(1)
        if len(scorers) > 1:
            raise RuntimeError("the service is gone")
        return [0.0] * len(prompts)

    monkeypatch.setattr(state_files, "write", slow)
    monkeypatch.setattr("tests.loop.scorers.reward", failing)
    with pytest.raises(UserError, match="the service is gone"):
        train.run_command([*options, "--save_every=1", f"--out={out}"])
    assert checkpoint.find(out)[0].name == "step-000001"


def test_more_steps_of_a_cosine_are_warned_of(options, tmp_path, capsys):
    out = tmp_path / "run"
    train.run_command([*options, "--steps=1", "--optimizer.schedule=cosine", f"--out={out}"])
    train.run_command(["--resume", str(out), "--steps=2"])
    assert "with optimizer.schedule cosine the rate of further steps changes" in " ".join(
        capsys.readouterr().out.split()
    )


def test_other_package_versions_are_warned_of(options, tmp_path, capsys):
    out = tmp_path / "run"
    train.run_command([*options, "--steps=1", f"--out={out}"])
    known = json.loads((out / "versions.json").read_text())
    (out / "versions.json").write_text(json.dumps(known | {"torch": "1.0"}))
    train.run_command(["--resume", str(out), "--steps=2"])
    assert f"so that bits may differ: torch 1.0 -> {known['torch']}" in " ".join(capsys.readouterr().out.split())


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(options, tmp_path, capsys):
    out = tmp_path / "run"
    train.run_command([*options, "--steps=4", "--save_every=1", "--keep=2", f"--out={out}"])
    whole, samples = lines(out), (out / "samples.jsonl").read_bytes()
    weights = load_file(out / "final" / "model.safetensors")
    shutil.rmtree(out / "final")
    path = out / "checkpoints" / "step-000004" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    train.run_command(["--resume", str(out)])
    assert "step-000004 is left out: state.safetensors has" in " ".join(capsys.readouterr().out.split())
    drop = ("seconds_", "tokens_per_second", "update_tokens_per_second")
    assert [{k: v for k, v in r.items() if not k.startswith(drop)} for r in lines(out)] == [
        {k: v for k, v in r.items() if not k.startswith(drop)} for r in whole
    ]
    assert (out / "samples.jsonl").read_bytes() == samples
    again = load_file(out / "final" / "model.safetensors")
    assert all(torch.equal(again[name], weights[name]) for name in weights)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_signal_during_an_evaluation_ends_at_once_and_says_how_to_go_on(
    when, tiny_arguments, tmp_path, monkeypatch, capsys
):
    plain = Evaluator.__call__

    def interrupted(evaluator, policy, *rest):
        if (tmp_path / "run" / "checkpoints").exists() == (when == "after"):
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError("the evaluation went on")
        return plain(evaluator, policy, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "__call__", interrupted)
        train.run_command([*tiny_arguments, f"--out={tmp_path / 'run'}"])  # returns, so that the command exits with 0
    assert f"python -m repo.train --resume {tmp_path / 'run'}" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "run" / "final").exists()
    train.run_command(["--resume", str(tmp_path / "run")])
    assert len(lines(tmp_path / "run")) == 4
    assert (tmp_path / "run" / "final").is_dir()


def test_a_second_signal_ends_the_process(interruptible):
    said = []
    request = StopRequest(said.append)
    signal.raise_signal(signal.SIGTERM)
    assert request.requested
    assert len(said) == 1
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    several = StopRequest(said.append, of_several=True)
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGTERM)  # as torchrun passes on an interrupt of the terminal
    assert len(said) == 2
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    several.restore()
    with pytest.raises(Stopped), several.at_once():
        pass


def test_a_run_folder_holds_nothing_of_the_environment(options, tmp_path):
    secrets = {"HF_TOKEN": "hf_s3cr3tAAAA", "WANDB_API_KEY": "w4ndbs3cr3tBBBB", "MY_PASSWORD": "p4ssw0rdCCCC"}
    out = tmp_path / "run"
    command = [sys.executable, "-m", "repo.train", *options, "--loggers=[tensorboard]", f"--out={out}"]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | secrets)
    content = files(out)
    assert content
    assert not [p for p, data in content.items() for value in secrets.values() if value.encode() in data]


REMOTE = """
from pathlib import Path
Path(__file__)
import os
open(os.environ["REMOTE_CODE_RAN"], "w").close()
from transformers import LlamaConfig, LlamaForCausalLM
class MyConfig(LlamaConfig):
    model_type = "mine"
class MyModel(LlamaForCausalLM):
    config_class = MyConfig
"""


def test_code_of_a_model_runs_only_when_asked_for(tiny_model, options, tmp_path, monkeypatch):
    folder, marker = shutil.copytree(tiny_model, tmp_path / "mine"), tmp_path / "ran"
    monkeypatch.setenv("REMOTE_CODE_RAN", str(marker))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    (folder / "modeling_mine.py").write_text(REMOTE)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "architectures": ["MyModel"]}
    config["auto_map"] = {"AutoConfig": "modeling_mine.MyConfig", "AutoModelForCausalLM": "modeling_mine.MyModel"}
    (folder / "config.json").write_text(json.dumps(config))
    command = [*options, f"--model.path={folder}", "--steps=1", f"--out={tmp_path / 'run'}"]
    with pytest.raises(UserError, match="model.path: cannot load") as error:
        train.run_command(command)
    assert "\n" not in str(error.value)
    assert not marker.exists()
    yaml = tmp_path / "trusting.yaml"
    yaml.write_text("trust_remote_code: true\n")
    with pytest.raises(UserError, match="trust_remote_code"):
        train.run_command(["--config", str(yaml), *command])
    train.run_command([*command, "--trust-remote-code"])
    assert marker.exists()
    assert len(lines(tmp_path / "run")) == 1


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


@pytest.mark.parametrize("what", ["model.path", "scoring.cost"])
def test_a_pickled_model_cannot_run_code(what, tiny_model, scorer_folder, options, tmp_path):
    source = tiny_model if what == "model.path" else scorer_folder
    folder, marker = shutil.copytree(source, tmp_path / "evil"), tmp_path / "ran"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"lm_head.weight": Evil(marker)}))
    with pytest.raises(UserError, match=f"{what}.*cannot load"):
        train.run_command([*options, f"--{what}={folder}", f"--out={tmp_path / 'run'}"])
    assert not marker.exists()


def test_names_in_the_model_card_stay_code():
    config = Config(scoring=ScoringConfig(reward="a`b``<script>\n# heading", cost="plain:f"))
    card = model_card(config, 3, [])
    line = next(x for x in card.splitlines() if x.startswith("Reward:"))
    assert line == "Reward: ``` a`b``<script> # heading ```. Cost: `plain:f`."
