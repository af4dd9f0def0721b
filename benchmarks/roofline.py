"""Modelled times of whole computations: the slowest of issue, special functions and DRAM, ours beside the peers'.

Nothing here was run on a GPU. Issue and MUFU come from the machine code of a computation's kernels (static_report.py),
DRAM from the passes that a model of the machine's L2 lets through (traffic.py), the rates from gpu_targets.py. Each is
a lower bound of the time, but for what the code counts too much (its longest path); where a computation has more than
one launch, their sums are taken as if the launches overlapped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .gpu_targets import TARGETS
from .static_report import ITEM_SIZE, StaticReport

VOCABULARIES = (32000, 151936)
DTYPE = "bf16"
# Peer's computation: (its kernels, the computation of ours that does the same).
PEERS: dict[str, tuple[tuple[str, ...], str]] = {
    "Liger `triton_grpo_loss`": (("liger-forward", "liger-backward"), "fused"),
    "Liger `triton_grpo_loss`, by sequence": (
        ("liger-log-softmax", "liger-sequence-forward", "liger-sequence-backward"),
        "statistics + apply",
    ),
    "Liger `fused_selective_log_softmax`": (("liger-log-softmax",), "statistics"),
    "Liger cross-entropy": (("liger-cross-entropy",), "fused"),
    "TRL `selective_log_softmax_and_entropy`": (("trl-forward", "trl-backward"), "fused, entropy value"),
    "TRL, with the entropy's gradient": (("trl-forward", "trl-backward-entropy"), "fused, entropy gradient"),
}


@dataclass(frozen=True)
class Roofline:
    """One computation on one machine, *modelled*; bf16 logits. issue, mufu, dram: seconds per logit. dram_nve: passes.

    against: the computation of ours that a peer's is compared with; ratio: its time over ours. programs: of each
    kernel, resident on a unit.
    """

    title: str
    target: str
    vocabulary: int
    kernels: tuple[str, ...]
    programs: tuple[int, ...]
    issue: float
    mufu: float
    dram: float
    dram_nve: float
    against: str = ""
    ratio: float = 0.0

    @property
    def seconds(self) -> float:
        """Per logit: the slowest of the three."""
        return max(self.issue, self.mufu, self.dram)

    @property
    def bound(self) -> str:
        """Which of the three it is."""
        return max(("issue", "mufu", "dram"), key=lambda name: getattr(self, name))

    @property
    def tokens(self) -> float:
        """Rows per second."""
        return 1 / (self.seconds * self.vocabulary)

    def as_json(self) -> dict[str, Any]:
        """What gpu_static writes of it; its docstring has the schema."""
        return {
            "title": self.title,
            "target": self.target,
            "vocabulary": self.vocabulary,
            "kernels": list(self.kernels),
            "programs": list(self.programs),
            "issue_ps": round(1e12 * self.issue, 4),
            "mufu_ps": round(1e12 * self.mufu, 4),
            "dram_ps": round(1e12 * self.dram, 4),
            "dram_nve": self.dram_nve,
            "modelled_ps": round(1e12 * self.seconds, 4),
            "bound": self.bound,
            "tokens_per_second": round(self.tokens),
            "against": self.against,
            "ratio": round(self.ratio, 4),
        }


def our_kernels(vocabulary: int, warp_size: int) -> dict[str, tuple[str, ...]]:
    """Names of the kernels that a computation of traffic.OURS launches on rows of so many bf16 logits."""
    from repo_kernels.backends.interface import ENTROPY_GRADIENT, ENTROPY_NONE, ENTROPY_VALUE
    from repo_kernels.backends.triton.variants import apply_variant, fused_variant, statistics_variant

    def fused(entropy: int, full_kl: bool = False) -> tuple[str]:
        return (fused_variant(DTYPE, vocabulary, entropy, False, full_kl, warp_size).name,)

    statistics = statistics_variant(DTYPE, ENTROPY_NONE, False, False, warp_size).name
    return {
        "fused": fused(ENTROPY_NONE),
        "fused, entropy value": fused(ENTROPY_VALUE),
        "fused, entropy gradient": fused(ENTROPY_GRADIENT),
        "fused, full KL": fused(ENTROPY_NONE, full_kl=True),
        "statistics": (statistics,),
        "statistics + apply": (statistics, apply_variant(DTYPE, False, False, warp_size).name),
    }


def _row(
    title: str, kernels: Iterable[str], vocabulary: int, target: str, reports: dict[str, StaticReport], nve: float
) -> Roofline | None:
    """Without the comparison. None where a kernel is not among the reports."""
    chosen = [reports[name] for name in kernels if name in reports and not reports[name].reason]
    if len(chosen) != len(tuple(kernels)):
        return None
    return Roofline(
        title=title,
        target=target,
        vocabulary=vocabulary,
        kernels=tuple(kernels),
        programs=tuple(report.programs_per_sm() for report in chosen),
        issue=sum(report.issue_bound(vocabulary) for report in chosen),
        mufu=sum(report.mufu_bound(vocabulary) for report in chosen),
        dram=nve * ITEM_SIZE[DTYPE] / TARGETS[target].dram,
        dram_nve=nve,
    )


def rooflines(reports: Sequence[StaticReport], traffic: Sequence[dict[str, Any]]) -> list[Roofline]:
    """Of every computation whose kernels are among the reports, on every machine whose DRAM passes are modelled.

    traffic: dictionaries of traffic.as_json.
    """
    passes = {
        (entry["title"], entry["vocabulary"], target): round(dram["read"] + dram["written"], 4)
        for entry in traffic
        for target, dram in entry["machines"].items()
    }
    found: list[Roofline] = []
    for target, machine in TARGETS.items():
        own = {report.name: report for report in reports if report.target == target}
        for vocabulary in VOCABULARIES:
            kernels = our_kernels(vocabulary, machine.warp_size) | {title: peer[0] for title, peer in PEERS.items()}
            rows = {
                title: row
                for title, names in kernels.items()
                if (nve := passes.get((title, vocabulary, target))) is not None
                and (row := _row(title, names, vocabulary, target, own, nve))
            }
            for title, row in rows.items():
                against = PEERS[title][1] if title in PEERS else ""
                if against in rows:
                    row = Roofline(**{**vars(row), "against": against, "ratio": row.seconds / rows[against].seconds})
                found.append(row)
    return found


def section(rows: Sequence[Roofline]) -> str:
    """Heading, what the columns mean, all computations, as Markdown."""
    columns = "computation,V,machine,issue ps,MUFU ps,DRAM NVe,DRAM ps,modelled ps,bound,modelled tokens/s,peer / ours"
    lines = [
        """## Rooflines (modelled)

Every time here is *modelled*; nothing was run on a GPU. Picoseconds per bf16 logit, the slowest of: issuing the
instructions, the special functions, and the DRAM passes of the table above at the machine's bandwidth, with one program
at a time on each unit. Counted at most: the longest path through what runs once per row, and a block that is not whole
pays for all of it (V = 32000: of a row that is held, 49152). Not counted: latency, so that a machine can be
slower, and that an A100 issues fp32 at half of its slots. peer / ours: modelled time over that of the named computation
of ours. An MI300X is left out, for want of a model of its caches.
""",
        "| " + columns.replace(",", " | ") + " |",
        "|" + "---|" * len(columns.split(",")),
    ]
    for row in rows:
        cells = [row.title, str(row.vocabulary), TARGETS[row.target].device]
        cells += [f"{1e12 * row.issue:.2f}", f"{1e12 * row.mufu:.2f}", f"{row.dram_nve:.2f}", f"{1e12 * row.dram:.2f}"]
        cells += [f"{1e12 * row.seconds:.2f}", row.bound, f"{row.tokens / 1e6:.2f} M"]
        cells += [f"{row.ratio:.2f} x {row.against}" if row.against else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
