"""Description: the bytes that a run holds, computed from the shapes of its tensors, as a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from ..common.config_fields import config_field
from ..common.errors import first_line
from ..data.packing import Packed
from .activations import Activations, activations_of
from .batch import filled, padded
from .process import Process, parameters_of
from .rollout import cache_bytes, decoding
from .twin import kinds_of
from .weights import loaded, states_per_weight, trained

T = TypeVar("T")
GIB = 2.0**30


@dataclass(frozen=True)
class Memory:
    """What a process holds, in bytes by name.

    loaded: weights of the models. trained: what the optimiser adds to them for good. gradients, update, sampling: what
    an optimiser step, each of its micro-batches and the rollout add.
    activations: of the policy in a micro-batch, which `update` lists; None if they could not be computed.
    tokens: of a micro-batch. passes: micro-batches of an optimiser step. uncounted: what is not in these bytes.
    """

    loaded: dict[str, float]
    trained: dict[str, float]
    gradients: dict[str, float]
    update: dict[str, float]
    sampling: dict[str, float]
    activations: Activations | None
    tokens: int
    passes: int
    uncounted: tuple[str, ...]

    @property
    def always(self) -> float:
        """Bytes that every step holds."""
        return sum(self.loaded.values()) + sum(self.trained.values())

    @property
    def updating(self) -> float:
        """Most bytes that the update adds at once.

        In an optimiser step of one micro-batch the gradients come as the activations go.
        """
        gradients, passes = sum(self.gradients.values()), sum(self.update.values())
        if self.passes > 1 or self.activations is None:
            return gradients + passes
        return max(passes, gradients + self.activations.outside + self.activations.working)

    @property
    def peak(self) -> float:
        """Most bytes at once."""
        return self.always + max(self.updating, sum(self.sampling.values()))


def memory_of(process: Process, tokens: int | None = None) -> Memory:
    """Compute what a process holds.

    tokens: of a micro-batch; None for optimizer.micro_batch_tokens, or the whole batch if that is "auto".
    """
    config, uncounted = process.config, list[str]()
    asked = config.optimizer.micro_batch_tokens if tokens is None else tokens
    most = process.batch_tokens if asked == "auto" else asked
    one = process.longest_prompt + config.rollout.max_response_tokens - 1
    alone = process.attention is not None and not (process.attention.packs or process.attention.pads)
    tokens = one if alone else max(one, min(most, process.batch_tokens))
    activations = _try(lambda: _policy_activations(process, tokens), "activations", uncounted)
    update = {} if activations is None else _update_lines(process, activations, tokens)
    update |= _critic_lines(process, tokens, uncounted)
    sampling = {f"rollout: {name}": size for name, size in decoding(process).items()}
    if (cache := _try(lambda: cache_bytes(process, kinds_of(process.model)), "KV cache", uncounted)) is not None:
        sampling["rollout: KV cache"] = cache
    passes = -(-process.batch_tokens // tokens) if config.ptx.data is None else 2
    gradients = {"update: gradients fp32": 4 * parameters_of(process.model, trained_only=True) / process.shards}
    uncounted += _never_counted(process)
    return Memory(
        loaded(process), trained(process), gradients, update, sampling, activations, tokens, passes, tuple(uncounted)
    )


def describe_memory(process: Process) -> str:
    """List what a process holds, in GiB: weights, AdamW's states, and what update and rollout add at their peaks."""
    memory = memory_of(process)
    lines = memory.loaded | memory.trained | memory.gradients | memory.update | memory.sampling
    text = [f"  {size / GIB:7.2f} GiB  {name}" for name, size in lines.items()]
    text.append(f"  {memory.peak / GIB:7.2f} GiB  at most at once, without {', '.join(memory.uncounted)}")
    avoided = 4 * memory.tokens * process.vocabulary
    text.append(f"  {avoided / GIB:7.2f} GiB  avoided: the logits of all {memory.tokens} rows")
    return "\n".join(text)


