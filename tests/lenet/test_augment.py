"""Proves that augmentation depends on (seed, epoch, row) alone and does to each image what it says, pixel by pixel."""

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as V

from lenet.augment import Augment, augment, draws, mix, turn
from pipeline.idx import Pixels

if TYPE_CHECKING:
    from tests.conftest import Splits

EVERYTHING = Augment(flip=0.5, shift=2, rotate=15, scale=0.1, erase=6)
SEEDS, EPOCHS, ROWS = st.integers(0, 2**63 - 1), st.integers(0, 10_000), st.integers(0, 2**40)
ROTATE, SCALE = 3, 4  # their streams: fixed, like all that is drawn
LIKELY = 1e-3  # p below this, for numbers that seeds fix, would be a fault and not chance


@pytest.fixture(scope="module")
def images(small_splits: "Splits") -> Tensor:
    return torch.from_numpy(small_splits["train"][0])


def rows_of(images: Tensor) -> Tensor:
    return torch.arange(len(images))


# The generator and the moves of whole pixels again, in Python's integers and numpy, one image at a time.


def splitmix64(state: int) -> int:
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def drawn(seed: int, epoch: int, row: int) -> list[float]:
    state = splitmix64(splitmix64(splitmix64(seed) ^ epoch) ^ row)
    return [(splitmix64(state + 0x9E3779B97F4A7C15 * (stream + 1)) >> 11) / 2**53 for stream in range(7)]


def moved(image: Pixels, config: Augment, numbers: list[float]) -> Pixels:
    flip, x, y, _, _, left, top = numbers
    height, width = image.shape
    if flip < config.flip:
        image = image[:, ::-1]
    reach = config.shift
    right, down = (int(number * (2 * reach + 1)) - reach for number in (x, y))
    image = np.pad(image, reach)[reach - down :, reach - right :][:height, :width].copy()
    if config.erase:
        row, column = int(top * (height - config.erase + 1)), int(left * (width - config.erase + 1))
        image[row : row + config.erase, column : column + config.erase] = 0
    return image


def signed(values: list[int]) -> Tensor:
    return torch.tensor([(value + 2**63) % 2**64 - 2**63 for value in values])


def test_the_generator_is_splitmix64() -> None:
    """The first outputs for seed 1234567 as its authors' and many other implementations give them."""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    states = [1234567 + 0x9E3779B97F4A7C15 * output for output in range(5)]
    assert [value % 2**64 for value in mix(signed(states)).tolist()] == published
    assert [splitmix64(state) for state in states] == published


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=40))
def test_signed_integers_give_the_same_64_bits_as_unsigned_ones(states: list[int]) -> None:
    assert [value % 2**64 for value in mix(signed(states)).tolist()] == [splitmix64(state) for state in states]


@given(seed=SEEDS, epoch=EPOCHS, rows=st.lists(ROWS, max_size=20))
def test_what_is_drawn_follows_from_seed_epoch_and_row(seed: int, epoch: int, rows: list[int]) -> None:
    out = draws(torch.tensor(rows, dtype=torch.int64), seed, epoch)
    assert out.dtype == torch.float64
    assert out.T.tolist() == [drawn(seed, epoch, row) for row in rows]


def test_what_is_drawn_never_changes_between_releases() -> None:
    """Written down once, as 53 bits for each stream: others would silently change what a seed means."""
    bits = (draws(torch.tensor([0, 59_999]), seed=7, epoch=3) * 2**53).T.long()
    assert bits.tolist() == [
        [
            700344429874161,
            1393423881998234,
            1663652873521694,
            6997446422280227,
            8457677355897494,
            5360641060707206,
            4095495109527637,
        ],
        [
            4380973445752958,
            1522023335723523,
            2305599624280854,
            7245288645569547,
            1807250236132273,
            6474799419612802,
            3837711923102408,
        ],
    ]


