"""How large an image file may be, and what it costs to find out."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import Folder, save
from PIL import Image

from convnextv2.data import DataError, Wanted, build_predict_dataset, build_pretrain_dataset, open_source, scan_images
from convnextv2.data import bands as bands_module
from convnextv2.data.decoding import UnreadableImageError
from convnextv2.data.images import load_image, to_bytes, why_unusable


def picture(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (8, 8, 3)).astype(np.uint8)).resize((width, height))


@pytest.mark.parametrize(
    ("name", "options"),
    [("x.jpg", {}), ("p.jpg", {"progressive": True}), ("c.jpg", {"mode": "CMYK"}), ("x.jp2", {}), ("x.mpo", {})],
)
@pytest.mark.parametrize("orientation", [1, 6])
def test_what_can_be_decoded_smaller_is(tmp_path: Path, name: str, options: dict[str, Any], orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    rest = {key: value for key, value in options.items() if key != "mode"}
    path = save(picture(641, 479).convert(options.get("mode", "RGB")), tmp_path / name, exif=exif, **rest)
    whole = load_image(path, 3)
    assert np.array_equal(whole, load_image(path, 3, Wanted(641 * 479)))
    for most, size in ((641 * 479 - 1, (321, 240)), (321 * 240 - 1, (161, 120))):
        assert why_unusable(path, 3, False, Wanted(most)) is None
        smaller = load_image(path, 3, Wanted(most))
        assert isinstance(smaller, Image.Image)
        assert smaller.size == (size if orientation == 1 or name == "x.jp2" else size[::-1])
        difference = np.asarray(whole.resize(smaller.size, Image.Resampling.BOX), int) - np.asarray(smaller)  # type: ignore[union-attr]
        assert np.abs(difference).mean() < 3
    with pytest.raises(UnreadableImageError, match=r"^641×479 pixels, more than `max_pixels` 100 \(width × height\)"):
        load_image(path, 3, Wanted(100))


@pytest.mark.parametrize("name", ["x.png", "x.webp", "x.tif", "x.gif", "x.bmp", "x.ppm", "x.avif", "line.jpg"])
def test_what_cannot_is_unreadable(tmp_path: Path, name: str) -> None:
    size = (1, 20000) if name == "line.jpg" else (100, 50)
    path = save(picture(*size), tmp_path / name)
    pixels = size[0] * size[1]
    assert load_image(path, 3, Wanted(pixels)).size == size  # type: ignore[union-attr]
    for full in (False, True):
        reason = why_unusable(path, 3, full, Wanted(pixels // 20))
        assert reason is not None
        assert reason.startswith(f"{size[0]}×{size[1]} pixels, more than `max_pixels` {pixels // 20}")


def test_arrays_and_pages_are_held_to_it(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((5, 30, 20), np.uint8))
    first, *others = [Image.new("L", (20, 30)) for _ in range(5)]
    save(first, tmp_path / "x.tif", save_all=True, append_images=[*others[1:], Image.new("L", (40, 30))])
    for name in ("x.npy", "x.tif"):
        with pytest.raises(UnreadableImageError, match="more than `max_pixels` 599"):
            load_image(tmp_path / name, 5, Wanted(599))
    assert np.asarray(load_image(tmp_path / "x.npy", 5, Wanted(600))).shape == (30, 20, 5)
    with pytest.raises(UnreadableImageError, match="40×30 pixels"):
        load_image(tmp_path / "x.tif", 5, Wanted(600))
    with pytest.raises(UnreadableImageError, match=r"has 1 bands \(L\) and more than 2 pages, expected 2 channels"):
        load_image(tmp_path / "x.tif", 2)
    with pytest.raises(ValueError, match="at least 1"):
        Wanted(0)


def test_pillows_own_bound_is_out_of_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for name in ("x.jpg", "x.png", "x.webp"):
        save(picture(100, 50), tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(tmp_path / "x.jpg", 3, Wanted(900)).size == (25, 13)  # type: ignore[union-attr]
        for name in ("x.png", "x.webp"):
            reason = why_unusable(tmp_path / name, 3, True, Wanted(900)) or ""
            assert ("100×50 pixels" if name == "x.png" else "Image size (5000 pixels)") in reason
        assert Image.MAX_IMAGE_PIXELS == 1000  # of the program around, until more is asked for
        for name in ("x.png", "x.webp"):
            assert load_image(tmp_path / name, 3, Wanted(5000)).size == (100, 50)  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", ["?", "u1", "i2", ">u2", "i8", "f2", ">f8", "longdouble"])
@pytest.mark.parametrize("shape", [(7, 9), (7, 9, 3), (3, 7, 9), (1, 50), (50, 1), (3, 1, 40), (9, 7, 1)])
def test_bands_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, shape: tuple[int, ...]
) -> None:
    values = np.random.default_rng(0).uniform(0, 1 if dtype == "?" else 100, shape).astype(dtype)
    whole = to_bytes(values)
    monkeypatch.setattr(bands_module, "BAND", 20)
    assert np.array_equal(to_bytes(values), whole)
    expected = whole if whole.ndim == 3 else whole[..., None]
    if shape[0] == 3 and shape[-1] != 3:
        expected = np.moveaxis(expected, 0, -1)
    for order in ("C", "F"):
        np.save(tmp_path / "x.npy", np.asarray(values, order=order))
        assert np.array_equal(load_image(tmp_path / "x.npy", 3), np.broadcast_to(expected, (*expected.shape[:2], 3)))


def test_bands_change_nothing_in_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).integers(0, 255, (23, 31, 4)).astype(np.uint8)
    made = {
        "rgba.png": Image.fromarray(values),
        "la.png": Image.fromarray(values[..., 2:].copy(), "LA"),
        "16.png": Image.fromarray(values[..., :2].copy().view(np.uint16)[..., 0]),
        "f.tif": Image.fromarray(values[..., 0].astype(np.float32) / 7),
        "i.tif": Image.fromarray(values[..., 0].astype(np.int32) - 100),
    }
    for name, image in made.items():
        save(image, tmp_path / name)
    save(Image.fromarray(values[..., 0]).convert("P"), tmp_path / "p.png", transparency=bytes(range(256)))
    before = {path: np.asarray(load_image(path, 3)) for path in tmp_path.iterdir()}
    white = Image.alpha_composite(Image.new("RGBA", (31, 23), "white"), made["rgba.png"]).convert("RGB")
    assert np.array_equal(before[tmp_path / "rgba.png"], white)
    monkeypatch.setattr(bands_module, "BAND", 40)
    for path, pixels in before.items():
        assert np.array_equal(load_image(path, 3), pixels), path.name


def test_values_are_looked_at_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert to_bytes(np.array([[-1e308, 1.7e308]])).tolist() == [[0, 255]]
        for values in ([np.inf, 0], [np.longdouble("1e400"), 0]):
            with pytest.raises(UnreadableImageError):
                to_bytes(np.array([values]))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(28 * 9)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def npy(shape: str, descr: str = "|u1") -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + bytes(99)


def tiff(*directories: list[tuple[int, int, int, int]]) -> bytes:
    content, offset = [b"II*\0" + struct.pack("<I", 8)], 8
    for tags in directories:
        offset += 6 + 12 * len(tags)
        content += [struct.pack("<H", len(tags)), *(struct.pack("<HHII", *tag) for tag in tags)]
        content.append(struct.pack("<I", offset))
    return b"".join(content)


def gif(canvas: int, frame: int) -> bytes:
    start = b"GIF89a" + struct.pack("<HHBBB", canvas, canvas, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff,\0\0\0\0"
    return start + struct.pack("<HHB", frame, frame, 0) + b"\2\2D\1\0;"


def jpeg(side: int, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "JPEG", **options)
    start, marker, rest = file.getvalue().partition(b"\xff\xc2" if options else b"\xff\xc0")
    return start + marker + rest[:3] + struct.pack(">HH", side, side) + rest[7:]


TAGS = [(256, 4, 1, 4), (257, 4, 1, 4), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8), (279, 4, 1, 16)]
BOMB = zlib.compress(bytes(100_000_000), 9)
HOSTILE: dict[str, Callable[[], bytes]] = {
    "long.npy": lambda: npy("(1000000000000,)"),
    "huge.npy": lambda: npy("(1000000000000, 1000000000000)"),
    "cut.npy": lambda: npy("(4000, 4000)", "<f8"),
    "negative.npy": lambda: npy("(-5, -5)"),
    "deep.npy": lambda: npy("(" * 3000 + ")" * 3000),
    "float.npy": lambda: npy("(1e9, 2)"),
    "text.npy": lambda: npy("(3, 3)", "<U9"),
    "huge.png": lambda: png(2**31 - 1, 2**31 - 1),
    "text.png": lambda: png(9, 9, chunk(b"zTXt", b"k\0\0" + BOMB)),
    "profile.png": lambda: png(9, 9, chunk(b"iCCP", b"k\0\0" + BOMB)),
    "cut.png": lambda: png(8000, 8000),
    "huge.tif": lambda: tiff([(256, 4, 1, 2**31 - 1), (257, 4, 1, 2**31 - 1), *TAGS[2:]]),
    "pages.tif": lambda: tiff(*[TAGS] * 100_000),
    "tags.tif": lambda: tiff([(254, 4, 1, 0)] * 65535),
    "canvas.gif": lambda: gif(65535, 4),
    "frame.gif": lambda: gif(4, 65535),
    "coefficients.jpg": lambda: jpeg(65500, progressive=True),
    "huge.ppm": lambda: b"P6 2000000000 2000000000 255\n",
    "huge.bmp": lambda: b"BM" + struct.pack("<IHHIIiiHH24x", 99, 0, 0, 54, 40, 2**31 - 1, 2**31 - 1, 1, 24),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_answered_at_once(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(HOSTILE[name]())
    start = time.process_time()
    reasons = [why_unusable(tmp_path / name, channels, full) for channels in (3, 5) for full in (False, True)]
    assert time.process_time() - start < 2
    assert reasons[3]
    assert len(reasons[3]) < 300
    if name.startswith(("huge", "canvas", "frame", "coefficients")):
        assert "more than `max_pixels` 67108864" in (reasons[0] or "")
    elif name != "pages.tif":  # which has a first page
        assert reasons[1]


def test_an_array_that_is_cut_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((50, 40)))
    monkeypatch.setattr(bands_module, "BAND", 80)
    file = bands_module.open_array(tmp_path / "x.npy", 3, Wanted())
    os.truncate(tmp_path / "x.npy", 1000)
    with pytest.raises(UnreadableImageError, match="cut while it was read"):
        to_bytes(file)


MEASURE = """
import os, resource, sys
from pathlib import Path
import convnextv2.training
from convnextv2.data.images import load_image
for name in sys.argv[1:]:
    process = os.fork()
    if process == 0:
        load_image(Path(name), 3)
        os._exit(0)
    _, status, usage = os.wait4(process, 0)
    print(status, usage.ru_maxrss // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts pages as Linux does")
def test_memory_of_one_image_at_the_bound(tmp_path: Path) -> None:
    side = 8192
    for name, mode in (("rgba", "RGBA"), ("16", "I;16")):
        save(Image.new(mode, (side, side)), tmp_path / f"{name}.png", compress_level=1)
    save(Image.new("CMYK", (side, side)), tmp_path / "cmyk.jpg")
    save(Image.new("F", (side, side), 0.5), tmp_path / "f.tif", compression="tiff_deflate")
    values = np.lib.format.open_memmap(tmp_path / "f.npy", "w+", "<f8", (side, side, 3), fortran_order=True)
    values[:9, :9] = 0.5
    del values
    files = sorted(tmp_path.iterdir())
    command = [sys.executable, "-c", MEASURE, *map(str, files)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == len(files) == 5
    for path, line in zip(files, lines, strict=True):
        status, megabytes = map(int, line.split())
        assert status == 0, path.name
        assert megabytes < 1500, path.name


def test_the_bound_goes_all_the_way(image_folder: Folder) -> None:
    root = image_folder({"": 3})  # 40×30
    save(picture(50, 40), root / "large.png")
    reason = "50×40 pixels, more than `max_pixels` 1200"
    bound = Wanted(1200)
    for part in (scan_images(root, wanted=bound).train, open_source(root, wanted=bound).train):
        assert [(path.name, why[: len(reason)]) for path, why in part.skipped] == [("large.png", reason)]
    assert len(build_pretrain_dataset(root, (32, 32), wanted=bound)) == 3
    dataset = build_predict_dataset([root], (32, 32), 3, (0.5,) * 3, (0.5,) * 3, wanted=bound)
    assert [dataset[number][2][: len(reason)] for number in range(4)] == ["", "", "", reason]
    with pytest.raises(DataError, match="`max_pixels` 100 "):
        scan_images(root, wanted=Wanted(100))
