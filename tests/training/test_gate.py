"""The gate: its bound against simulations, and runs whose harmful update is taken back."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from repo import train
from repo.common.errors import UserError
from repo.config.schema import GateConfig
from repo.data.prompts import Prompt
from repo.gate.decision import decide, describe
from repo.gate.gate import Gate
from repo.gate.prompts import chosen, set_apart
from repo.training.update import Updater
from tests.support.run_folders import files, lines, without_times
from tests.support.tiny import QUESTIONS


def prompts(count: int) -> list[Prompt]:
    return [Prompt(str(i), f"question {i}", "test") for i in range(count)]


@pytest.fixture(scope="module")
def options(tiny_model, tmp_path_factory) -> list[str]:
    """Command line of a run with enough training prompts for a gate, but for --out."""
    path = tmp_path_factory.mktemp("gate") / "train.jsonl"
    texts = [f"{QUESTIONS[i % len(QUESTIONS)]} Number {i}." for i in range(40)]
    path.write_text("".join(json.dumps({"id": f"p{i}", "prompt": text}) + "\n" for i, text in enumerate(texts)))
    return [
        f"--model.path={tiny_model}",
        f"--data.train={path}",
        "--scoring.reward=tests.support.scorers:reward",
        "--scoring.cost=tests.support.scorers:cost",
        "--algorithm.cost_limit=-0.5",
        "--evaluation.prompts=0",
        "--evaluation.samples_per_prompt=2",
        "--rollout.prompts_per_step=2",
        "--rollout.samples_per_prompt=3",
        "--rollout.max_response_tokens=8",
        "--optimizer.lr=1e-4",
        "--optimizer.warmup_steps=0",
        "--sample_every=0",
        "--save_every=0",
        "--gate.every=2",
    ]


def test_the_bound_is_that_of_a_normal_mean():
    draw = np.random.default_rng(0)
    before, after = draw.binomial(4, 0.7, 400) / 4, draw.binomial(4, 0.8, 400) / 4
    found = decide(before, after, 0.0)
    changes = after - before
    bound = changes.mean() - 1.645 * changes.std(ddof=1) / np.sqrt(len(changes))
    assert found.lower == pytest.approx(bound, abs=0.004)
    assert (found.before, found.after) == (before.mean(), after.mean())
    assert found.accepted


def test_what_is_accepted_by_hand():
    safe, unsafe = [1.0] * 20, [0.0] * 20
    assert decide(safe, safe, 0.0).accepted
    assert decide(safe, safe, 0.0).lower == 0.0
    assert decide(unsafe, safe, 0.0).lower == 1.0
    assert not decide(safe, unsafe, 0.99).accepted
    assert decide(safe, unsafe, 1.0).accepted
    one_worse = [*safe[:-1], 0.0]  # a bound below 0, since one of 20 prompts lost
    assert not decide(safe, one_worse, 0.0).accepted
    assert decide(safe, one_worse, 0.2).accepted
    with pytest.raises(ValueError, match="20, 19"):
        decide(safe, safe[1:], 0.0)


@pytest.mark.parametrize(("tolerance", "loss"), [(0.0, 0.0), (0.1, 0.1)])
def test_a_policy_at_the_edge_is_accepted_in_one_of_twenty_cases(tolerance, loss):
    """The truth is exactly -tolerance, the least that may be accepted: an error of at most 5 %, and not far less."""
    draw, tries = np.random.default_rng(1), 600
    before = draw.binomial(4, 0.7, (tries, 64)) / 4
    after = draw.binomial(4, 0.7 - loss, (tries, 64)) / 4
    accepted = sum(decide(a, b, tolerance).accepted for a, b in zip(before, after, strict=True))
    assert 0.02 < accepted / tries < 0.05 + 3 * np.sqrt(0.05 * 0.95 / tries)


def test_the_state_of_a_gate_is_whole_and_says_what_does_not_fit():
    found = iter([[0.5] * 12, [1.0] * 12, [0.0] * 12, [1.0] * 11])
    gate = Gate(GateConfig(every=2), 7, lambda: next(found))
    assert [gate.due(done) for done in range(1, 8)] == [False, True, False, True, False, True, True]
    assert gate.state_dict() == {}
    assert gate.begin(0)
    assert not gate.begin(0)
    assert gate.judge(2).accepted
    assert not gate.judge(4).accepted
    assert (gate.accepted, gate.safe, gate.lr_scale) == (2, [1.0] * 12, 0.5)
    again = Gate(GateConfig(every=2), 7, lambda: next(found))
    again.load_state_dict(json.loads(json.dumps(gate.state_dict())))
    assert again.state_dict() == gate.state_dict()
    with pytest.raises(
        UserError, match="there are 11 validation prompts now, and the policy of step 2 was accepted by 12"
    ):
        again.judge(6)
    off = Gate(GateConfig(), 7, list)
    off.load_state_dict(gate.state_dict())
    assert not off.begin(0)
    assert not off.due(7)
    assert off.state_dict() == {}


def test_validation_prompts_are_set_apart_and_do_not_depend_on_the_order():
    every = prompts(200)
    train_on, gate = set_apart(every)
    assert len(gate) == 64
    assert {p.id for p in gate}.isdisjoint(p.id for p in train_on)
    assert len(train_on) + len(gate) == 200
    assert [p.id for p in set_apart(every[::-1])[1]] == [p.id for p in gate]
    assert [len(part) for part in set_apart(prompts(21))] == [11, 10]
    assert len(chosen(prompts(30))) == 30
    with pytest.raises(UserError, match=r"gate\.every: .* needs 10; data\.train has only 19 different ones"):
        set_apart(prompts(19))


def test_no_text_is_on_both_sides_or_twice_before_the_gate():
    """Several pairs of one prompt, each with an id of its own."""
    several = [Prompt(f"{i}, pair {j}", f"question {i}", "test") for j in range(3) for i in range(40)]
    train_on, gate = set_apart(several)
    texts = {p.text for p in gate}
    assert len(gate) == len(texts) == 20
    assert len(train_on) == 60
    assert texts.isdisjoint(p.text for p in train_on)
    with pytest.raises(UserError, match="has only 19 different ones"):
        set_apart([p for p in several if int(p.id.split(",")[0]) < 19])


def harm(updater: Updater) -> None:
    """Make the policy say "a", by steps on its likelihood that no optimiser of the run knows of."""
    lm = updater.actor.lm
    letter = lm.tokenizer.convert_tokens_to_ids("a")
    ids = torch.tensor([lm.tokenizer(question)["input_ids"][:4] + [letter] * 8 for question in QUESTIONS[:1] * 2])
    optimizer = torch.optim.SGD(lm.model.parameters(), lr=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(lm.model(ids).logits[:, 3:-1].flatten(0, 1), ids[:, 4:].flatten()).backward()
        optimizer.step()
    optimizer.zero_grad()


@pytest.fixture
def harmful(monkeypatch):
    """A harmful update in step 3 of a run, at the first time only."""
    update, left = Updater.update, [1]

    def harmed(self, batch, step, steps):
        result = update(self, batch, step, steps)
        if step == 2 and left[0]:
            left[0] -= 1
            harm(self)
        return result

    monkeypatch.setattr(Updater, "update", harmed)


def checkpoint(folder: Path, step: int) -> tuple[dict, dict]:
    path = folder / "checkpoints" / f"step-{step:06d}"
    return load_file(path / "state.safetensors"), json.loads((path / "state.json").read_text())


@pytest.mark.parametrize("credit", ["terminal", "redistributed"])
def test_a_harmful_update_is_rolled_back(credit, options, harmful, tmp_path, capsys):
    more = [f"--algorithm.credit={credit}", "--gate.tolerance=0.3", "--steps=6", "--keep=9", "--save_every=1"]
    train.run_command([*options, *more, f"--out={tmp_path / 'run'}"])
    records = lines(tmp_path / "run")
    assert [r.get("gate_accepted") for r in records] == [None, 1.0, None, 0.0, None, 1.0]
    assert records[3]["gate_change"] < -0.3
    assert records[3]["gate_lower_bound"] < records[3]["gate_change"]
    assert [r["lr"] for r in records] == [1e-4] * 4 + [5e-5] * 2
    assert records[4]["lam"] == records[2]["lam"]  # lambda goes back too
    accepted, state = checkpoint(tmp_path / "run", 2)
    restored, after = checkpoint(tmp_path / "run", 4)
    assert accepted.keys() == restored.keys()
    assert all(torch.equal(accepted[name], restored[name]) for name in accepted)  # weights, moments and credit
    learned = {name for name in accepted if name.startswith("credit.")}
    assert bool(learned) == (credit == "redistributed")
    between = checkpoint(tmp_path / "run", 3)[0]
    assert not any(torch.equal(accepted[name], between[name]) for name in learned & {"credit.weights", "credit.errors"})
    assert state["penalty"] == after["penalty"]
    assert (after["gate"]["accepted"], after["gate"]["rejections"]) == (2, 1)
    shown = capsys.readouterr().out
    assert "gate: step 2 is accepted: safe rate" in shown
    assert "gate: step 4 is not surely as safe as step 2" in shown
    assert "back to that policy, with 0.5 x the learning rate" in shown
    assert "20 of the training prompts are set apart" in shown


def test_without_a_harmful_update_nothing_is_rolled_back(options, tmp_path):
    train.run_command([*options, "--gate.tolerance=0.3", "--steps=5", f"--out={tmp_path / 'run'}"])
    records = lines(tmp_path / "run")
    assert [r.get("gate_accepted") for r in records] == [None, 1.0, None, 1.0, 1.0]  # and after the last step
    assert {r["lr"] for r in records} == {1e-4}
    kept = {p.name for p in (tmp_path / "run" / "checkpoints").glob("step-*")}
    assert kept == {"step-000005"}


def test_the_exported_model_is_the_accepted_one(options, harmful, tmp_path):
    train.run_command([*options, "--gate.tolerance=0.3", "--steps=3", f"--out={tmp_path / 'run'}"])
    assert lines(tmp_path / "run")[-1]["gate_accepted"] == 0.0
    accepted, final = checkpoint(tmp_path / "run", 2)[0], load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert all(torch.equal(value, accepted[f"model.policy.{name}"]) for name, value in final.items())


def test_the_accepted_checkpoint_outlives_newer_ones(options, harmful, tmp_path):
    """The first one, of the reference, with three more before the decision of which only the newest is kept."""
    more = ["--gate.every=4", "--gate.tolerance=0.3", "--steps=4", "--save_every=1", "--keep=1"]
    train.run_command([*options, *more, f"--out={tmp_path / 'run'}"])
    assert lines(tmp_path / "run")[-1]["gate_accepted"] == 0.0
    accepted, restored = (checkpoint(tmp_path / "run", step)[0] for step in (0, 4))
    assert all(torch.equal(value, restored[name]) for name, value in accepted.items())
    best = (tmp_path / "run" / "checkpoints" / "best").read_text()
    assert best == "step-000000"  # and none of those that were taken back, which sampled safe responses


STRICT = ["--optimizer.lr=1e-2", "--penalty.lr=0.5"]  # noise alone makes a strict gate reject


def test_a_resumed_run_with_rejections_is_the_run_that_was_not_interrupted(options, tmp_path, capsys):
    train.run_command([*options, *STRICT, "--steps=8", f"--out={tmp_path / 'whole'}"])
    train.run_command([*options, *STRICT, "--steps=5", f"--out={tmp_path / 'part'}"])
    train.run_command(["--resume", str(tmp_path / "part"), "--steps=8"])
    told = " ".join(capsys.readouterr().out.split())
    assert "a run of 8 steps from the beginning would not have decided there" in told
    whole, part = (without_times(lines(tmp_path / name)) for name in ("whole", "part"))
    accepted = [r["gate_accepted"] for r in whole if "gate_accepted" in r]
    assert 0.0 in accepted
    assert whole[:4] == part[:4]  # the shorter run was judged once more, after its last step
    assert len(whole) == len(part) == 8


def test_a_prompt_of_the_gate_that_changes_under_its_id_stops_a_resume(options, tmp_path):
    path = tmp_path / "train.jsonl"
    (given,) = (option.partition("=")[2] for option in options if option.startswith("--data.train="))
    path.write_text(Path(given).read_text())
    more = [*options, f"--data.train={path}", "--steps=2", f"--out={tmp_path / 'run'}"]
    train.run_command(more)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    of_gate = set_apart([Prompt(r["id"], r["prompt"], "test") for r in records])[1][0].id
    changed = [r | {"prompt": "Another one."} if r["id"] == of_gate else r for r in records]
    path.write_text("".join(json.dumps(r) + "\n" for r in changed))
    with pytest.raises(UserError, match=r"the input named by gate\.every has changed"):
        train.run_command(["--resume", str(tmp_path / "run"), "--steps=4"])


def test_a_dry_run_refuses_too_few_prompts_for_a_gate(options, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Number {i}."}) + "\n" for i in range(19)))
    with pytest.raises(UserError, match=r"gate\.every: .* has only 19"):
        train.run_command([*options, f"--data.train={path}", "--dry-run"])


def test_a_run_that_stopped_goes_back_to_what_it_had_accepted(options, tmp_path):
    """Stopped between two decisions: what was accepted before, and its measure, come from the checkpoint."""
    more = [*options, *STRICT, "--steps=6"]
    train.run_command([*more, "--save_every=3", "--keep=9", f"--out={tmp_path / 'whole'}"])
    whole = tmp_path / "whole"
    before = files(whole)
    for name in ("final", "checkpoints/step-000004", "checkpoints/step-000006"):
        for path in sorted((whole / name).glob("*")):
            path.unlink()
        (whole / name).rmdir() if (whole / name).is_dir() else None
    (whole / "checkpoints" / "latest").write_text("step-000003")
    train.run_command(["--resume", str(whole)])
    after = files(whole)
    assert without_times([json.loads(x) for x in before[whole / "metrics.jsonl"].splitlines()]) == without_times(
        lines(whole)
    )
    assert after[whole / "final" / "model.safetensors"] == before[whole / "final" / "model.safetensors"]


def test_a_run_whose_accepted_policy_is_damaged_says_so(options, harmful, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    judge = Gate.judge

    def damaging(self, done):
        if done == 4:
            (folder / "checkpoints" / "step-000002" / "state.json").write_text("{}")
        return judge(self, done)

    monkeypatch.setattr(Gate, "judge", damaging)
    with pytest.raises(
        UserError, match=r"gate: .*step-000002, the last accepted policy, is not intact: state\.json has"
    ):
        train.run_command([*options, "--gate.tolerance=0.3", "--steps=6", f"--out={folder}"])


def test_descriptions_name_both_steps():
    accepted = describe(decide([0.5] * 10, [0.75] * 10, 0.0), 10, 0, 1.0)
    assert accepted == "gate: step 10 is accepted: safe rate 50.0% -> 75.0%, +25.0 points, at least +25.0"
    rejected = describe(decide([0.5] * 10, [0.25] * 10, 0.0), 20, 10, 0.25)
    assert rejected == (
        "gate: step 20 is not surely as safe as step 10 (safe rate 50.0% -> 25.0%, -25.0 points, at least -25.0); "
        "back to that policy, with 0.25 x the learning rate"
    )