def _policy_activations(process: Process, tokens: int) -> Activations:
    activations = activations_of(process.model, micro_batch(process, tokens), process.update())
    if process.shards == 1:
        return activations
    # FSDP2 gathers two layers at a time, and what lies outside the layers, in the type of the forward pass
    weights = parameters_of(process.model)
    layers = sum(kind.weights * kind.count for kind in kinds_of(process.model))
    gathered = process.dtype.itemsize * (weights - layers + 2 * layers // activations.count)
    return replace(activations, copies=gathered, released=0)


def micro_batch(process: Process, tokens: int) -> Packed:
    """Lay out a micro-batch of `tokens` tokens with the longest prompts and responses."""
    r, prompt = process.config.rollout, process.longest_prompt
    if process.attention is None or process.attention.packs:
        if process.config.algorithm.on_pairs:  # a pair stays together
            return filled(max(tokens, prompt + 2 * r.max_response_tokens - 2), prompt, r.max_response_tokens, 2)
        return filled(tokens, prompt, r.max_response_tokens, r.samples_per_prompt)
    return padded(tokens if process.attention.pads else 0, prompt, r.max_response_tokens)


def _update_lines(process: Process, a: Activations, tokens: int) -> dict[str, float]:
    """Name the parts of the policy's activations."""
    recomputes = process.config.model.gradient_checkpointing
    kept = "the inputs of" if recomputes else "activations of"
    attention = "" if recomputes else f", {a.attention / GIB:.2f} GiB of it by attention"
    lines: dict[str, float] = {
        f"update: {kept} {a.count} layers for {tokens} tokens{attention}": a.layers,
        "update: states and gradients outside the layers, those of the head included": a.outside,
    }
    if copies := max(a.copies, a.released):
        lines["update: weights in bfloat16"] = copies
    head, budget = process.head(), process.update().budget
    assert budget is not None
    chunk = budget.rows(tokens, head)
    working = f"one layer's {'recomputation and ' * recomputes}backward pass, or {chunk} of {tokens} rows of logits"
    return lines | {f"update: {working}": a.working}


def _critic_lines(process: Process, tokens: int, uncounted: list[str]) -> dict[str, float]:
    """Name the activations of critics that have a model of their own."""
    lines: dict[str, float] = {}
    if process.critics is None:
        return lines
    for signal, critic in process.critics.named_children():
        if (trunk := getattr(critic, "trunk", None)) is not None:
            compute = partial(activations_of, trunk, micro_batch(process, tokens), process.of_critic())
            name = f"activations of the {signal} critic"
            if (activations := _try(compute, name, uncounted)) is not None:
                lines[f"update: {name}"] = activations.peak
    return lines


def _try(compute: Callable[[], T], name: str, uncounted: list[str]) -> T | None:
    """Compute something, or else add to `uncounted` its name and the reason why it cannot be."""
    try:
        return compute()
    except Exception as error:  # models raise errors of many types
        uncounted.append(f"{name} ({first_line(error)})")
        return None


def _credit_bytes(process: Process) -> int:
    """Return the bytes of learned credit: its covariance and two more of that size, and two states of each token."""
    model: Any = process.model
    rollout, hidden = process.config.rollout, int(config_field(model.config.get_text_config(), "hidden_size", 0))
    responses = -(-rollout.prompts_per_step // process.processes) * rollout.samples_per_prompt
    return 3 * 8 * (2 * hidden + 1) ** 2 + 4 * 2 * hidden * responses * rollout.max_response_tokens


def _never_counted(process: Process) -> list[str]:
    """Name what is not counted."""
    config, names = process.config, list[str]()
    names += [] if process.scorers is not None else ["scorers"]
    names.append("what scorers and libraries allocate while they run")
    if config.algorithm.credit == "redistributed":
        names.append(f"nor learned credit, in the processor's memory {_credit_bytes(process) / GIB:.2f} GiB")
    if process.critics is None and config.algorithm.advantages == "gae" and config.critic.init_from == "scorers":
        names.append(
            f"nor the critics, {8 + states_per_weight(process):g} bytes per parameter of the scorers they copy"
        )
    return names
