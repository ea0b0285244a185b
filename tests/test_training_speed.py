"""What makes a training step cheaper changes no result: the loss in pieces, and memory that stays with the process."""

from __future__ import annotations

import resource
import sys

import pytest
import torch
from torch.nn.functional import cross_entropy

from runtime.kernels.freed_memory import keep_freed_memory
from training.answer_loss import mean_cross_entropy


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("num_rows", [1, 16, 37])
def test_the_loss_in_pieces_is_that_of_the_whole(num_rows: int, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    logits = (torch.randn(num_rows, 300, generator=generator) * 5).to(dtype).requires_grad_()
    targets = torch.randint(300, (num_rows,), generator=generator)
    wanted = cross_entropy(logits.float(), targets)
    (wanted_gradient,) = torch.autograd.grad(wanted * 0.7, logits)
    loss = mean_cross_entropy(logits, targets)
    (gradient,) = torch.autograd.grad(loss * 0.7, logits)
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-6)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, wanted_gradient, rtol=tolerance, atol=tolerance / num_rows)


def test_an_answer_that_is_all_but_impossible_has_a_finite_loss() -> None:
    logits = torch.tensor([[200.0, 0.0, -200.0]], requires_grad=True)
    loss = mean_cross_entropy(logits, torch.tensor([2]))
    assert float(loss.detach()) == pytest.approx(400.0)


def test_a_loss_that_is_no_number_stays_none() -> None:
    assert torch.isnan(mean_cross_entropy(torch.tensor([[float("nan"), 0.0]]), torch.tensor([1])))


def test_without_gradients_none_are_made() -> None:
    logits = torch.zeros(3, 5)
    assert not mean_cross_entropy(logits, torch.tensor([0, 1, 2])).requires_grad


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc can be asked")
def test_memory_that_is_freed_is_used_again_without_a_fault() -> None:
    if not keep_freed_memory():
        pytest.skip("this C library cannot be asked")

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(4):
            torch.ones(16_000_000)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    assert faults() < 1000  # else 15,625 for each of the four
