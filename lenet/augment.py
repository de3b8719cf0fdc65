"""Augmentation of a batch on its device, decided for each image by (seed, epoch, row) alone.

So an image is deformed in the same way whatever batch, rank or device it is on, and training does not depend on the
number of workers. torchvision's transforms draw from a global generator, one draw for a whole batch.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class Augment:
    """What may happen to an image, in this order; all zero: nothing.

    flip: probability of being mirrored left to right. rotate: degrees, up to so many either way. scale: grows or
    shrinks by up to this part. shift: pixels, up to so many either way on both axes. erase: side in pixels of a
    square put to black, at a random place inside the image. What comes in from outside is black.
    """

    flip: float = 0.0
    rotate: float = 0.0
    scale: float = 0.0
    shift: int = 0
    erase: int = 0

    def __post_init__(self) -> None:
        bounds = {"flip": 1, "rotate": 180, "scale": 0.99, "shift": 16, "erase": 28}
        for name, most in bounds.items():
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}; it goes from 0 to {most}")

    @property
    def active(self) -> bool:
        """Whether anything happens."""
        return any((self.flip, self.rotate, self.scale, self.shift, self.erase))


# Each decision has a stream of random numbers of its own: turning one on changes no other.
FLIP, ROTATE, SCALE, SHIFT_X, SHIFT_Y, ERASE_X, ERASE_Y = range(7)


def augment(images: Tensor, rows: Tensor, config: Augment, seed: int, epoch: int) -> Tensor:
    """uint8 (B, H, W) images, with their row numbers int64 (B,), deformed; uint8 (B, H, W) again.

    Pixels that rotation and scale interpolate are rounded to the nearest value; the rest moves pixels as they are.
    """
    if not config.active or len(images) == 0:
        return images
    height, width = images.shape[1:]
    draw = _Draws(rows, seed, epoch)
    if config.flip:
        mirrored = (draw.uniform(FLIP) < config.flip)[:, None, None]
        images = torch.where(mirrored, images.flip(2), images)
    if config.rotate or config.scale:
        degrees = config.rotate * (2 * draw.uniform(ROTATE) - 1)
        factor = 1 + config.scale * (2 * draw.uniform(SCALE) - 1)
        images = turn(images, degrees, factor)
    if config.shift:
        dx, dy = (draw.integer(stream, 2 * config.shift + 1) for stream in (SHIFT_X, SHIFT_Y))
        images = _cut(F.pad(images, [config.shift] * 4), dx, dy, height, width)
    if config.erase:
        side = min(config.erase, height, width)
        left, top = draw.integer(ERASE_X, width - side + 1), draw.integer(ERASE_Y, height - side + 1)
        x, y = (torch.arange(n, device=images.device)[None] for n in (width, height))
        in_x = (x >= left[:, None]) & (x < left[:, None] + side)
        in_y = (y >= top[:, None]) & (y < top[:, None] + side)
        images = images.masked_fill(in_y[:, :, None] & in_x[:, None, :], 0)
    return images


def turn(images: Tensor, degrees: Tensor, factor: Tensor) -> Tensor:
    """uint8 (B, H, W) turned clockwise by degrees (B,) and enlarged by factor (B,) about their centres, bilinear."""
    radians = degrees.double() * (math.pi / 180)
    # Where an output pixel comes from: turned back, and nearer to the centre the larger the image has become.
    cos, sin = torch.cos(radians) / factor, torch.sin(radians) / factor
    nothing = torch.zeros_like(cos)
    height, width = images.shape[1:]
    theta = torch.stack([cos, sin * height / width, nothing, -sin * width / height, cos, nothing], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta.float(), [len(images), 1, height, width], align_corners=False)
    turned = F.grid_sample(images.unsqueeze(1).float(), grid, mode="bilinear", align_corners=False)
    return turned.squeeze(1).round_().to(torch.uint8)


def _cut(padded: Tensor, left: Tensor, top: Tensor, height: int, width: int) -> Tensor:
    """The window of that size at (top, left) of each image, by one gather of whole pixels."""
    batch, stride = len(padded), padded.shape[2]
    y = torch.arange(height, device=padded.device)[None, :, None] + top[:, None, None]
    x = torch.arange(width, device=padded.device)[None, None, :] + left[:, None, None]
    return padded.view(batch, -1).gather(1, (y * stride + x).view(batch, -1)).view(batch, height, width)


class _Draws:
    """Random numbers for rows int64 (B,): a counter-based generator in torch's integers, which wrap alike everywhere.

    The counter is hashed by SplitMix64's output function (Steele, Lea and Flood, "Fast splittable pseudorandom number
    generators", 2014).
    """

    def __init__(self, rows: Tensor, seed: int, epoch: int) -> None:
        start = torch.tensor([_signed(seed), _signed(epoch)], dtype=torch.int64, device=rows.device)
        self.state = mix(mix(mix(start[0]) ^ start[1]) ^ rows)

    def uniform(self, stream: int) -> Tensor:
        """float64 (B,) in 0..1, 1 excluded."""
        bits = mix(self.state + _signed(GOLDEN * (stream + 1)))
        fraction: Tensor = _shifted(bits, 11).double() * 2.0**-53
        return fraction

    def integer(self, stream: int, count: int) -> Tensor:
        """int64 (B,) in 0..count-1."""
        return (self.uniform(stream) * count).long()


GOLDEN = 0x9E3779B97F4A7C15


def mix(x: Tensor) -> Tensor:
    """SplitMix64's output function on int64, taken as 64 bits."""
    x = x + _signed(GOLDEN)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _signed(value: int) -> int:
    """The int64 with the lowest 64 bits of `value`."""
    return (value + 2**63) % 2**64 - 2**63


def _shifted(x: Tensor, by: int) -> Tensor:
    """Right shift that brings in zeros; torch's own repeats the sign."""
    shifted: Tensor = (x >> by) & (2 ** (64 - by) - 1)
    return shifted
