"""Augmentation of a batch on its device, decided for each image by (seed, epoch, row) alone.

So an image is changed in the same way whatever batch or rank it is in, and training does not depend on the number of
workers. torchvision's transforms draw from a global generator, one draw for a whole batch.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class Augment:
    """What may happen to an image, in this order; all zero: nothing. What comes in from outside is black.

    flip: probability of being mirrored left to right, 0 to 1. shift: whole pixels, up to so many either way on each
    axis, 0 to 16. rotate: degrees about the centre, up to so many either way, 0 to 180. scale: grows or shrinks about
    the centre by up to this part, 0 to below 1. erase: side in pixels, 0 to 28, of a square put to black at a random
    place inside the image. Every choice is uniform.

    Raises ValueError for a value out of its range.
    """

    flip: float = 0.0
    shift: int = 0
    rotate: float = 0.0
    scale: float = 0.0
    erase: int = 0

    def __post_init__(self) -> None:
        for name, most in {"flip": 1, "shift": 16, "rotate": 180, "erase": 28}.items():
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}; it goes from 0 to {most}")
        if not 0 <= self.scale < 1:
            raise ValueError(f"scale is {self.scale}; it goes from 0 to below 1")

    @property
    def active(self) -> bool:
        """Whether anything happens."""
        return any((self.flip, self.shift, self.rotate, self.scale, self.erase))


# Each choice has a stream of random numbers of its own: turning one on changes no other.
FLIP, SHIFT_X, SHIFT_Y, ROTATE, SCALE, ERASE_X, ERASE_Y = range(7)
STREAMS = 7


def augment(images: Tensor, rows: Tensor, config: Augment, seed: int, epoch: int) -> Tensor:
    """uint8 (B, H, W) images, with their row numbers int64 (B,) on the same device, augmented; uint8 (B, H, W) again.

    Flip, shift and erase move whole pixels: the same bytes on every device. Rotation and scale interpolate in float32
    and round to the nearest uint8, because the steps take uint8: the same bytes in every batch, but another kind of
    device may round a pixel by 1 the other way. Raises ValueError if the square to erase is larger than the images.
    """
    if not config.active or len(images) == 0:
        return images
    height, width = images.shape[1:]
    if config.erase > min(height, width):
        raise ValueError(f"erase is {config.erase}; images are {height}x{width}, and the square has to fit into them")
    uniform = draws(rows, seed, epoch)
    if config.flip or config.shift:
        right, down = _whole(uniform[SHIFT_X : SHIFT_Y + 1], 2 * config.shift + 1) - config.shift
        images = _move(images, uniform[FLIP] < config.flip, right, down, config.shift)
    if config.rotate or config.scale:
        degrees = config.rotate * (2 * uniform[ROTATE] - 1)
        factor = 1 + config.scale * (2 * uniform[SCALE] - 1)
        images = turn(images, degrees, factor)
    if config.erase:
        left = _whole(uniform[ERASE_X], width - config.erase + 1)
        top = _whole(uniform[ERASE_Y], height - config.erase + 1)
        # A bitwise and of bytes: masked_fill takes twice as long.
        beside, above_or_below = _outside(width, left, config.erase), _outside(height, top, config.erase)
        images = images & (above_or_below[:, :, None] | beside[:, None, :])
    return images


def turn(images: Tensor, degrees: Tensor, factor: Tensor) -> Tensor:
    """uint8 (B, H, W) turned clockwise by degrees (B,) and enlarged by factor (B,) about their centres, bilinear."""
    height, width = images.shape[1:]
    x, y = (torch.arange(n, dtype=torch.float64, device=images.device) - (n - 1) / 2 for n in (width, height))
    radians = degrees.double() * (math.pi / 180)
    # Where an output pixel comes from: turned back, and nearer to the centre the larger the image has become. Its
    # coordinates are the sum of what its column and its row contribute. As complex numbers, x + iy, they are added in
    # one pass and lie as grid_sample wants them: F.affine_grid takes 1 ms for 128 images and this takes 0.1 ms.
    cos, sin = (torch.cos(radians) / factor)[:, None], (torch.sin(radians) / factor)[:, None]
    to_x, to_y = 2 / width, 2 / height  # grid_sample goes from -1 to 1 between the outer edges of the outer pixels
    column = torch.complex((cos * x * to_x).float(), (-sin * x * to_y).float())
    row = torch.complex((sin * y * to_x).float(), (cos * y * to_y).float())
    grid = torch.view_as_real(column[:, None, :] + row[:, :, None])
    turned = F.grid_sample(images.unsqueeze(1).float(), grid, mode="bilinear", align_corners=False)
    return turned.squeeze(1).round_().to(torch.uint8)


def _move(images: Tensor, mirrored: Tensor, right: Tensor, down: Tensor, reach: int) -> Tensor:
    """Images mirrored where bool (B,) says so, then moved by int64 (B,) pixels, at most `reach`: one gather."""
    height, width = images.shape[1:]
    padded = F.pad(images, [reach] * 4)
    x, y = (torch.arange(n, device=images.device) - by[:, None] for n, by in ((width, right), (height, down)))
    x = torch.where(mirrored[:, None], width - 1 - x, x) + reach
    y = (y + reach) * padded.shape[2]
    source = y[:, :, None] + x[:, None, :]
    return padded.flatten(1).gather(1, source.flatten(1)).view(images.shape)


def _outside(length: int, first: Tensor, side: int) -> Tensor:
    """uint8 (B, length): 0 at positions first..first + side - 1, and 255 elsewhere."""
    position = torch.arange(length, device=first.device) - first[:, None]
    return ((position < 0) | (position >= side)).to(torch.uint8) * 255


GOLDEN = 0x9E3779B97F4A7C15


def draws(rows: Tensor, seed: int, epoch: int) -> Tensor:
    """float64 (STREAMS, B), uniform in 0..1 without 1, for row numbers int64 (B,): the same on every device.

    A counter-based generator: row r of epoch e has the SplitMix64 sequence that starts from seed, e and r hashed
    together, and stream s takes the top 53 bits of its output s + 1, counted from 0.
    """
    # Seed and epoch are hashed on the host, so that a GPU sends nothing back and nobody waits.
    start = int(mix(mix(torch.tensor(_signed(seed))) ^ _signed(epoch)))
    state = mix(rows ^ start)
    counter = torch.arange(1, STREAMS + 1, device=rows.device)[:, None] * _signed(GOLDEN)
    return _shifted(mix(state + counter), 11).double() * 2.0**-53


def _whole(uniform: Tensor, count: int) -> Tensor:
    """int64 in 0..count - 1, from uniform numbers in 0..1 without 1."""
    return (uniform * count).long()


def mix(x: Tensor) -> Tensor:
    """SplitMix64: the output after state x, int64 of any shape taken as 64 bits without a sign.

    G. Steele, D. Lea, C. Flood, "Fast splittable pseudorandom number generators", 2014, with the constants of
    S. Vigna's public-domain splitmix64.c. int64 wraps in torch, on every device.
    """
    x = x + _signed(GOLDEN)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _signed(value: int) -> int:
    """The int64 with the lowest 64 bits of `value`."""
    return (value + 2**63) % 2**64 - 2**63


def _shifted(x: Tensor, by: int) -> Tensor:
    """Right shift that brings in zeros; torch's own repeats the sign."""
    return torch.bitwise_and(x >> by, 2 ** (64 - by) - 1)
