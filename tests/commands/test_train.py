"""The command: runs on a model, prompts and scorers of the user's own, resumes, and refuses with a sentence."""

import json
import signal
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from repo import train
from repo.common.errors import UserError

REQUIRED = (
    "step reward_mean cost_mean safe_rate rectified_cost compensation_gap lam kl entropy clip_frac "
    "response_tokens tokens_per_second"
).split()
TIME_FIELDS = ("seconds_", "tokens_per_second", "update_tokens_per_second")


def run(arguments: list[str], out: Path, *more: str) -> Path:
    train.run_command([*arguments, f"--out={out}", *more])
    return out


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def without_times(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in r.items() if not k.startswith(TIME_FIELDS)} for r in records]


@pytest.fixture(scope="module")
def finished(tiny_arguments, tmp_path_factory) -> Path:
    return run(tiny_arguments, tmp_path_factory.mktemp("runs") / "a")


def test_a_run_leaves_everything_that_was_promised(finished, tiny_model):
    records = lines(finished)
    assert [r["step"] for r in records] == [0, 1, 2, 3]
    assert all(set(REQUIRED) <= r.keys() for r in records)
    assert len(lines(finished, "samples.jsonl")) == 4 * 6
    assert yaml.safe_load((finished / "config.yaml").read_text())["model"]["path"] == str(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(finished / "final")
    AutoTokenizer.from_pretrained(finished / "final")
    assert (finished / "final" / "model.safetensors").is_file()
    start = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert not torch.equal(model.lm_head.weight, start.lm_head.weight)
    card = (finished / "final" / "README.md").read_text()
    assert "safe rate" in card
    assert "95 % bootstrap" in card
    for name in ("before", "after"):
        summary = json.loads((finished / "eval" / f"{name}.json").read_text())["summary"]
        assert summary["overall"]["reward"]["low"] is None  # of two prompts there is no interval
        assert summary["overall"]["reward"]["mean"] is not None


def test_lambda_follows_its_rule_line_by_line(finished):
    records = lines(finished)
    assert records[0]["lam"] == 1.0
    for this, following in pairwise(records):
        assert following["lam"] == min(this["lam"] + 2.0 * this["rectified_cost"], 10.0)


def test_metrics_agree_with_the_samples(finished):
    samples = lines(finished, "samples.jsonl")
    for record in lines(finished):
        costs = [s["cost"] for s in samples if s["step"] == record["step"]]
        assert record["cost_mean"] == pytest.approx(sum(costs) / 6)
        assert record["safe_rate"] == pytest.approx(sum(c <= 0 for c in costs) / 6)
        hinge = sum(max(c, 0) for c in costs) / 6
        assert record["rectified_cost"] == pytest.approx(hinge)
        assert record["compensation_gap"] == pytest.approx(hinge - max(sum(costs) / 6, 0))
        assert record["compensation_gap"] >= 0


def test_the_same_seed_gives_the_same_run_and_another_seed_another(finished, tiny_arguments, tmp_path):
    again = run(tiny_arguments, tmp_path / "again")
    assert without_times(lines(again)) == without_times(lines(finished))
    other = run(tiny_arguments, tmp_path / "other", "--seed=1")
    assert without_times(lines(other)) != without_times(lines(finished))


def test_resuming_gives_the_run_that_was_never_stopped(finished, tiny_arguments, tmp_path):
    part = run(tiny_arguments, tmp_path / "part", "--steps=2")
    assert (part / "final").is_dir()
    (part / "metrics.jsonl").open("a").write('{"step": 2, "torn')  # a line of a step that was not saved
    train.run_command(["--resume", str(part), "--steps=4"])
    assert without_times(lines(part)) == without_times(lines(finished))
    assert lines(part, "samples.jsonl") == lines(finished, "samples.jsonl")
    for name in ("before", "after"):
        assert (part / "eval" / f"{name}.json").read_text() == (finished / "eval" / f"{name}.json").read_text()
    assert (part / "final" / "README.md").read_text() == (finished / "final" / "README.md").read_text()
    first, second = (load_file(f / "final" / "model.safetensors") for f in (part, finished))
    assert all(torch.equal(first[k], second[k]) for k in second)


def test_a_run_that_stopped_before_its_final_evaluation_is_finished(finished, tiny_arguments, tmp_path, monkeypatch):
    def out_of_memory(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(train, "finish", out_of_memory)
        with pytest.raises(MemoryError):
            run(tiny_arguments, tmp_path / "run")
    assert not (tmp_path / "run" / "final").exists()
    train.run_command(["--resume", str(tmp_path / "run")])
    after = json.loads((tmp_path / "run" / "eval" / "after.json").read_text())
    assert after == json.loads((finished / "eval" / "after.json").read_text())


def test_a_run_that_died_before_its_first_checkpoint_starts_over(finished, tiny_arguments, tmp_path, monkeypatch):
    def died(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(train.Saver, "start", died)
        with pytest.raises(MemoryError):
            run(tiny_arguments, tmp_path / "run")
    train.run_command(["--resume", str(tmp_path / "run")])
    assert without_times(lines(tmp_path / "run")) == without_times(lines(finished))


def test_a_start_that_fails_leaves_the_name_free(tiny_arguments, tmp_path):
    with pytest.raises(UserError, match="prompt file not found"):
        run(tiny_arguments, tmp_path / "run", "--data.train=typo.jsonl")
    assert not (tmp_path / "run").exists()


def test_a_resume_that_fails_to_start_loses_nothing(finished, monkeypatch):
    def files():
        return {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}

    def missing(*_):
        raise UserError("a package is missing")

    before = files()
    monkeypatch.setattr(train, "load_parts", missing)
    with pytest.raises(UserError, match="a package is missing"):
        train.run_command(["--resume", str(finished), "--steps=9"])
    assert files() == before


def test_switches_are_not_abbreviated_and_not_read_from_yaml(tiny_arguments, tmp_path):
    with pytest.raises(UserError, match="unknown configuration key 'resum'"):
        train.run_command([*tiny_arguments, "--resum", str(tmp_path)])
    path = tmp_path / "with_resume.yaml"
    path.write_text("resume: somewhere\n")
    with pytest.raises(UserError, match="resume"):
        run(tiny_arguments, tmp_path / "run", f"--config={path}")


def test_nothing_embedded_is_needed_when_nothing_embedded_is_used(tiny_arguments, tmp_path, monkeypatch):
    def missing(*_, **__):
        raise train.run.UserError("a package is missing")

    monkeypatch.setattr("repo.assets.build", missing)
    options = ["--data.eval=embedded", "--evaluation.prompts=0", "--steps=1"]
    assert len(lines(run(tiny_arguments, tmp_path / "run", *options))) == 1


def test_the_model_card_names_no_folder_of_this_machine(finished, tiny_model):
    card = (finished / "final" / "README.md").read_text()
    assert str(tiny_model.parent) not in card
    assert f"Base model: `{tiny_model.name}`" in card


def test_a_signal_saves_and_says_how_to_go_on(finished, tiny_arguments, tmp_path, monkeypatch, capsys):
    plain = train.sample

    def interrupted(policy, prompts, samples, config, seed, step, part):
        if step == 1:
            signal.raise_signal(signal.SIGINT)
        return plain(policy, prompts, samples, config, seed, step, part)

    monkeypatch.setattr(train, "sample", interrupted)
    folder = run(tiny_arguments, tmp_path / "stopped")
    assert len(lines(folder)) == 2
    assert f"--resume {folder}" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr(train, "sample", plain)
    train.run_command(["--resume", str(folder)])
    assert without_times(lines(folder)) == without_times(lines(finished))


@pytest.mark.parametrize("method", ["ppo", "crpo", "fixed_penalty", "ppo_lagrangian"])
def test_every_method_trains(method, tiny_arguments, tmp_path):
    folder = run(
        tiny_arguments, tmp_path / method, f"--algorithm.method={method}", "--steps=2", "--evaluation.prompts=0"
    )
    lams = [r["lam"] for r in lines(folder)]
    assert lams[0] == (0.0 if method in ("ppo", "crpo") else 1.0)
    assert (lams[1] != lams[0]) == (method == "ppo_lagrangian")


@pytest.mark.parametrize(
    "options",
    [
        ["--algorithm.cost_mode=split"],
        ["--algorithm.kl_placement=reward", "--algorithm.beta=0.1"],
        ["--algorithm.kl_placement=reward-and-cost", "--algorithm.cost_mode=split"],
        ["--algorithm.advantages=gae", "--algorithm.method=crpo"],
        ["--algorithm.advantages=gae", "--algorithm.method=ppo", "--optimizer.epochs=2"],
        ["--algorithm.advantages=gae", "--algorithm.method=ppo_lagrangian", "--algorithm.entropy_coef=0.01"],
        ["--model.dtype=bfloat16", "--model.gradient_checkpointing=true"],
        ["--model.dtype=bfloat16", "--model.lora_rank=2", "--algorithm.advantages=gae"],
        ["--loggers=[tensorboard]"],
        ["--algorithm.scale_by_std=true"],
        ["--optimizer.epochs=2", "--optimizer.minibatches=2", "--algorithm.dual_clip=3"],
        ["--algorithm.kl_estimator=k2", "--algorithm.loss_agg_mode=seq-mean-token-mean", "--algorithm.normalize=true"],
    ],
)
def test_every_option_trains(options, tiny_arguments, tmp_path):
    folder = run(tiny_arguments, tmp_path / "run", "--steps=1", "--evaluation.prompts=0", *options)
    assert lines(folder)[0]["skipped"] == 0
    assert lines(folder)[0]["grad_norm"] > 0


def test_training_towards_a_reward_raises_it(tiny_arguments, tmp_path):
    options = ["--steps=25", "--evaluation.prompts=0", "--save_every=0", "--algorithm.method=ppo", "--algorithm.beta=0"]
    folder = run(tiny_arguments, tmp_path / "ppo", *options, "--optimizer.lr=3e-3", "--rollout.samples_per_prompt=8")
    rewards = [r["reward_mean"] for r in lines(folder)]
    assert sum(rewards[-5:]) > 2 * sum(rewards[:5])


def test_dry_run_reads_shapes_and_writes_nothing(tiny_arguments, tmp_path, capsys):
    run(tiny_arguments, tmp_path / "dry", "--dry-run")
    printed = capsys.readouterr().out
    assert "without activations, KV cache and scorers\n" in printed
    assert "train prompts: 4 of" in printed
    assert "2 prompts x 3 samples = 6 responses" in printed
    assert "GiB  AdamW states" in printed
    assert not (tmp_path / "dry").exists()


def test_printed_config_is_a_config(tiny_arguments, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(tiny_arguments, tmp_path / "x", "--print_config")
    assert stopped.value.code == 0
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    train.run_command(["--config", str(path), "--dry-run"])
    assert "2 prompts x 3 samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--stps=3"], "unknown configuration key 'stps'; did you mean 'steps'?"),
        (["--optimizer.learning=3"], "unknown configuration key 'optimizer.learning'"),
        (["--steps=many"], "steps must be a PositiveInt; got 'many'"),
        (["--rollout.samples_per_prompt=1"], "rollout.samples_per_prompt must be >= 2"),
        (["--algorithm.method=dpo"], "algorithm.method"),
        (["--config=nowhere.yaml"], "config: File does not exist:"),
        (["--data.train=nowhere.jsonl"], "prompt file not found: nowhere.jsonl"),
        (["--model.path=nowhere/model"], "model.path: cannot load 'nowhere/model'"),
        (["--scoring.reward=nowhere:f"], "scoring.reward: cannot import module 'nowhere'"),
        (["--scoring.cost=tests.loop.scorers:none"], "has no function 'none'"),
        (
            ["--scoring.cost=oops"],
            "scoring.cost must be 'embedded', a model (folder or hub name) or 'module:function'; got 'oops'",
        ),
        (["--scoring.cost=tests.loop.scorers:not_a_number"], "not_a_number' gave nan for a response to the prompt"),
        (["--scoring.cost=tests.loop.scorers:too_few"], "must return 6 numbers; got shape (5,)"),
        (["--scoring.reward=tests.loop.scorers:raising"], "raised KeyError: 'harm' ("),
        (["--scoring.reward=tests.loop.scorers:raising"], "scorers.py:"),
        (["--scoring.reward=tests.loop.broken:f"], "cannot import module 'tests.loop.broken': NameError"),
        (
            ["--rollout.max_response_tokens=300"],
            "rollout.max_response_tokens=300 leaves no room for a prompt in a context of 256",
        ),
        (
            ["--data.max_prompt_tokens=3"],
            "no prompt is left of 4; dropped: 4 longer than 3 tokens; data.max_prompt_tokens",
        ),
        (
            ["--scoring.cost=tests.loop.scorers:hanging", "--scoring.timeout=0.2"],
            "did not return within scoring.timeout",
        ),
        (["--algorithm.cost_limit=.nan"], "algorithm.cost_limit must be finite; got nan"),
        (["--algorithm.dual_clip=.inf"], "algorithm.dual_clip must be finite; got inf"),
        (
            ["--algorithm.kl_placement=reward-and-cost", "--algorithm.method=ppo"],
            "algorithm.kl_placement must be loss or reward with method ppo",
        ),
        (["--algorithm.advantages=gae", "--algorithm.scale_by_std=true"], "algorithm.scale_by_std must be false"),
        (["--ptx.data=nowhere.jsonl"], "prompt file not found: nowhere.jsonl"),
        (["--loggers=[tensorboad]"], "loggers"),
        (["--optimizer.betas=[0.9, 1.5]"], "optimizer.betas must be >= 0 and <= 1; got 1.5"),
        (
            ["--algorithm.kl_estimator=k1", "--algorithm.kl_importance_weighted=false"],
            "algorithm.kl_importance_weighted must be true",
        ),
    ],
)
def test_bad_input_is_one_sentence(more, message, tiny_arguments, tmp_path):
    with pytest.raises(UserError) as error:
        run(tiny_arguments, tmp_path / "run", *more, "--evaluation.prompts=0")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_prompt_longer_than_the_context_is_dropped_and_counted(tiny_arguments, tiny_prompts, tmp_path, capsys):
    path = tmp_path / "long.jsonl"
    path.write_text(tiny_prompts[0].read_text() + json.dumps({"id": "long", "prompt": "bread " * 400}) + "\n")
    options = [f"--data.train={path}", "--data.max_prompt_tokens=9999", "--evaluation.prompts=0", "--steps=1"]
    folder = run(tiny_arguments, tmp_path / "run", *options)
    assert f"train prompts: 4 of {path}" in capsys.readouterr().out.replace("\n", "")
    assert len(lines(folder)) == 1


