"""Launch forms that no public function takes give what the swept form gives, and their table covers every row."""

from __future__ import annotations

import math

import pytest
import torch

from repo_kernels.backends import codes
from repo_kernels.backends import triton as gpu
from repo_kernels.backends.interface import RowRange
from repo_kernels.backends.memory_layout import gradient_buffer
from repo_kernels.backends.triton import launch
from repo_kernels.backends.triton.forms import KEPT, PERSISTENT, SWEPT, LaunchForm
from tests.support.kernels.row_cases import Expected, oracle, token_values, unwritten
from tests.support.kernels.triton_rows import (
    BLOCK,
    DTYPES,
    PIECES,
    check,
    kill,
    make_rows,
    placed,
    random_logits,
)

FORMS = {"swept": SWEPT, "kept": KEPT, "persistent": PERSISTENT}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("entropy", [codes.ENTROPY_NONE, codes.ENTROPY_VALUE, codes.ENTROPY_GRADIENT])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.pairwise
def test_every_form_agrees_with_fp64(form: str, entropy: int, dtype: torch.dtype) -> None:
    shape = LaunchForm(1, PIECES, rows=FORMS[form])
    for columns in (1, 9, BLOCK[dtype], int(2.3 * BLOCK[dtype])):
        logits = placed(random_logits(5, columns, dtype), columns + 3, 1)
        case = make_rows(logits, entropy=entropy, grad_scale=256.0)
        # targets in the first block, in a later one and in the edges; the program of one row takes two more
        ids = torch.tensor([columns // 2, 0, 1, columns - 1, min(70, columns)]).clamp(max=columns - 1)
        case = kill(case.replace(token_ids=ids), [1, 4])
        logits[[1, 4]] = math.nan
        grad, results = gradient_buffer(logits), unwritten(logits, 5)
        gpu.fused(logits, None, case.loss, gpu.prepare(logits, case.loss), results, grad, form=shape)
        check(results.rows[0], token_values(results), grad, oracle(case), dtype)
        gpu.fused(logits, None, case.loss, gpu.prepare(logits, case.loss), results, logits, form=shape)
        assert logits.equal(grad)


@pytest.mark.parametrize("form", ["kept", "persistent"])
def test_a_form_takes_some_rows_of_a_loss(form: str) -> None:
    logits = random_logits(7, 300, torch.float32)
    case = make_rows(logits, grad_scale=256.0)
    expected = oracle(case)
    for where, rows in ((RowRange(2), [2, 3, 4, 5, 6]), (RowRange(index=torch.tensor([6, 0, 3])), [6, 0, 3])):
        part, results = logits[rows], unwritten(logits, 7)
        grad = torch.full_like(part, math.nan)
        shape = LaunchForm(1, PIECES, rows=FORMS[form])
        gpu.fused(part, None, case.loss, gpu.prepare(part, case.loss), results, grad, where, form=shape)
        tokens = token_values(results)
        of_rows = Expected(
            *(x[..., rows] for x in (expected.losses, expected.tokens, expected.grad.T, expected.slopes))
        )
        check(results.rows[0, rows], tokens[:, rows], grad.T, of_rows, torch.float32)
        others = [row for row in range(7) if row not in rows]
        assert results.rows[:, others].isnan().all()


def test_a_persistent_grid_has_no_more_programs_than_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    programs = []
    monkeypatch.setattr(launch, "launch", lambda variant, device, count, *args: programs.append(count))
    for rows in (1, 2, 5):
        case = make_rows(random_logits(rows, 9, torch.float32))
        for form in FORMS.values():
            prepared, results = gpu.prepare(case.logits, case.loss), unwritten(case.logits, rows)
            shape = LaunchForm(1, PIECES, rows=form)
            gpu.fused(case.logits, None, case.loss, prepared, results, None, form=shape)
    assert programs == [1, 1, 1, 1, 1, 1, 1, 2, 1, 2, 1, 2, 1, 5, 1, 5, 1, 2]
