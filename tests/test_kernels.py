"""Fast kernels agree with their readable references."""

import pytest
import torch

from nanochat.kernels.flash_attention import Visibility, attention, attention_reference


def positions(batch: int, length: int) -> torch.Tensor:
    return torch.arange(length).expand(batch, -1)


CASES = {
    "plain causal": Visibility(positions(1, 50), positions(1, 50), window=50, is_row=True),
    "windowed": Visibility(positions(1, 50), positions(1, 50), window=7),
    "documents": Visibility(positions(2, 50), positions(2, 50), 50, documents=(torch.arange(50) // 13).expand(2, -1)),
    "cache with empty slots": Visibility(
        torch.tensor([[20, 21], [9, 10]]), torch.where(positions(2, 50) < 22, positions(2, 50), -1), window=12
    ),
}


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_attention_equals_its_reference(case: str, kv_heads: int) -> None:
    visibility, rng = CASES[case], torch.Generator().manual_seed(0)
    shapes = ((visibility.query_positions.size(1), 4), (50, kv_heads), (50, kv_heads))
    q, k, v = (torch.randn(2, length, heads, 8, generator=rng, dtype=torch.float64) for length, heads in shapes)
    torch.testing.assert_close(attention(q, k, v, visibility), attention_reference(q, k, v, visibility))


def test_the_mask_says_who_sees_whom() -> None:
    visibility = Visibility(positions(1, 5), positions(1, 5), window=2, documents=torch.tensor([[0, 0, 0, 1, 1]]))
    assert visibility.mask()[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]
