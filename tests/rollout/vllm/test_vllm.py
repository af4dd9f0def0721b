"""With vLLM itself: `make test-vllm`, which sets up its environment. $REPO_VLLM_PYTHON names another one."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from repo import train
from repo.common.errors import UserError
from repo.config.schema import Config, DataConfig, ModelConfig
from repo.data.prompts import Prompt
from repo.models.actor import Actor, read_reference
from repo.models.policy import Policy, load_policy
from repo.rollout.sample import Rollout, sample
from repo.rollout.vllm.engine import VllmEngine, open_vllm
from repo.training.mismatch import agreement
from tests.support.run_folders import lines, run, without_times
from tests.support.tiny import save_tiny_model

pytestmark = pytest.mark.vllm
PYTHON = os.environ.get("REPO_VLLM_PYTHON", str(Path(__file__).parents[3] / ".venv-vllm" / "bin" / "python"))
if not Path(PYTHON).exists():
    pytest.skip(f"there is no {PYTHON}: make vllm-env", allow_module_level=True)

ENGINE = ["--rollout.engine=vllm", f"--rollout.vllm_python={PYTHON}"]
MOST = 1e-3  # nats per token between vLLM and the policy in fp32
ROLLOUT = replace(
    Config().rollout, engine="vllm", vllm_python=PYTHON, samples_per_prompt=4, max_response_tokens=24, temperature=0.7
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The tiny model with heads of 32 columns, the fewest that vLLM's attention on a CPU takes."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model", heads=2)


@pytest.fixture(scope="module")
def policy(model) -> Policy:
    return load_policy(str(model), torch.device("cpu"), True)


@pytest.fixture(scope="module")
def engine(policy):
    """An engine on the tiny model; tests may give it other fields of the rollout, other weights and stop tokens."""
    config = replace(Config(), rollout=ROLLOUT, data=DataConfig(max_prompt_tokens=200))
    with open_vllm(config, policy) as engine:
        engine.update(0)
        yield engine


@pytest.fixture
def arguments(tiny_arguments, model) -> list[str]:
    """Command line of a run of four steps that only trains, but for --out."""
    more = [f"--model.path={model}", "--evaluation.prompts=0", "--sample_every=0", "--rollout.temperature=0.7"]
    return [*tiny_arguments, *more, *ENGINE]


def prompts_of(lengths: list[int]) -> list[Prompt]:
    draw = torch.Generator().manual_seed(5)
    rows = [torch.randint(5, 380, (n,), generator=draw).tolist() for n in lengths]
    return [Prompt(id=f"p{i}", text="", category=None, token_ids=tuple(row)) for i, row in enumerate(rows)]


def with_fields(engine: VllmEngine, **fields) -> VllmEngine:
    """The same worker, asked for other samples."""
    other = object.__new__(VllmEngine)
    other.__dict__ |= engine.__dict__
    other.config = replace(engine.config, rollout=replace(engine.config.rollout, **fields))
    return other


def gap(policy: Policy, rollout: Rollout, temperature: float) -> float:
    """Mean difference of a rollout's log-probabilities from those of the policy, in nats per token."""
    logps, _ = read_reference(Actor(policy), rollout.sequences, temperature, 4096, ())
    return agreement(rollout.logps, logps, rollout.sequences.response_mask).gap


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_log_probabilities_are_those_of_the_distribution_drawn_from(engine, policy, temperature):
    rollout = with_fields(engine, temperature=temperature).sample(prompts_of([3, 40, 9]), 1)
    assert gap(policy, rollout, temperature) < MOST
    if temperature != 1:
        assert gap(policy, rollout, 1.0) > 0.1  # so that the line before says something


def test_with_top_p_they_are_those_of_the_tokens_that_are_left(engine, policy):
    rollout = with_fields(engine, temperature=1.0, top_p=0.6).sample(prompts_of([3, 40, 9]), 1)
    logps, _ = read_reference(Actor(policy), rollout.sequences, 1.0, 4096, ())
    mask = rollout.sequences.response_mask
    kept = (rollout.logps - logps)[mask]  # -log of the probability that the tokens left have together
    assert kept.min() > -MOST
    assert kept.max() < -torch.tensor(0.6).log() + MOST


def test_a_sample_depends_on_its_own_seed_alone(engine):
    prompts = prompts_of([3, 40, 9, 17])
    whole = engine.sample(prompts, 1)
    again, alone, other = engine.sample(prompts, 1), engine.sample(prompts, 1, range(2, 3)), engine.sample(prompts, 2)
    assert again.sequences.token_lists() == whole.sequences.token_lists()
    assert torch.equal(again.logps, whole.logps)
    assert alone.sequences.token_lists() == whole.sequences.token_lists()[8:12]
    assert len({tuple(response) for _, response in whole.sequences.token_lists()}) == 16
    assert other.sequences.token_lists() != whole.sequences.token_lists()
    twice = engine.sample([prompts[0]] * 2, 1)
    assert len({tuple(response) for _, response in twice.sequences.token_lists()}) == 8


