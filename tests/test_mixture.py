"""The packed mixture against the loop, on all routing patterns, ranks and sizes."""

from __future__ import annotations

import pytest
import torch

from runtime.kernels.mixture import add_mixture, mixture_loop, pack
from runtime.kernels.routing import balance_loss, top_k_weights

D, H, E = 24, 40, 6
PATTERNS = ("identical", "distinct", "uniform", "skewed", "zipf")


def routed(pattern: str, num_tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Weights [T, E] with two experts per token, chosen as the pattern says."""
    if pattern == "identical":
        popularity = torch.tensor([1.0, 1.0, 0, 0, 0, 0])
        chosen = popularity.expand(num_tokens, -1)
    elif pattern == "distinct":
        chosen = torch.zeros(num_tokens, E)
        for t in range(num_tokens):
            chosen[t, [(2 * t) % E, (2 * t + 1) % E]] = 1
    else:
        popularity = {
            "uniform": torch.ones(E),
            "skewed": torch.tensor([100.0, 1, 1, 1, 1, 1]),
            "zipf": 1 / torch.arange(1, E + 1),
        }[pattern]
        picks = torch.multinomial(popularity.expand(num_tokens, -1), 2, generator=generator)
        chosen = torch.zeros(num_tokens, E).scatter(1, picks, 1.0)
    weights = chosen * torch.rand(num_tokens, E, generator=generator)
    return weights / weights.sum(1, keepdim=True)


@pytest.mark.parametrize("ranks", [(4,) * E, (1, 2, 3, 8, 16, 5)], ids=["equal", "mixed"])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_packed_mixture_equals_the_loop(
    pattern: str, num_tokens: int, ranks: tuple[int, ...], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, D, generator=generator).to(dtype)
    a = [torch.randn(rank, D, generator=generator).to(dtype) for rank in ranks]
    b = [torch.randn(H, rank, generator=generator).to(dtype) for rank in ranks]
    scales = [2.0, 0.5, 1.0, 4.0, 1.0, 0.25]
    weights = routed(pattern, num_tokens, generator)
    y = torch.zeros(num_tokens, H, dtype=dtype)
    update = pack(a, b, scales, dtype=dtype, device=torch.device("cpu"))
    add_mixture(y, x, update, weights[:, update.owner])
    expected = mixture_loop(x, a, b, scales, weights)
    # bfloat16 rounds the shrunk intermediate and the result to 8 bits.
    tolerance = 1e-4 if dtype is torch.float32 else 2e-2 * float(expected.abs().max())
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=tolerance)


def test_the_mixture_is_added_to_what_is_there() -> None:
    x, y = torch.ones(1, 2), torch.full((1, 1), 10.0)
    update = pack([torch.ones(1, 2)], [torch.ones(1, 1)], [3.0], dtype=torch.float32, device=torch.device("cpu"))
    add_mixture(y, x, update, torch.tensor([[0.5]]))
    assert y.item() == 10.0 + 0.5 * 3.0 * 2.0


def test_top_k_keeps_the_largest_allowed_and_renormalises_over_them() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]]))
    allowed = torch.tensor([[True, True, True], [False, True, True]])
    weights = top_k_weights(logits, allowed, torch.tensor([2, 2]), 2)
    torch.testing.assert_close(weights, torch.tensor([[0.625, 0.375, 0.0], [0.0, 0.6, 0.4]]))


def test_a_row_that_allows_nothing_gets_zeros_and_k_may_differ_by_row() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0]] * 3)
    allowed = torch.tensor([[False] * 3, [True] * 3, [True] * 3])
    weights = top_k_weights(logits, allowed, torch.tensor([1, 1, 9]), 9)
    assert weights[0].tolist() == [0.0, 0.0, 0.0]
    assert weights[1].tolist() == [0.0, 0.0, 1.0]
    torch.testing.assert_close(weights[2], torch.softmax(logits[2], dim=0))


def test_the_balance_loss_is_one_when_balanced_and_more_when_one_expert_takes_all() -> None:
    balanced = torch.tensor([[9.0, 0.0], [0.0, 9.0]])
    skewed = torch.tensor([[9.0, 0.0], [9.0, 0.0]])
    loss = [float(balance_loss(logits, (logits > 1).float())) for logits in (balanced, skewed)]
    assert loss[0] == pytest.approx(1.0)
    assert loss[1] == pytest.approx(2.0, rel=1e-3)
