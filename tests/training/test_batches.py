"""Mini-batches: order, augmentation, and what they leave as it was."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from autocompress.errors import DataError
from autocompress.training.data import Augmentation, Images, batches


def numbered(n: int, *, flip: bool = False, height: int = 5, width: int = 4) -> Images:
    """Images whose pixels are all different, and whose label is their position."""
    pixels = torch.arange(n * height * width).view(n, 1, height, width) % 251 + 1
    return Images(pixels.to(torch.uint8), torch.arange(n), (0.0,), (1 / 255,), flip)


def test_batches_without_a_seed_keep_the_order_and_have_all_items() -> None:
    found = list(batches(numbered(10), 4, seed=None))
    assert [y.tolist() for _, y in found] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [y.tolist() for _, y in batches(numbered(10), 4, seed=None, drop_last=True)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
    ]


def test_the_fast_path_gives_what_collating_the_items_gives() -> None:
    images = torch.randint(
        0, 256, (9, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    data = Images(images, torch.arange(9), mean, std, False)
    found = torch.cat([x for x, _ in batches(data, 4, seed=None)])
    expected = (images.double() / 255 - torch.tensor(mean, dtype=torch.float64).view(3, 1, 1)) / torch.tensor(
        std, dtype=torch.float64
    ).view(3, 1, 1)
    torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=0)
    items = torch.stack([data[i][0] for i in range(9)])
    assert torch.equal(items, found)


def test_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int, batch_size: int = 7) -> list[int]:
        return torch.cat([y for _, y in batches(numbered(50), batch_size, seed=seed, epoch=epoch)]).tolist()

    assert sorted(order(0, 0)) == list(range(50))
    assert order(0, 3) == order(0, 3) == order(0, 3, batch_size=50)
    assert len({tuple(order(*which)) for which in ((0, 0), (0, 1), (1, 0), (1, 1))}) == 4


def test_the_order_is_the_same_in_another_process_and_under_another_global_seed() -> None:
    script = (
        "import torch; from autocompress.training.data import Augmentation, Images, batches\n"
        "torch.manual_seed(9)\n"
        "pixels = torch.arange(640).view(10, 1, 8, 8).to(torch.uint8)\n"
        "data = Images(pixels, torch.arange(10), (0.,), (1.,), True)\n"
        "found = batches(data, 4, seed=5, epoch=2, augment=Augmentation(shift=2, cutout=3))\n"
        "print([(x.sum((1, 2, 3)).double().tolist(), y.tolist()) for x, y in found])"
    )
    here = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    data = Images(torch.arange(640).view(10, 1, 8, 8).to(torch.uint8), torch.arange(10), (0.0,), (1.0,), True)
    found = batches(data, 4, seed=5, epoch=2, augment=Augmentation(shift=2, cutout=3))
    assert here.strip() == str([(x.sum((1, 2, 3)).double().tolist(), y.tolist()) for x, y in found])


def shifted(image: np.ndarray, down: int, right: int, padding: str, pad: int) -> np.ndarray:
    padded = np.pad(image, pad, mode="reflect" if padding == "reflect" else "constant")
    height, width = image.shape
    return padded[pad + down : pad + down + height, pad + right : pad + right + width]


@pytest.mark.parametrize("padding", ["zero", "reflect"])
@pytest.mark.parametrize("flip", [False, True])
def test_every_augmented_image_is_a_padded_crop_mirrored_or_not_and_all_occur(
    padding: Any, flip: bool
) -> None:
    # 7 wide: in a mirrored border of 4 pixels a mirrored crop would equal another crop.
    data = numbered(1, flip=flip, width=7)
    image = data.images[0, 0].numpy()
    allowed = {}
    for down in range(-2, 3):
        for right in range(-2, 3):
            crop = shifted(image, down, right, padding, 2)
            allowed[crop.tobytes()] = (down, right, False)
            if flip:
                allowed[np.ascontiguousarray(crop[:, ::-1]).tobytes()] = (down, right, True)
    augment = Augmentation(shift=2, padding=padding)
    seen = set()
    for epoch in range(600):
        x, _ = next(batches(data, 1, seed=0, epoch=epoch, augment=augment))
        seen.add(allowed[x[0, 0].round().to(torch.uint8).numpy().tobytes()])
    # 50 outcomes at most: one is missed in 600 draws with probability under 50 (49/50)^600 = 0.0003 (seeded).
    assert len(seen) == len(allowed) == (50 if flip else 25)


def test_images_of_a_batch_are_moved_independently_and_labels_stay_with_them() -> None:
    data = Images(
        torch.full((64, 1, 9, 9), 200, dtype=torch.uint8), torch.arange(64), (0.0,), (1 / 255,), False
    )
    data.images[:, 0, 4, 4] = torch.arange(64).to(torch.uint8)
    x, y = next(batches(data, 64, seed=1, augment=Augmentation(shift=3, padding="reflect")))
    # The one pixel that tells the image is still in it: moves of 3 keep the centre inside.
    assert x.flatten(1).min(1).values.round().long().tolist() == y.tolist()
    assert len({int(row.flatten().argmin()) for row in x}) > 20


def test_flip_follows_the_data_set_unless_told() -> None:
    def mirrored(data_flip: bool, asked: bool | None) -> bool:
        data = numbered(32, flip=data_flip)
        x, y = next(batches(data, 32, seed=0, augment=Augmentation(flip=asked)))
        return not torch.equal(x, data.normalise(data.images[y]))

    assert [mirrored(False, None), mirrored(True, None), mirrored(True, False), mirrored(False, True)] == [
        False,
        True,
        False,
        True,
    ]


def test_cutout_sets_one_square_to_the_mean_colour() -> None:
    data = Images(
        torch.full((200, 3, 12, 12), 77, dtype=torch.uint8), torch.arange(200), (0.5,) * 3, (0.2,) * 3, True
    )
    x, _ = next(batches(data, 200, seed=0, augment=Augmentation(cutout=4)))
    for image in x:
        rows = image.eq(0).any(dim=0).any(dim=1).nonzero().flatten()
        columns = image.eq(0).any(dim=0).any(dim=0).nonzero().flatten()
        assert 1 <= len(rows) <= 4
        assert 1 <= len(columns) <= 4
        assert int(image.eq(0).sum()) == 3 * len(rows) * len(columns)
        assert int(rows[-1] - rows[0]) == len(rows) - 1
    assert sum(int(image.eq(0).sum()) == 48 for image in x) > 60  # whole squares: 9 of 12 centres each way
    assert sum(int(image.eq(0).sum()) < 48 for image in x) > 30  # and some that reach over the border


@pytest.mark.parametrize(("side", "size"), [(32, 16), (12, 5), (7, 1), (9, 9)])
def test_cutout_blanks_the_share_of_pixels_that_its_clipped_square_has_on_average(
    side: int, size: int
) -> None:
    # A centre is any of the `side` pixels of an axis. What reaches over the borders, summed over centres,
    # is floor(size^2 / 4); both axes are independent.
    n = 4000
    data = Images(
        torch.full((n, 1, side, side), 9, dtype=torch.uint8), torch.arange(n), (0.5,), (0.2,), False
    )
    x, _ = next(batches(data, n, seed=2, augment=Augmentation(cutout=size)))
    shares = x.eq(0).float().flatten(1).mean(1)
    expected = ((size - size**2 // 4 / side) / side) ** 2
    # Five standard errors: a false alarm in less than one of a million seeds, and this seed is fixed.
    tolerance = 5 * float(shares.std()) / n**0.5 + 1e-6
    assert float(shares.mean()) == pytest.approx(expected, abs=tolerance)


def test_no_batch_changes_the_data() -> None:
    data = numbered(8, flip=True)
    before = data.images.clone()
    list(batches(data, 3, seed=0, augment=Augmentation(shift=2, cutout=2)))
    list(batches(data, 3, seed=None))
    assert torch.equal(data.images, before)


def test_wrong_arguments_of_batches_are_refused_at_the_call() -> None:
    data = numbered(10)
    with pytest.raises(DataError, match="batch_size must be 1 or more, got 0"):
        batches(data, 0, seed=None)
    with pytest.raises(DataError, match=r"batch_size must be in 1\.\.10, .* got 11"):
        batches(data, 11, seed=0, drop_last=True)
    with pytest.raises(DataError, match="augment is random and needs a seed"):
        batches(data, 2, seed=None, augment=Augmentation())
    with pytest.raises(DataError, match="seed and epoch must be 0 or more, got 0 and -1"):
        batches(data, 2, seed=0, epoch=-1)
    with pytest.raises(DataError, match="shift must be under 4, the side of the images, got 4"):
        batches(data, 2, seed=0, augment=Augmentation(shift=4))
    with pytest.raises(DataError, match="shift and cutout must be 0 or more, got -1 and 0"):
        Augmentation(shift=-1)
    with pytest.raises(DataError, match="padding must be 'zero' or 'reflect', got 'wrap'"):
        Augmentation(padding="wrap")  # type: ignore[arg-type]
