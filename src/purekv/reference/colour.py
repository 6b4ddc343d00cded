"""Video planes to RGB and back in integers, so that the same file gives the same bytes anywhere.

BT.601, limited range, chroma at half resolution. Converters of media libraries differ between
processors in the last bit.
"""

from __future__ import annotations

import numpy as np


def planes_to_rgb(planes: np.ndarray) -> np.ndarray:
    """uint8 [F, H * 3 / 2, W] (yuv420p) -> uint8 [F, H, W, 3]."""
    frames, rows, width = planes.shape
    height = rows * 2 // 3
    luma = (planes[:, :height].astype(np.int32) - 16) * 76309
    chroma = planes[:, height:].reshape(frames, 2, height // 2, width // 2).astype(np.int32) - 128
    u, v = (c.repeat(2, 1).repeat(2, 2) for c in (chroma[:, 0], chroma[:, 1]))
    rgb = np.stack([luma + 104597 * v, luma - 25675 * u - 53279 * v, luma + 132201 * u], -1)
    return ((rgb + 32768) >> 16).clip(0, 255).astype(np.uint8)


def rgb_to_planes(pixels: np.ndarray) -> np.ndarray:
    """uint8 [F, H, W, 3], H and W even -> uint8 [F, H * 3 / 2, W] (yuv420p)."""
    frames, height, width, _ = pixels.shape
    blocks = (frames, height // 2, 2, width // 2, 2)
    r, g, b = (pixels[..., c].astype(np.int32) for c in range(3))
    planes = np.empty((frames, height * 3 // 2, width), np.uint8)
    planes[:, :height] = (16829 * r + 33039 * g + 6416 * b + (16 << 16) + (1 << 15)) >> 16
    r, g, b = (c.reshape(blocks).sum((2, 4), dtype=np.int32) for c in (r, g, b))
    u = -9714 * r - 19070 * g + 28784 * b
    v = 28784 * r - 24103 * g - 4681 * b
    chroma = (np.stack([u, v], 1) + (128 << 18) + (1 << 17)) >> 18
    planes[:, height:] = chroma.reshape(frames, height // 2, width)
    return planes