def test_a_stop_token_ends_a_response_and_is_its_last(engine, policy):
    stops = tuple(range(0, 380, 20))
    other = with_fields(engine, temperature=2.0)
    other.policy = replace(policy, eos_ids=stops)
    rollout = other.sample(prompts_of([3, 40, 9, 17]), 3)
    responses = [response for _, response in rollout.sequences.token_lists()]
    ended = [response[-1] in stops for response in responses]
    assert [not t for t in rollout.truncated.tolist()] == ended
    assert all(token not in stops for response in responses for token in response[:-1])
    assert all(len(response) == 24 for response, end in zip(responses, ended, strict=True) if not end)
    assert 0 < sum(ended) < len(ended)


def test_shapes_and_groups_are_those_of_the_other_engine(engine, policy):
    prompts = prompts_of([3, 40])
    ours, theirs = sample(policy, prompts, 4, ROLLOUT, 0, 1), engine.sample(prompts, 1)
    assert theirs.prompts == ours.prompts
    assert torch.equal(theirs.group, ours.group)
    assert theirs.logps.dtype == ours.logps.dtype
    assert theirs.sequences.token_lists()[5][0] == ours.sequences.token_lists()[5][0]
    assert (theirs.logps == 0).equal(~theirs.sequences.response_mask)


def test_new_weights_are_sampled_with_also_where_a_prompt_was_cached(engine, policy):
    prompts = prompts_of([150, 160])  # longer than a block of the cache
    before = engine.sample(prompts, 1)
    assert gap(policy, before, 0.7) < MOST
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    assert gap(policy, before, 0.7) > 0.1
    engine.update(1)
    assert gap(policy, engine.sample(prompts, 1), 0.7) < MOST


@pytest.mark.parametrize("lora", [False, True])
def test_each_step_of_a_run_samples_with_the_weights_of_the_step_before(arguments, tmp_path, lora):
    more = ["--model.lora_rank=4", "--optimizer.lr=1e-2"] if lora else []
    records = lines(run(arguments, tmp_path / "run", *more))
    assert len(records) == 4
    assert all(r["rollout_gap"] < MOST and r["rollout_ess"] > 1 - MOST for r in records)
    assert records[-1]["kl"] > 0.01  # the policy is not what it was


def test_in_bf16_the_gap_is_that_of_its_rounding(model):
    settings = ModelConfig(dtype="bfloat16")
    policy = load_policy(str(model), torch.device("cpu"), True, settings)
    with open_vllm(replace(Config(), rollout=ROLLOUT, model=settings), policy) as engine:
        engine.update(0)
        rollout = engine.sample(prompts_of([3, 40, 9]), 1)
    assert 1e-5 < gap(policy, rollout, 0.7) < 0.1


def test_a_resumed_run_draws_the_same_samples_on_a_cpu(arguments, tmp_path, capsys):
    whole = run(arguments, tmp_path / "whole")
    assert "bit-exact resume is off" in capsys.readouterr().out
    part = run(arguments, tmp_path / "part", "--steps=2")
    train.run_command(["--resume", str(part), "--steps=4"])
    assert without_times(lines(part)) == without_times(lines(whole))
    assert lines(part, "samples.jsonl") == lines(whole, "samples.jsonl")


def test_a_dead_worker_stops_the_run_with_a_sentence_and_it_can_be_resumed(arguments, tmp_path, monkeypatch):
    plain = VllmEngine.update

    def killed(self, step):
        if step == 3:
            os.kill(self.worker.process.pid, signal.SIGKILL)
        plain(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(VllmEngine, "update", killed)
        with pytest.raises(UserError, match="the vLLM worker ended with exit code -9"):
            run(arguments, tmp_path / "run")
    assert len(lines(tmp_path / "run")) == 3
    train.run_command(["--resume", str(tmp_path / "run")])
    assert [r["step"] for r in lines(tmp_path / "run")] == [0, 1, 2, 3]


def test_a_dry_run_names_the_version(arguments, tmp_path, capsys):
    run(arguments, tmp_path / "run", "--dry-run")
    assert f"of {PYTHON}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.assets
def test_the_embedded_default_trains_with_vllm(tmp_path):
    exact = ["--steps=3", "--evaluation.prompts=0", "--model.matmul_dtype=float32"]
    records = lines(run([*exact, *ENGINE], tmp_path / "run"))
    assert all(r["rollout_gap"] < MOST for r in records)
    assert records[-1]["kl"] > 1e-3
    print(json.dumps([{k: r[k] for k in ("rollout_gap", "seconds_rollout", "tokens_per_second")} for r in records]))
