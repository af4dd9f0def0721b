"""Compiled decoder layers: the same numbers, one graph for every length, none in a rollout."""

import copy
import dataclasses
import re
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

from repo.attention.adapters import torch_kernel
from repo.common.errors import UserError
from repo.config.schema import ModelConfig, RolloutConfig
from repo.data.packing import pack
from repo.data.prompts import Prompt, tokenize_prompts
from repo.data.sequences import make_sequences
from repo.models.actor import Actor
from repo.models.fast_layers import choice
from repo.models.fast_layers.choice import with_fast_layers, with_liger
from repo.models.hidden_states import trunk_states
from repo.models.layers import compile_layers, recomputed, uncompile_layers, uncompiled
from repo.models.policy import load_policy
from repo.rollout.sample import sample
from repo_kernels.layers import liger_layers
from tests.attention.op import varlen_attn
from tests.support.packed_models import FAMILIES, build, sequences
from tests.support.tiny import QUESTIONS

CPU = torch.device("cpu")
BATCHES = [[[5, 6, 7], [8, 9]], [[11]], [[20, 21, 22, 23], [24, 25, 26], [27]], [[30] * 40, [31, 32]]]


@pytest.fixture
def pair(tiny_model):
    """A policy whose layers are compiled, without code generation, beside one that is not."""
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = (load_policy(str(tiny_model), CPU, trainable=True) for _ in range(2))
    assert compile_layers(compiled.model, backend="eager") == 2
    yield plain, dataclasses.replace(compiled, compiled=True)
    torch._dynamo.reset()


def log_probs_and_gradient(policy, responses):
    """Of packed responses to two prompts, the first of which they share but for the last response."""
    prompts = [[3, 4, 5, 6]] * (len(responses) - 1) + [[7, 8]]
    group = torch.tensor([0] * (len(responses) - 1) + [1])
    actor = Actor(policy)
    sequences = make_sequences(prompts, responses, policy.pad_id, group)
    packed = actor.parts(sequences, torch.arange(len(responses)), 10**6)[0].to(policy.device)
    policy.model.zero_grad()
    with policy.copies():
        logps = actor(packed, lambda states, _: states.logps(1.0))
        logps.sum().backward()
    return logps.detach(), torch.cat([p.grad.flatten() for p in policy.model.parameters()])


def same(one, other):
    return all((a - b).norm() <= 1e-5 * b.norm() for a, b in zip(one, other, strict=True))


def test_log_probs_and_gradients_are_those_of_the_layers_as_they_are(pair):
    plain, compiled = pair
    assert same(log_probs_and_gradient(compiled, BATCHES[0]), log_probs_and_gradient(plain, BATCHES[0]))
    assert counters["stats"]["unique_graphs"] > 0
    assert list(compiled.model.state_dict()) == list(plain.model.state_dict())


def test_other_lengths_do_not_compile_anew(pair):
    plain, compiled = pair
    graphs = []
    for responses in BATCHES:
        assert same(log_probs_and_gradient(compiled, responses), log_probs_and_gradient(plain, responses))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == graphs[:1] * 4


def test_with_an_attention_that_the_compiler_knows_a_layer_is_one_graph(pair):
    """For any length, by checkpointing and with working copies of the weights, which are others in each step."""
    plain, compiled = pair
    attention = dataclasses.replace(compiled.attention, kernel=torch_kernel(varlen_attn))
    compiled, graphs = dataclasses.replace(compiled, attention=attention), []
    for responses in (BATCHES[0], BATCHES[2], BATCHES[3]):
        assert same(log_probs_and_gradient(compiled, responses), log_probs_and_gradient(plain, responses))
        with recomputed(compiled.model):
            log_probs_and_gradient(compiled, responses)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1, 2, 2]  # the second is for rows that share a prompt
    halved = dataclasses.replace(compiled, autocast=torch.bfloat16, copied=True)
    for _ in range(2):
        log_probs_and_gradient(halved, BATCHES[0])
    assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]


def test_recomputed_layers_are_compiled_all_the_same(pair):
    plain, compiled = pair
    expected = log_probs_and_gradient(plain, BATCHES[0])
    log_probs_and_gradient(compiled, BATCHES[0])
    graphs = counters["stats"]["unique_graphs"]
    before = [layer.forward for layer in compiled.model.model.layers]
    with recomputed(compiled.model):
        assert same(log_probs_and_gradient(compiled, BATCHES[0]), expected)
    assert counters["stats"]["unique_graphs"] == graphs
    assert [layer.forward for layer in compiled.model.model.layers] == before


