"""Sizes and rounds of a run, and its parts with their limits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """What a run measures.

    Args:
        losses: (tokens N, vocabulary V, dtype) of the losses from logits.
        compiled: which of them torch.compile takes too; each takes seconds to compile.
        heads: (N, hidden size H, V) of the losses from hidden states, in bf16.
        chunks: of linear_repo_loss, in tokens.
        calls: (N, V) of the overhead of a call, in bf16.
        forms: (N, V) of the launch forms, in bf16.
        copied: bytes of the copy that is the limit of memory-bound work.
        few: tokens of the problems on which ways are compared with fp64.
        repeats: calls in a loop whose host time is measured.
        rounds: timed rounds, by part; fewer if the time limit of the part nears.
        rehearsal: whether the numbers mean nothing.
    """

    losses: tuple[tuple[int, int, str], ...]
    compiled: tuple[tuple[int, int, str], ...]
    heads: tuple[tuple[int, int, int], ...]
    chunks: tuple[int, ...]
    calls: tuple[tuple[int, int], ...]
    forms: tuple[tuple[int, int], ...]
    copied: int
    few: int
    repeats: int
    rounds: dict[str, int]
    rehearsal: bool = False


REAL = Plan(
    losses=(
        (8192, 32_000, "bf16"), (8192, 151_936, "bf16"), (8192, 50_257, "bf16"), (8192, 128_256, "bf16"),
        (16_384, 8192, "bf16"), (8192, 49_152, "bf16"), (4096, 151_936, "fp32"),
    ),
    compiled=((8192, 32_000, "bf16"), (8192, 151_936, "bf16"), (4096, 151_936, "fp32")),
    heads=((8192, 4096, 151_936), (8192, 896, 151_936)),
    chunks=(1024, 2048, 4096),
    calls=((2048, 32_000), (256, 32_000)),
    forms=(
        (8192, 32_000), (8192, 151_936), (8192, 50_257), (8192, 128_256), (16_384, 8192), (8192, 49_152),
        (8192, 65_536), (8192, 100_352),
    ),
    copied=2 * 2**30,
    few=16,
    repeats=30,
    rounds={"losses": 15, "linear": 5, "call": 7, "forms": 7, "loop": 4},
)  # fmt: skip

REHEARSAL = Plan(
    losses=((4, 67, "bf16"),),
    compiled=((4, 67, "bf16"),),
    heads=((4, 16, 64),),
    chunks=(2,),
    calls=((4, 64),),
    forms=((4, 64),),
    copied=2**20,
    few=4,
    repeats=1,
    rounds={"losses": 1, "linear": 1, "call": 1, "forms": 1, "loop": 1},
    rehearsal=True,
)

PLANS = {"real": REAL, "rehearsal": REHEARSAL}


@dataclass(frozen=True)
class Part:
    """A process of a run: name and limit in seconds; together: it runs beside the part before it."""

    name: str
    limit: float
    together: bool = False


# By importance. The agreement fills the compilers' caches for the parts that measure, which run alone.
PARTS = (
    Part("tests", 75),
    Part("agreement", 75, together=True),
    Part("losses", 55),
    Part("loop", 120),
    Part("call", 30),
    Part("linear", 50),
    Part("forms", 45),
    Part("other-tests", 120),
)
