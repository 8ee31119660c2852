"""Encodings over the layout's positions: rope and alibi. B rows, N slots, H heads, D head width."""

import torch


def rope_angles(
    position: torch.Tensor, head_width: int, base: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of rotary position embedding (Su et al. 2021), each (B, 1, N, D / 2), in `dtype`.

    Positions may be negative. Angles are computed in float64: bf16 could not tell large positions apart.
    """
    frequency = base ** (-torch.arange(0, head_width, 2, device=position.device, dtype=torch.float64) / head_width)
    angle = position[:, None, :, None] * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate the halves of the head width as pairs. x: (B, H, N, D)."""
    cos, sin = angles
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def chars_again(angles: tuple[torch.Tensor, torch.Tensor], n_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary angles of T tokens and C chars, each (B, 1, T + C, D / 2), with the chars' once more behind them."""
    cos, sin = (torch.cat([x, x[:, :, n_tokens:]], dim=2) for x in angles)
    return cos, sin


def alibi_slopes(n_heads: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Slopes (H,) of Press et al. 2022: 2^(-8 i / H) for a power of two, else as in their released code."""
    power = 1 << (n_heads.bit_length() - 1)
    # Made on the device: a recorded pass may not copy from the host.
    numbers = torch.arange(1, 2 * power + 1, device=device, dtype=torch.float64)
    finer = torch.exp2(-4.0 * numbers / power)
    return torch.cat([torch.exp2(-8.0 * numbers[:power] / power), finer[0::2][: n_heads - power]])


def alibi_bias(
    query_position: torch.Tensor, key_position: torch.Tensor, n_heads: int, dtype: torch.dtype
) -> torch.Tensor:
    """Bias -slope_h * |pos_q - pos_k|: (B, H, ..., Q, K) for positions (B, ..., Q, 1) and (B, ..., 1, K)."""
    distance = (query_position - key_position).abs()
    # In bf16 distances beyond 256 would be rounded before they are multiplied.
    slopes = alibi_slopes(n_heads, distance.device).to(torch.promote_types(dtype, torch.float32))
    return (-slopes.view(1, -1, *[1] * (distance.dim() - 1)) * distance[:, None]).to(dtype)