def test_drawn_numbers_are_uniform_and_independent() -> None:
    """Over rows and epochs for each stream; and no stream, next row, next epoch or next seed follows another."""
    rows = torch.arange(5000)
    out = draws(rows, 0, 1)
    for stream in range(7):
        assert kstest(out[stream], "uniform").pvalue > LIKELY
        by_epoch = [draws(rows[:1], 0, epoch)[stream].item() for epoch in range(1, 1001)]
        assert kstest(by_epoch, "uniform").pvalue > LIKELY
    columns = [*out, *draws(rows + 1, 0, 1), *draws(rows, 0, 2), *draws(rows, 1, 1)]
    correlation = torch.corrcoef(torch.stack(columns)) - torch.eye(len(columns))
    assert correlation.abs().max() < 5 / 5000**0.5  # five standard errors


@settings(max_examples=40)
@given(seed=SEEDS, epoch=EPOCHS, order=st.permutations(range(24)), cuts=st.lists(st.integers(0, 24), max_size=4))
def test_an_image_comes_out_the_same_in_any_batch(
    images: Tensor, seed: int, epoch: int, order: list[int], cuts: list[int]
) -> None:
    whole = augment(images[:24], rows_of(images[:24]), EVERYTHING, seed, epoch)
    rows = torch.tensor(order)
    parts = [augment(images[part], part, EVERYTHING, seed, epoch) for part in rows.tensor_split(sorted(cuts))]
    assert torch.equal(torch.cat(parts), whole[rows])


def test_an_image_alone_comes_out_as_among_600_in_other_places_of_memory(images: Tensor) -> None:
    whole = augment(images, rows_of(images), EVERYTHING, 0, 1)
    for row in range(0, 600, 7):
        assert torch.equal(augment(images[row : row + 1], torch.tensor([row]), EVERYTHING, 0, 1)[0], whole[row])
    strided = images.repeat_interleave(2, dim=2)[:, :, ::2]
    assert torch.equal(augment(strided, rows_of(images), EVERYTHING, 0, 1), whole)


def test_seed_epoch_and_row_all_matter(images: Tensor) -> None:
    one = images[:1].expand(40, -1, -1)
    rows = torch.arange(40)
    first = augment(one, rows, EVERYTHING, 0, 1)
    assert len({tuple(image.flatten().tolist()) for image in first}) == 40
    for other in (
        augment(one, rows, EVERYTHING, 1, 1),
        augment(one, rows, EVERYTHING, 0, 2),
        augment(one, rows + 40, EVERYTHING, 0, 1),
    ):
        assert (first != other).flatten(1).any(1).sum() > 35


def test_seed_and_epoch_do_not_stand_in_for_one_another() -> None:
    rows = torch.arange(100)
    assert (draws(rows, 1, 2) != draws(rows, 2, 1)).all()


@pytest.mark.parametrize("shape", [(28, 28), (32, 20)])
@settings(max_examples=30)
@given(
    config=st.builds(
        Augment, flip=st.sampled_from([0, 0.3, 1.0]), shift=st.integers(0, 16), erase=st.sampled_from([0, 1, 6, 20])
    ),
    seed=SEEDS,
    epoch=EPOCHS,
)
def test_flip_shift_and_erase_are_numpys_pixel_for_pixel(
    shape: tuple[int, int], config: Augment, seed: int, epoch: int
) -> None:
    pixels = np.random.default_rng(0).integers(1, 256, (9, *shape), dtype=np.uint8)  # no pixel is black before
    rows = [5, 0, 10**9, 2, 3, 4, 1, 59_999, 8]
    out = augment(torch.from_numpy(pixels), torch.tensor(rows), config, seed, epoch)
    expected = [moved(image, config, drawn(seed, epoch, row)) for image, row in zip(pixels, rows, strict=True)]
    assert out.dtype == torch.uint8
    np.testing.assert_array_equal(out.numpy(), np.stack(expected))


def test_nothing_asked_for_nothing_done(images: Tensor) -> None:
    assert not Augment().active
    assert torch.equal(augment(images, rows_of(images), Augment(), 0, 1), images)


@pytest.mark.parametrize(
    "config",
    [Augment(flip=0.5), Augment(shift=1), Augment(rotate=1), Augment(scale=0.1), Augment(erase=1)],
    ids=["flip", "shift", "rotate", "scale", "erase"],
)
def test_each_field_alone_changes_some_images_and_not_what_was_passed_in(images: Tensor, config: Augment) -> None:
    before = images.clone()
    assert config.active
    assert (augment(images, rows_of(images), config, 0, 1) != images).flatten(1).any(1).sum() > 200
    assert torch.equal(images, before)


