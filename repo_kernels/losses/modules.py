"""The losses as modules that take their options once."""

from __future__ import annotations

from torch import nn
from torch.distributed import ProcessGroup

from ..backends.choice import check_backend
from ..checks import check_bool, check_chunk, describe
from ..keywords import method_takes
from .inputs import LinearRepoLossModuleCall, RepoLossModuleCall
from .loss import head_loss, logits_loss
from .options import LossOptions
from .output import RepoLossOutput
from .parallel.shard import check_group


class RepoLoss(nn.Module):
    """`repo_loss` with its options set once; it has no parameters.

    Args:
        options: None for the defaults.
        inplace: write the gradient over the logits, see `repo_loss`.
        backend: "triton", "cpu", "eager" or None, see `repo_loss`.
        group: the processes among which the vocabulary is divided, or None, see `repo_loss`.
    """

    def __init__(
        self,
        options: LossOptions | None = None,
        *,
        inplace: bool = False,
        backend: str | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check_bool("inplace", inplace)
        check_backend(backend)
        check_group(group)
        self.options, self.inplace, self.backend, self.group = _checked_options(options), inplace, backend, group

    @method_takes(RepoLossModuleCall, LossOptions)
    def forward(self, inputs: RepoLossModuleCall) -> RepoLossOutput:
        """Compute the loss of one batch; see `repo_loss`.

        Returns:
            RepoLossOutput.
        """
        options, temperature = self.options, inputs.temperature_or(self.options)
        return logits_loss(options, inputs, temperature, self.inplace, self.backend, self.group)

    def extra_repr(self) -> str:
        """Show the options in `repr`."""
        return repr(self.options)


class LinearRepoLoss(nn.Module):
    """`linear_repo_loss` with its options set once; it has no parameters, the head is an argument of the call.

    Args:
        options: None for the defaults.
        chunk_tokens, chunk_bytes: the size of a chunk or None, see `linear_repo_loss`.
        backend: "triton", "cpu", "eager" or None, see `repo_loss`.
        group: the processes among which the vocabulary is divided, or None, see `linear_repo_loss`.
    """

    def __init__(
        self,
        options: LossOptions | None = None,
        chunk_tokens: int | None = None,
        backend: str | None = None,
        *,
        chunk_bytes: int | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check_chunk(chunk_tokens, chunk_bytes)
        check_backend(backend)
        check_group(group)
        self.options, self.backend = _checked_options(options), backend
        self.chunk_tokens, self.chunk_bytes, self.group = chunk_tokens, chunk_bytes, group

    @method_takes(LinearRepoLossModuleCall, LossOptions)
    def forward(self, inputs: LinearRepoLossModuleCall) -> RepoLossOutput:
        """Compute the loss of one batch; see `linear_repo_loss`.

        Returns:
            RepoLossOutput.
        """
        options, chunk = self.options, (self.chunk_tokens, self.chunk_bytes)
        return head_loss(options, inputs, inputs.temperature_or(options), *chunk, self.backend, self.group)

    def extra_repr(self) -> str:
        """Show the options in `repr`."""
        return repr(self.options)


def _checked_options(options: LossOptions | None) -> LossOptions:
    if options is not None and not isinstance(options, LossOptions):
        raise TypeError(f"options must be LossOptions or None; got {describe(options)}")
    return LossOptions() if options is None else options
