from pathlib import Path

import numpy as np
import pytest
from data_helpers import save
from PIL import Image

from convnextv2.data.images import UnreadableImageError, load_image, to_bytes


def pixel(path: Path, channels: int = 3) -> tuple[int, ...]:
    image = load_image(path, channels)
    assert isinstance(image, Image.Image)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


def test_gray_black_and_white_and_palette(tmp_path: Path) -> None:
    assert pixel(save(Image.new("L", (4, 3), 77), tmp_path / "l.png")) == (77, 77, 77)
    assert pixel(save(Image.new("1", (4, 3), 1), tmp_path / "1.png")) == (255, 255, 255)
    palette = Image.new("RGB", (4, 3), (200, 10, 30)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert pixel(save(palette, tmp_path / "p.png")) == (200, 10, 30)


def test_transparency_shows_a_white_page(tmp_path: Path) -> None:
    assert pixel(save(Image.new("RGBA", (4, 3), (10, 20, 30, 0)), tmp_path / "rgba.png")) == (255, 255, 255)
    half = pixel(save(Image.new("RGBA", (4, 3), (0, 0, 0, 128)), tmp_path / "half.png"))
    assert half == pytest.approx((127, 127, 127), abs=1)
    assert pixel(save(Image.new("LA", (4, 3), (10, 0)), tmp_path / "la.png")) == (255, 255, 255)
    palette = Image.new("P", (4, 3), 0)
    palette.putpalette([9, 9, 9, 200, 0, 0])
    assert pixel(save(palette, tmp_path / "p.png", transparency=0)) == (255, 255, 255)
    palette.putpixel((0, 0), 1)
    assert pixel(save(palette, tmp_path / "p2.png", transparency=0)) == (200, 0, 0)
    assert pixel(save(Image.new("RGB", (4, 3), (1, 2, 3)), tmp_path / "key.png", transparency=(1, 2, 3))) == (255,) * 3


def test_cmyk_and_ycbcr(tmp_path: Path) -> None:
    red = pixel(save(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), tmp_path / "c.jpg", quality=95))
    assert red[0] > 240
    assert max(red[1:]) < 15


@pytest.mark.parametrize("name", ["x.png", "x.tif", "big.tif", "x.pgm"])
def test_16_bits_are_scaled_not_clipped(tmp_path: Path, name: str) -> None:
    values = np.full((3, 4), 32768, dtype=np.uint16)
    values[0, 0] = 257 * 100
    values[2, 3] = 65535
    if name == "x.pgm":
        (tmp_path / name).write_bytes(b"P5 4 3 65535\n" + values.astype(">u2").tobytes())
    elif name == "big.tif":
        save(Image.frombytes("I;16B", (4, 3), values.astype(">u2").tobytes()), tmp_path / name)
    else:
        save(Image.fromarray(values), tmp_path / name)
    image = np.asarray(load_image(tmp_path / name, 3))
    assert image[0, 0].tolist() == [100] * 3
    assert image[1, 1].tolist() == [128] * 3
    assert image[2, 3].tolist() == [255] * 3


def test_dark_16_bits_stay_dark(tmp_path: Path) -> None:
    assert pixel(save(Image.fromarray(np.full((3, 4), 257, np.uint16)), tmp_path / "x.png")) == (1, 1, 1)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, 100.0, 255.0]], np.float32), [0, 100, 255]),
        (np.array([[0.0, 25700.0, 65535.0]], np.float32), [0, 100, 255]),
        (np.array([[-10.0, 0.0, 10.0]], np.float32), [0, 128, 255]),
        (np.array([[0, 100, 255]], np.int32), [0, 100, 255]),
        (np.array([[0, 25700, 65535]], np.int32), [0, 100, 255]),
        (np.array([[5.0, 5.0, 5.0]], np.float32), [5, 5, 5]),
        (np.array([[False, True]]), [0, 255]),
        (np.array([[257, 65535]], ">u2"), [1, 255]),
    ],
)
def test_ranges_of_undeclared_types(values: np.ndarray, expected: list[int]) -> None:
    assert to_bytes(values).ravel().tolist() == expected


def test_float_tiff_and_nan(tmp_path: Path) -> None:
    values = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    image = np.asarray(load_image(save(Image.fromarray(values), tmp_path / "f.tif"), 3))
    assert (image[0, 0, 0], image[2, 3, 0]) == (0, 255)
    values[1, 1] = np.nan
    save(Image.fromarray(values), tmp_path / "nan.tif")
    with pytest.raises(UnreadableImageError, match="NaN"):
        load_image(tmp_path / "nan.tif", 3)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize(("orientation", "corner"), [(1, 0), (2, 1), (3, 3), (4, 2), (5, 0), (6, 2), (7, 3), (8, 1)])
