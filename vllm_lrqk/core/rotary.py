"""Rotary position embeddings (RoPE) undone: vectors in the frame of another position.

A frame is a position p0 that counts as zero. With R(p) the rotation of position p, a key at p has k = R(p) x, and in
the frame of p0 it is R(-p0) k = R(p - p0) x; scores do not change if queries and keys move to a frame together.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RotaryTable:
    """Cosines and sines of a model's positions.

    Angles must be proportional to the position, one frequency per pair of dimensions, whatever the frequencies.
    """

    cos: torch.Tensor
    """float32 [positions, rotary_dim / 2], cos^2 + sin^2 = 1"""
    sin: torch.Tensor
    """float32 [positions, rotary_dim / 2]"""
    is_neox_style: bool
    """Dimension i is turned with i + rotary_dim / 2 (GPT-NeoX, Llama); else with its neighbour (GPT-J)."""

    @classmethod
    def from_cache(cls, cos_sin: torch.Tensor, is_neox_style: bool) -> "RotaryTable":
        """From [positions, rotary_dim], cosines and then sines, times one factor that is taken out (YaRN's)."""
        cos, sin = cos_sin.float().chunk(2, -1)
        size = torch.hypot(cos, sin)
        return cls(cos / size, sin / size, is_neox_style)

    @classmethod
    def from_base(cls, base: float, rotary_dim: int, positions: int) -> "RotaryTable":
        """The usual frequencies, base^(-2 i / rotary_dim), in NeoX style."""
        frequency = base ** (-torch.arange(0, rotary_dim, 2).double() / rotary_dim)
        angle = torch.arange(positions).double()[:, None] * frequency
        return cls(angle.cos().float(), angle.sin().float(), True)

    def every(self, step: int) -> "RotaryTable":
        """The table of positions 0, step, 2 step, ..., which are 0, 1, 2, ... in it."""
        return RotaryTable(self.cos[::step].contiguous(), self.sin[::step].contiguous(), self.is_neox_style)

    def equals(self, other: "RotaryTable") -> bool:
        """Whether both turn alike."""
        alike = self.is_neox_style == other.is_neox_style
        return alike and torch.equal(self.cos, other.cos) and torch.equal(self.sin, other.sin)

    def pairs(self, head_size: int) -> torch.Tensor:
        """The dimensions of a head that are turned together, int32 [d / 2, 2]; then those that stay, in twos."""
        half = self.cos.shape[-1]
        turned = torch.arange(2 * half, dtype=torch.int32)
        turned = turned.view(2, half).T if self.is_neox_style else turned.view(half, 2)
        return torch.cat([turned, torch.arange(2 * half, head_size, dtype=torch.int32).view(-1, 2)]).contiguous()

    def turns(self, head_size: int) -> torch.Tensor:
        """Cosine and sine of each of the `pairs` at each position: float32 [positions, d / 2, 2]."""
        turned = torch.stack([self.cos, self.sin], -1)
        stays = torch.tensor([1.0, 0.0]).expand(len(turned), head_size // 2 - turned.shape[1], 2)
        return torch.cat([turned, stays], 1).contiguous()

    def to(self, device: torch.device) -> "RotaryTable":
        return RotaryTable(self.cos.to(device), self.sin.to(device), self.is_neox_style)

    def rotate(self, vectors: torch.Tensor, positions: torch.Tensor | int, backwards: bool = False) -> torch.Tensor:
        """R(positions) vectors, or R(-positions) vectors if `backwards`: float32 [..., d].

        Args:
            vectors: [..., d], d at least rotary_dim; further dimensions stay.
            positions: int, broadcast with vectors' leading dimensions.
        """
        cos, sin = self.cos[positions], self.sin[positions]
        if backwards:
            sin = -sin
        turned, rest = vectors.float().split([2 * cos.shape[-1], vectors.shape[-1] - 2 * cos.shape[-1]], -1)
        shape = (2, -1) if self.is_neox_style else (-1, 2)
        first, second = turned.unflatten(-1, shape).unbind(-2 if self.is_neox_style else -1)
        pair = torch.stack([first * cos - second * sin, second * cos + first * sin], -2 if self.is_neox_style else -1)
        turned = pair.flatten(-2)
        return torch.cat([turned, rest.expand(*turned.shape[:-1], -1)], -1)