def test_a_rollout_does_not_compile(pair):
    plain, _ = pair
    prompts = tokenize_prompts([Prompt(q, q, "") for q in QUESTIONS[:2]], plain.tokenizer, None, 99).kept
    texts = [sample(policy, prompts, 2, RolloutConfig(max_response_tokens=6), 0, 0).texts for policy in pair]
    assert texts[0] == texts[1]
    assert counters["stats"]["unique_graphs"] == 0
    with uncompiled(plain.model):
        log_probs_and_gradient(plain, BATCHES[0])
    assert not any("forward" in layer.__dict__ for layer in plain.model.model.layers)


@pytest.mark.parametrize(
    ("family", "kinds"),
    [("gemma3", 2), *(pytest.param(name, 1, marks=pytest.mark.long) for name in ("qwen3", "mistral-window", "gpt2"))],
)
def test_each_kind_of_layer_of_a_family_is_one_graph(family, kinds):
    torch._dynamo.reset()
    counters.clear()
    model, kernel = build(FAMILIES[family]), torch_kernel(varlen_attn)
    rows = [pack(sequences(), torch.tensor(rows), True) for rows in ([0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 4])]
    expected = [trunk_states(model.base_model, packed, kernel=kernel)[0] for packed in rows]
    compile_layers(model, backend="eager")
    for packed, states in zip(rows, expected, strict=True):
        assert same(trunk_states(model.base_model, packed, kernel=kernel), [states])
    assert counters["stats"]["unique_graphs"] == kinds
    assert not counters["graph_break"]
    torch._dynamo.reset()


def test_layers_are_compiled_by_default_where_a_trial_works(tiny_model, monkeypatch):
    torch._dynamo.reset()
    policy = load_policy(str(tiny_model), CPU, trainable=True, config=ModelConfig(dtype="bfloat16"))
    assert with_fast_layers(policy, "auto").compiled is False  # on a CPU
    policy = dataclasses.replace(policy, copied=True)
    monkeypatch.setattr(choice, "compile_layers", partial(compile_layers, backend="eager"))
    compiled, notes = choice.with_compiled_layers(policy)
    assert compiled.compiled
    assert re.fullmatch(r"compiled in \d+ s, 4 graphs", notes)
    uncompile_layers(policy.model)
    torch._dynamo.reset()


@pytest.mark.parametrize("fault", ["no compiler found", ""])
def test_a_trial_that_fails_leaves_the_layers_as_they_are_and_says_why(fault, tiny_model, monkeypatch):
    def backend(graph, inputs):
        if fault:
            raise RuntimeError(fault)
        return lambda *arguments: [x * 1.5 if isinstance(x, torch.Tensor) else x for x in graph(*arguments)]

    torch._dynamo.reset()
    policy = load_policy(str(tiny_model), CPU, trainable=True)
    monkeypatch.setattr(choice, "compile_layers", partial(compile_layers, backend=backend))
    plain, notes = choice.with_compiled_layers(policy)
    assert not plain.compiled
    assert notes.startswith(
        "not compiled: torch.compile " + ("fails: " if fault else "changes states or gradients by ")
    )
    assert fault in notes
    assert not any("forward" in layer.__dict__ for layer in policy.model.model.layers)
    torch._dynamo.reset()


def test_a_model_without_decoder_layers_is_refused():
    with pytest.raises(UserError, match="model.compile must be false: Linear has no decoder layers"):
        compile_layers(torch.nn.Linear(2, 2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_layers_are_compiled_on_a_gpu(tiny_model):
    torch._dynamo.reset()
    policy = load_policy(str(tiny_model), torch.device("cuda"), True, ModelConfig(dtype="bfloat16"))
    fast = with_fast_layers(policy, "auto")
    assert fast.compiled, fast.layers
    assert fast.copied, fast.layers
    graphs = counters["stats"]["unique_graphs"]
    for responses in BATCHES[2:]:
        log_probs_and_gradient(fast, responses * 2)
    assert counters["stats"]["unique_graphs"] <= graphs + 1
    torch._dynamo.reset()


@pytest.mark.slow
def test_generated_code_computes_the_same():
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    plain = LlamaForCausalLM(config).eval()
    compiled = copy.deepcopy(plain)
    compile_layers(compiled)
    results = []
    for model in (compiled, plain):
        logits = model(input_ids=torch.arange(14).view(2, 7), use_cache=False).logits
        logits.square().sum().backward()
        results.append((logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    assert same(*results)


def test_liger_is_taken_if_a_trial_agrees_and_its_reason_is_told(tiny_model, monkeypatch):
    policy = load_policy(str(tiny_model), CPU, True)
    monkeypatch.setattr(liger_layers, "why_not", lambda: "")
    taken, words = with_liger(policy)
    assert taken.liger
    assert words == "norms, rotary and SwiGLU by Liger"
    assert not taken.exact().liger  # decoding has its own kernels
    monkeypatch.setattr(liger_layers, "why_not", lambda: "is not installed")
    left, words = with_liger(policy)
    assert not left.liger
    assert words == "norms, rotary and SwiGLU by PyTorch: Liger is not installed"
