import pytest
import torch

from vllm_lrqk.core.rotary import RotaryTable


def table(rotary_dim=32, is_neox_style=True, size=1.0):
    angle = torch.arange(600).double()[:, None] * 1e4 ** (-torch.arange(0, rotary_dim, 2).double() / rotary_dim)
    return RotaryTable.from_cache(size * torch.cat([angle.cos(), angle.sin()], -1), is_neox_style)


def by_complex_numbers(vectors, position, is_neox_style):
    half = vectors.shape[-1] // 2
    angle = position.double()[:, None] * 1e4 ** (-torch.arange(half).double() / half)
    pairs = vectors.double().unflatten(-1, (2, half) if is_neox_style else (half, 2))
    pairs = pairs.transpose(-1, -2) if is_neox_style else pairs
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angle), angle))
    return (turned.transpose(-1, -2) if is_neox_style else turned).flatten(-2)


@pytest.mark.parametrize("is_neox_style", [True, False])
def test_rotation_is_that_of_complex_numbers(is_neox_style):
    vectors, position = torch.randn(40, 32, generator=torch.Generator().manual_seed(0)), torch.arange(40) * 13
    turned = table(32, is_neox_style).rotate(vectors, position)
    expected = by_complex_numbers(vectors, position, is_neox_style).float()
    torch.testing.assert_close(turned, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("is_neox_style", [True, False])
def test_scores_are_the_same_in_every_frame(is_neox_style):
    query, key = torch.randn(2, 48, generator=torch.Generator().manual_seed(0))
    rope = table(32, is_neox_style, size=1.3)  # a factor on cosines and sines is no part of the rotation
    query, key = rope.rotate(query, 590), rope.rotate(key, 300)
    exact = query @ key
    for frame in (0, 256, 300):
        moved = rope.rotate(query, frame, backwards=True) @ rope.rotate(key, frame, backwards=True)
        torch.testing.assert_close(moved, exact, atol=1e-4, rtol=1e-4)


def test_dimensions_beyond_the_rotary_ones_stay():
    vectors = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    turned = table().rotate(vectors, torch.arange(5))
    assert torch.equal(turned[:, 32:], vectors[:, 32:])
    assert not torch.equal(turned[1:, :32], vectors[1:, :32])


def test_every_so_many_positions_are_a_table():
    vectors = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    some = table().every(64)
    assert torch.equal(some.rotate(vectors, torch.arange(7)), table().rotate(vectors, 64 * torch.arange(7)))


def test_the_table_of_a_base_is_the_one_of_its_frequencies():
    ours, theirs = RotaryTable.from_base(1e4, 32, 600), table()
    torch.testing.assert_close(ours.cos, theirs.cos)
    torch.testing.assert_close(ours.sin, theirs.sin)
