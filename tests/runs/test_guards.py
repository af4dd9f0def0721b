"""What goes wrong in a run is named, and nothing is lost by it."""

import json
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from repo import launch, train
from repo.common.distributed import ALONE
from repo.common.errors import UserError
from repo.evaluation.evaluator import Evaluator
from repo.models.sharding import require_finite_weights
from repo.runs import checkpoint, state_files
from repo.runs.interrupts import Stopped, StopRequest
from tests.support.run_folders import files, lines
from tests.support.tiny import make_tokenizer


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


def test_a_scorer_may_be_any_callable(options, tmp_path):
    train.run_command(
        [*options, "--scoring.reward=tests.support.scorers:counter", "--steps=1", f"--out={tmp_path / 'run'}"]
    )
    assert len(lines(tmp_path / "run")) == 1


def test_a_name_that_another_run_took_meanwhile_is_left_alone(options, tmp_path, monkeypatch):
    out, plain = tmp_path / "run", launch.load_parts

    def slow(*arguments):
        if not out.exists():
            out.mkdir()
            (out / "theirs").write_text("precious")
        return plain(*arguments)

    monkeypatch.setattr(launch, "load_parts", slow)
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
        if len(scorers) > 2:  # the first call is of canned answers
            raise RuntimeError("the service is gone")
        return [0.0] * len(prompts)

    monkeypatch.setattr(state_files, "write", slow)
    monkeypatch.setattr("tests.support.scorers.reward", failing)
    with pytest.raises(UserError, match="the service is gone"):
        train.run_command([*options, "--save_every=1", f"--out={out}"])
    assert checkpoint.find(out)[0].name == "step-000001"


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
