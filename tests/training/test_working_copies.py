"""Working copies of the weights: the bits of autocast, cast once per optimiser step however many micro-batches."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from repo.config.schema import AlgorithmConfig, Config, ModelConfig, OptimizerConfig, RolloutConfig
from repo.data.prompts import Prompt, tokenize_prompts
from repo.data.sequences import make_sequences
from repo.models.actor import Actor
from repo.models.fast_layers.choice import with_fast_layers
from repo.models.policy import load_policy
from repo.training.advantages import Advantages
from repo.training.batch import Batch
from repo.training.update import Updater
from tests.support.tiny import QUESTIONS

CPU = torch.device("cpu")


def policies(tiny_model, **options):
    """The same policy by autocast alone and with working copies."""
    config = ModelConfig(dtype="bfloat16", **options)
    plain, other = (load_policy(str(tiny_model), CPU, True, config) for _ in range(2))
    copied = with_fast_layers(other, "auto")
    assert copied.copied
    assert copied.layers == "weights cast to bfloat16 once per optimiser step"
    return plain, copied


def batch_of(policy):
    prompts = tokenize_prompts([Prompt(q, q, "") for q in QUESTIONS], policy.tokenizer, None, 200).kept
    generator = torch.Generator().manual_seed(1)
    responses = [torch.randint(5, 300, (3 + i,), generator=generator).tolist() for i in range(12)]
    group = torch.arange(6).repeat_interleave(2)
    ids = [prompts[i].token_ids for i in group.tolist()]
    sequences = make_sequences(ids, responses, policy.pad_id, group)
    reward, cost, costs = (torch.randn(12, generator=generator) for _ in range(3))
    ref = -torch.rand(sequences.response_ids.shape, generator=generator)
    return Batch(sequences, Advantages(reward, cost, reward - cost), costs, ref, 1.0, 0.02)


def updater_of(policy, budget, **optimizer):
    config = Config(
        algorithm=AlgorithmConfig(beta=0.1),
        optimizer=OptimizerConfig(micro_batch_tokens=budget, lr=1e-3, warmup_steps=0, **optimizer),
        rollout=RolloutConfig(),
    )
    return Updater(Actor(policy), config)


@pytest.mark.parametrize("recomputes", [False, True])
def test_losses_gradients_and_weights_are_those_of_autocast_bit_for_bit(tiny_model, recomputes):
    results = []
    for policy in policies(tiny_model, gradient_checkpointing=recomputes):
        updater, batch = updater_of(policy, 90, minibatches=2, epochs=2), batch_of(policy)
        with policy.copies():
            losses, _ = updater.accumulator.backward(batch, torch.arange(12))
        gradients = [None if p.grad is None else p.grad.clone() for p in policy.model.parameters()]
        updater.optimizer.zero_grad()
        result = updater.update(batch, 0, 1)
        results.append((losses, gradients, result.losses, result.grad_norm, list(policy.model.parameters())))
    for got, expected in zip(results[1][1], results[0][1], strict=True):
        assert (got is None) == (expected is None)
        assert got is None or (torch.equal(got, expected) and got.dtype == torch.float32)
    assert results[1][0] == results[0][0]
    assert results[1][2:4] == results[0][2:4]
    assert all(torch.equal(a, b) for a, b in zip(results[1][4], results[0][4], strict=True))


def test_adapters_compute_in_the_models_dtype_and_keep_less(tiny_model):
    """In fp32 each adapter casts its input and keeps it; the copies' results differ by rounding alone."""
    pytest.importorskip("peft")
    results = []
    for policy in policies(tiny_model, lora_rank=2):
        for name, p in policy.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(3))
        updater, batch, kept = updater_of(policy, 10**6), batch_of(policy), {}

        def keep(x, kept=kept):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with policy.copies(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            losses, _ = updater.accumulator.backward(batch, torch.arange(12))
        gradients = [p.grad for p in policy.model.parameters() if p.requires_grad]
        assert all(g.dtype == torch.float32 for g in gradients)
        results.append((losses["loss"], torch.cat([g.flatten() for g in gradients]), sum(kept.values())))
    (loss, gradient, kept), (loss_copied, gradient_copied, kept_copied) = results
    assert abs(loss - loss_copied) < 0.02 * abs(loss)
    assert (gradient - gradient_copied).norm() < 0.05 * gradient.norm()
    assert kept_copied < 0.75 * kept


class Casts(TorchDispatchMode):
    """Counts casts between fp32 and bf16 of tensors shaped like a layer's weight."""

    def __init__(self, model):
        super().__init__()
        embeddings = {
            id(p) for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in m.parameters()
        }
        self.shapes = {p.shape for p in model.parameters() if p.ndim == 2 and id(p) not in embeddings}
        self.casts = self.operators = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.shape in self.shapes:
            self.casts += out.dtype != args[0].dtype
        if func is torch.ops.aten._foreach_copy_.default:
            self.casts += sum(a.shape in self.shapes for a in args[0])
        return out


def casts_in_a_step(policy, budget):
    updater, batch = updater_of(policy, budget), batch_of(policy)
    parts = len(updater.actor.parts(batch.sequences, torch.arange(12), budget))
    with Casts(policy.model) as seen, policy.copies():
        updater.accumulator.backward(batch, torch.arange(12))
    updater.optimizer.zero_grad()
    return parts, seen.casts


def test_weights_are_cast_as_often_with_four_micro_batches_as_with_one(tiny_model):
    plain, copied = policies(tiny_model)
    matrices = 2 * 7  # of two layers
    for budget in (10**6, 60):
        parts, by_autocast = casts_in_a_step(plain, budget)
        assert by_autocast == 2 * matrices * parts  # forward, and the gradient's way back
        assert casts_in_a_step(copied, budget) == (parts, 2 * matrices)  # the copy, and the first gradient
    assert parts == 4


def test_weights_are_the_models_own_outside_a_step(tiny_model):
    _, policy = policies(tiny_model)
    before = dict(policy.model.named_parameters())
    head = policy.model.get_output_embeddings().weight
    with policy.copies():
        inside = dict(policy.model.named_parameters())
        assert policy.model.get_output_embeddings().weight is head
        halved = {name for name, p in inside.items() if p.dtype == torch.bfloat16}
        assert len(halved) == 14
        assert all(name.endswith("proj.weight") for name in halved)
    after = dict(policy.model.named_parameters())
    assert all(after[name] is p for name, p in before.items())
    with dataclasses.replace(policy, copied=False).copies():
        assert all(p.dtype == torch.float32 for p in policy.model.parameters())


def test_a_model_that_copies_break_keeps_autocast(tiny_model):
    """A layer that multiplies in fp32 whatever autocast says takes no bf16 weight."""
    policy = load_policy(str(tiny_model), CPU, True, ModelConfig(dtype="bfloat16"))
    layer = policy.model.model.layers[1].mlp.up_proj

    def exact(x):
        with torch.autocast("cpu", enabled=False):
            return torch.nn.functional.linear(x.float(), layer.weight)

    layer.forward = exact
    chosen = with_fast_layers(policy, "auto")
    assert not chosen.copied
    assert chosen.layers.startswith(
        "weights cast in every pass: with copies in bfloat16 the trial fails: RuntimeError: "
    )