def test_an_empty_prompt_list_is_a_sentence(tiny_arguments, tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text("\n\n")
    with pytest.raises(UserError, match="no prompts in .*empty.jsonl"):
        run(tiny_arguments, tmp_path / "run", f"--data.train={path}")


def test_held_out_prompts_are_never_trained_on(tiny_arguments, tiny_prompts, tmp_path, capsys):
    with pytest.raises(UserError, match="every prompt of data.train is in data.eval too"):
        run(tiny_arguments, tmp_path / "none", f"--data.eval={tiny_prompts[0]}")
    records = [json.loads(line) for line in tiny_prompts[0].read_text().splitlines()]
    path = tmp_path / "eval.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records[:2]))
    folder = run(tiny_arguments, tmp_path / "some", f"--data.eval={path}", "--steps=3")
    assert "train prompts: 2 more dropped, since they are held out" in capsys.readouterr().out
    assert {s["id"] for s in lines(folder, "samples.jsonl")} == {r["id"] for r in records[2:]}


def test_a_kl_in_the_reward_holds_the_policy_back(tiny_arguments, tmp_path):
    """The only sign with which a large beta lowers the KL that training towards a reward leaves."""
    options = [
        "--steps=12",
        "--evaluation.prompts=0",
        "--save_every=0",
        "--algorithm.method=ppo",
        "--optimizer.lr=3e-3",
    ]
    options += [
        "--optimizer.lr=3e-3",
        "--algorithm.kl_placement=reward",
        "--rollout.samples_per_prompt=8",
        "--rollout.prompts_per_step=4",
    ]
    for advantages in ("group", "gae"):
        found = {}
        for beta in (0.0, 10.0):
            more = [f"--algorithm.beta={beta}", f"--algorithm.advantages={advantages}"]
            folder = run(tiny_arguments, tmp_path / f"{advantages}{beta}", *options, *more)
            found[beta] = sum(r["kl"] for r in lines(folder)[-4:])
        assert found[10.0] < 0.7 * found[0.0]


def test_a_resume_may_change_what_does_not_change_the_steps_done(tiny_arguments, tmp_path):
    folder = run(tiny_arguments, tmp_path / "run", "--steps=1", "--evaluation.prompts=0")
    more = ["--scoring.timeout=9", "--optimizer.max_skipped=7", "--loggers=[tensorboard]"]
    train.run_command(["--resume", str(folder), "--steps=2", *more])
    assert len(lines(folder)) == 2


@pytest.mark.parametrize("when", ["start", "resume"])
def test_a_logger_that_cannot_start_loses_nothing(when, tiny_arguments, tmp_path, monkeypatch):
    def no_network(*_):
        raise ConnectionError("network is down")

    options, out = [*tiny_arguments, "--evaluation.prompts=2", "--steps=1"], tmp_path / "run"
    if when == "resume":
        run(options, out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    monkeypatch.setattr("repo.runs.loggers._tensorboard", no_network)
    command = [*options, f"--out={out}"] if when == "start" else ["--resume", str(out), "--steps=2"]
    with pytest.raises(UserError, match="loggers: tensorboard cannot start: ConnectionError: network is down"):
        train.run_command([*command, "--loggers=[tensorboard]"])
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert out.exists() == (when == "resume")


def test_an_existing_folder_is_refused_and_left_alone(tiny_arguments, tmp_path):
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(UserError, match="exists; choose another folder, or continue that run with --resume"):
        run(tiny_arguments, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["kept.txt"]


def test_resume_refuses_what_is_no_run_and_what_would_change_it(finished, tiny_arguments, tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        train.run_command(["--resume", str(tmp_path)])
    with pytest.raises(UserError, match="already has 4 steps; ask for more with --steps"):
        train.run_command(["--resume", str(finished)])
    with pytest.raises(UserError, match=r"algorithm.beta was 0.02 in this run and cannot become 0.5"):
        train.run_command(["--resume", str(finished), "--steps=9", "--algorithm.beta=0.5"])
    with pytest.raises(UserError, match="--resume: expected one argument"):
        train.run_command(["--resume"])
