"""AdamW with moments in fewer bits: close to fp32, small in memory, resumed bit for bit."""

import io
import json
import sys
from itertools import product

import pytest
import torch
from torch import nn

from repo import train
from repo.common.errors import UserError
from repo.config.schema import Config, OptimizerConfig
from repo.memory.description import describe_memory
from repo.memory.process import Process
from repo.training.optimizer import BLOCK, BFloat16AdamW, make_optimizer

BYTES = {"float32": 8.0, "bfloat16": 4.0, "8bit": 2 + 2 * 4 / 256}
NEAR = {"bfloat16": 0.01, "8bit": 0.1}


@pytest.fixture(params=["float32", "bfloat16", "8bit"])
def states(request):
    if request.param == "8bit":
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    return request.param


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64), nn.LayerNorm(64))


def optimizer_of(model, states, betas=(0.9, 0.95)):
    config = Config(optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.1, state_dtype=states, betas=betas))
    return make_optimizer(model, nn.ModuleDict(), config)


def step(model, optimizer, index):
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(index))
    (model(x) - x.roll(1, 0)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("few", NEAR)
def test_twenty_steps_stay_close_to_those_with_fp32_moments(few):
    if few == "8bit":
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    ends, start = {}, weights(make_model())
    for kind in ("float32", few):
        model = make_model()
        optimizer = optimizer_of(model, kind)
        for index in range(20):
            step(model, optimizer, index)
        ends[kind] = weights(model)
    moved = (ends["float32"] - start).norm()
    assert 0 < (ends[few] - ends["float32"]).norm() < NEAR[few] * moved


def test_bf16_moments_follow_adamw_written_out(monkeypatch):
    weight = nn.Parameter(torch.linspace(-1, 1, 15).view(5, 3).t())  # not contiguous
    monkeypatch.setattr("repo.training.optimizer.BLOCK", 7)
    optimizer = BFloat16AdamW([{"params": [weight], "lr": 0.1, "weight_decay": 0.5}], (0.8, 0.9))
    expected, m, v = weight.detach().clone(), torch.zeros(3, 5), torch.zeros(3, 5)
    for t, gradient in enumerate((torch.randn(3, 5), torch.randn(3, 5), torch.zeros(3, 5)), 1):
        weight.grad = gradient
        optimizer.step()
        m, v = 0.8 * m + 0.2 * gradient, 0.9 * v + 0.1 * gradient**2
        update = (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-8)
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * update
        assert torch.allclose(weight, expected, atol=1e-6)
        m, v = m.bfloat16().float(), v.bfloat16().float()
    assert torch.allclose(optimizer.state[weight]["exp_avg_sq"].float(), v, rtol=2**-8)


def test_blocks_do_not_change_a_step(monkeypatch):
    ends = []
    for block in (BLOCK, 1000):
        monkeypatch.setattr("repo.training.optimizer.BLOCK", block)
        model = make_model()
        optimizer = optimizer_of(model, "bfloat16")
        step(model, optimizer, 0)
        step(model, optimizer, 1)
        ends.append(weights(model))
    assert torch.equal(*ends)


def test_the_bytes_of_the_states_are_those_promised(states):
    model = nn.Linear(256, 256, bias=False)
    optimizer = optimizer_of(model, states)
    model(torch.ones(1, 256)).sum().backward()
    optimizer.step()
    held = optimizer.state[model.weight].items()
    size = sum(t.nbytes for name, t in held if name != "step" and not name.startswith("qmap"))  # qmap: 1 KB for all
    assert size == BYTES[states] * model.weight.numel()


def test_memory_counts_the_states(states):
    model = nn.Linear(2**14, 2**14, bias=False, device="meta")
    text = describe_memory(Process(Config(optimizer=OptimizerConfig(state_dtype=states)), model, 1000))
    assert f"{BYTES[states] / 4:.2f} GiB  AdamW states {states}" in text


def test_a_saved_state_goes_on_bit_for_bit(states):
    whole, part = make_model(), make_model()
    one, other = optimizer_of(whole, states), optimizer_of(part, states)
    for index, (model, optimizer) in product(range(3), ((whole, one), (part, other))):
        step(model, optimizer, index)
    file = io.BytesIO()
    torch.save(other.state_dict(), file)
    file.seek(0)
    again = optimizer_of(part, states)
    again.load_state_dict(torch.load(file, weights_only=True))
    for index, (model, optimizer) in product(range(3, 6), ((whole, one), (part, again))):
        step(model, optimizer, index)
    assert torch.equal(weights(whole), weights(part))


def test_a_run_with_small_states_resumes_bit_for_bit(states, tiny_arguments, tmp_path):
    options = [*tiny_arguments, "--evaluation.prompts=0", f"--optimizer.state_dtype={states}"]
    train.run_command([*options, f"--out={tmp_path / 'whole'}"])
    train.run_command([*options, f"--out={tmp_path / 'part'}", "--steps=2"])
    train.run_command(["--resume", str(tmp_path / "part"), "--steps=4"])
    whole, part = ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "part"))
    for line, other in zip(map(timeless, whole), map(timeless, part), strict=True):
        assert line == other


def timeless(line):
    """A metrics line without what the clock says."""
    return {k: v for k, v in json.loads(line).items() if "seconds" not in k and "tokens_per" not in k}


def test_betas_that_bf16_cannot_follow_are_refused():
    with pytest.raises(UserError, match=r"optimizer.betas must be in \[0, 0.996\].*got \[0.9, 0.999\]"):
        optimizer_of(make_model(), "bfloat16", betas=(0.9, 0.999))


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match="needs the package bitsandbytes: pip install bitsandbytes"):
        optimizer_of(make_model(), "8bit")