def test_an_empty_batch_passes(images: Tensor) -> None:
    out = augment(images[:0], rows_of(images[:0]), EVERYTHING, 0, 1)
    assert (out.shape, out.dtype) == ((0, 28, 28), torch.uint8)


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_as_many_are_mirrored_as_asked_for_and_the_rest_left(images: Tensor, probability: float) -> None:
    out = augment(images, rows_of(images), Augment(flip=probability), 0, 1)
    mirrored = (out == images.flip(2)).flatten(1).all(1)
    same = (out == images).flatten(1).all(1)
    assert (mirrored ^ same).all()
    assert chisquare([mirrored.sum(), same.sum()], [600 * probability, 600 * (1 - probability)]).pvalue > LIKELY


def test_with_probability_1_all_are_mirrored(images: Tensor) -> None:
    assert torch.equal(augment(images, rows_of(images), Augment(flip=1), 0, 1), images.flip(2))


def test_shifts_are_uniform_over_both_axes_together() -> None:
    dot = torch.zeros(10_000, 28, 28, dtype=torch.uint8)
    dot[:, 14, 14] = 200
    found = augment(dot, torch.arange(10_000), Augment(shift=2), 0, 1).nonzero()[:, 1:] - 14
    assert found.abs().max() == 2
    counts = torch.bincount((found[:, 0] + 2) * 5 + found[:, 1] + 2, minlength=25)
    assert counts.sum() == 10_000
    assert chisquare(counts).pvalue > LIKELY


def test_a_square_is_blacked_out_anywhere_inside_and_no_more() -> None:
    white = torch.full((10_000, 28, 28), 255, dtype=torch.uint8)
    black = augment(white, torch.arange(10_000), Augment(erase=20), 0, 1) == 0
    assert (black.flatten(1).sum(1) == 400).all()
    assert (black.any(1).sum(1) == 20).all()
    assert (black.any(2).sum(1) == 20).all()
    top, left = (black.any(axis).int().argmax(1) for axis in (2, 1))
    assert chisquare(torch.bincount(top * 9 + left, minlength=81)).pvalue > LIKELY


def test_choices_do_not_depend_on_each_other(images: Tensor) -> None:
    """Erasing more, or mirroring, leaves the shift where it was."""
    rows = rows_of(images)
    plain = augment(images, rows, Augment(shift=3), 0, 1)
    erased = augment(images, rows, Augment(shift=3, erase=5), 0, 1)
    assert (((erased == plain) | (erased == 0)).all()).item()
    mirrored = augment(images.flip(2), rows, Augment(shift=3, flip=1), 0, 1)
    assert torch.equal(mirrored, plain)


@pytest.mark.parametrize("degrees", [0.0, 90.0, -90.0, 180.0])
def test_quarter_turns_move_whole_pixels_clockwise(images: Tensor, degrees: float) -> None:
    many = torch.full((len(images),), degrees, dtype=torch.float64)
    expected = torch.rot90(images, -round(degrees / 90), dims=(1, 2))
    assert torch.equal(turn(images, many, torch.ones_like(many)), expected)


@pytest.mark.parametrize("shape", [(28, 28), (20, 32)])
@pytest.mark.parametrize(
    ("degrees", "factor"), [(0.0, 1.0), (17.0, 1.0), (-33.3, 0.8), (5.0, 1.25), (0.0, 0.5), (0.0, 1.9), (120.0, 1.1)]
)
def test_turning_is_torchvisions_affine(images: Tensor, shape: tuple[int, int], degrees: float, factor: float) -> None:
    """Up to rounding to whole values, and to an error of float32 of 0.001 of 255."""
    images = images[:, :, :20].transpose(1, 2).repeat(1, 1, 2)[:, :, :32] if shape != (28, 28) else images
    assert images.shape[1:] == shape
    many = torch.ones(len(images), dtype=torch.float64)
    ours = turn(images, many * degrees, many * factor)
    theirs = V.affine(
        images.unsqueeze(1).float(), angle=degrees, translate=[0, 0], scale=factor, shear=[0, 0],
        interpolation=InterpolationMode.BILINEAR,
    )  # fmt: skip
    assert (ours.double() - theirs.squeeze(1)).abs().max() <= 0.5 + 1e-3