def test_exif_orientation_is_applied(tmp_path: Path, suffix: str, orientation: int, corner: int) -> None:
    # Four corners, bright where numbered 0 … 3 = top left, top right, bottom left, bottom right of the stored image.
    # ``corner`` is the stored corner that must appear at the top left.
    stored = np.zeros((16, 32), np.uint8)
    for number, value in enumerate((0, 80, 160, 240)):
        row, column = divmod(number, 2)
        stored[8 * row : 8 * row + 8, 16 * column : 16 * column + 16] = value
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(stored).convert("RGB").save(path, exif=exif)
    image = load_image(path, 3)
    assert isinstance(image, Image.Image)
    assert image.size == ((16, 32) if orientation >= 5 else (32, 16))
    assert image.getpixel((3, 3))[0] == pytest.approx((0, 80, 160, 240)[corner], abs=6)


@pytest.mark.parametrize(
    ("mode", "suffix"), [("I;16", "tif"), ("P", "png"), ("CMYK", "jpg"), ("1", "tif"), ("LA", "png")]
)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_of_every_mode(tmp_path: Path, mode: str, suffix: str, orientation: int) -> None:
    rows = np.arange(6 * 10).reshape(6, 10) * 4
    image = Image.fromarray(rows.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(rows.astype(np.uint8))
    plain, turned = tmp_path / f"plain.{suffix}", tmp_path / f"turned.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    for path, options in ((plain, {}), (turned, {"exif": exif})):
        image.convert(mode).save(path, **options)
    before, after = np.asarray(load_image(plain, 3)), np.asarray(load_image(turned, 3))
    flips = [lambda a: a, np.fliplr, lambda a: a[::-1, ::-1], np.flipud]
    expected = flips[orientation - 1](before) if orientation < 5 else before.swapaxes(0, 1)
    expected = {6: np.fliplr, 7: lambda a: a[::-1, ::-1], 8: np.flipud}.get(orientation, flips[0])(expected)
    assert len(np.unique(before)) > 1
    np.testing.assert_array_equal(after, expected)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns of what is damaged
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_damaged_metadata_around_good_pixels(tmp_path: Path, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x829A] = 6, "maker", 0.5
    content, sizes = exif.tobytes(), set()
    for position in range(6, len(content)):
        damaged = content[:position] + b"\xff" + content[position + 1 :]
        image = load_image(save(Image.new("RGB", (32, 16), (9, 200, 9)), tmp_path / f"x.{suffix}", exif=damaged), 3)
        assert isinstance(image, Image.Image)
        assert image.getpixel((8, 8))[1] > 180
        sizes.add(image.size)
    assert sizes == {(32, 16), (16, 32)}  # turned wherever the orientation itself can be read


def test_one_channel_is_luminance(tmp_path: Path) -> None:
    path = save(Image.new("RGB", (4, 3), (255, 0, 0)), tmp_path / "x.png")
    assert pixel(path, 1) == (76, 76, 76)


def test_arrays_of_other_channel_counts(tmp_path: Path) -> None:
    values = np.arange(2 * 3 * 5, dtype=np.uint16).reshape(2, 3, 5) * 1000
    np.save(tmp_path / "last.npy", values)
    np.save(tmp_path / "first.npy", np.moveaxis(values, -1, 0))
    pages = [Image.fromarray(np.ascontiguousarray(values[..., c])) for c in range(5)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    for name in ("last.npy", "first.npy", "pages.tif"):
        np.testing.assert_allclose(load_image(tmp_path / name, 5), values / 65535, rtol=1e-6)
    with pytest.raises(UnreadableImageError, match="expected 4 channels"):
        load_image(tmp_path / "last.npy", 4)
    with pytest.raises(UnreadableImageError, match="expected 4 channels"):
        load_image(tmp_path / "pages.tif", 4)
    four = save(Image.new("RGBA", (4, 3), (10, 20, 30, 40)), tmp_path / "four.png")
    np.testing.assert_allclose(load_image(four, 4)[0, 0], np.array([10, 20, 30, 40]) / 255, rtol=1e-6)
    np.save(tmp_path / "rgb.npy", np.full((2, 3, 3), 9, np.uint8))
    assert pixel(tmp_path / "rgb.npy") == (9, 9, 9)