def test_each_image_is_turned_and_scaled_by_its_own_draw(images: Tensor) -> None:
    config = Augment(rotate=30, scale=0.3)
    out = augment(images[:50], torch.arange(50), config, 11, 2)
    for row, image in enumerate(images[:50]):
        numbers = drawn(11, 2, row)
        degrees, factor = 30 * (2 * numbers[ROTATE] - 1), 1 + 0.3 * (2 * numbers[SCALE] - 1)
        theirs = V.affine(
            image[None].float(), angle=degrees, translate=[0, 0], scale=factor, shear=[0, 0],
            interpolation=InterpolationMode.BILINEAR,
        )  # fmt: skip
        assert (out[row].double() - theirs[0]).abs().max() <= 0.5 + 1e-3


def test_flip_and_shift_come_before_turning_and_erasing_after(images: Tensor) -> None:
    rows = rows_of(images)
    first = augment(images, rows, Augment(flip=0.5, shift=2), 5, 6)
    then = augment(first, rows, Augment(rotate=15, scale=0.1), 5, 6)
    last = augment(then, rows, Augment(erase=6), 5, 6)
    assert torch.equal(augment(images, rows, EVERYTHING, 5, 6), last)


def test_angles_and_sizes_are_uniform_over_their_ranges() -> None:
    """Measured at the middle of a ramp of 8 a pixel: its direction turns with the image, its steepness shrinks."""
    ramp = (20 + 8 * torch.arange(28)).to(torch.uint8).expand(5000, 28, 28)
    out = augment(ramp, torch.arange(5000), Augment(rotate=30, scale=0.25), 0, 1)[:, 7:21, 7:21].double()
    x = torch.arange(14, dtype=torch.float64) - 6.5
    across, down = (out * x).sum((1, 2)), (out * x[:, None]).sum((1, 2))  # least squares, but for a constant
    angles, sizes = torch.atan2(down, across).rad2deg(), 8 * 14 * (x * x).sum() / torch.hypot(across, down)
    assert kstest(angles, "uniform", (-30, 60)).pvalue > LIKELY
    assert kstest(sizes, "uniform", (0.75, 0.5)).pvalue > LIKELY
    uniform = draws(torch.arange(5000), 0, 1)
    # Rounding each pixel by up to 0.5 bends the fitted slope of 8 / size by up to 0.11 on each axis.
    torch.testing.assert_close(angles, 60 * uniform[ROTATE] - 30, rtol=0, atol=1)
    torch.testing.assert_close(sizes, 0.75 + 0.5 * uniform[SCALE], rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("field", "value", "most"),
    [
        ("flip", 1.1, "1"),
        ("flip", -0.1, "1"),
        ("flip", float("nan"), "1"),
        ("shift", 17, "16"),
        ("shift", -1, "16"),
        ("rotate", 181, "180"),
        ("rotate", -1, "180"),
        ("scale", 1, "below 1"),
        ("scale", -0.1, "below 1"),
        ("erase", 29, "28"),
        ("erase", -1, "28"),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, value: float, most: str) -> None:
    with pytest.raises(ValueError, match=rf"^{field} is {value}; it goes from 0 to {most}$"):
        Augment(**{field: value})  # type: ignore[arg-type]


def test_the_ends_of_the_ranges_are_allowed(images: Tensor) -> None:
    config = Augment(flip=1, shift=16, rotate=180, scale=0.99, erase=28)
    assert not augment(images, rows_of(images), config, 0, 1).any()  # the square is the whole image


def test_a_square_larger_than_the_images_is_refused() -> None:
    with pytest.raises(ValueError, match="erase is 21; images are 32x20, and the square has to fit"):
        augment(torch.zeros(1, 32, 20, dtype=torch.uint8), torch.tensor([0]), Augment(erase=21), 0, 1)
