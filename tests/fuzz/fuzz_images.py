"""Images: files of every format that is read and Pillow writes here, and .npy arrays, changed."""

from __future__ import annotations

import contextlib
import functools
import io
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuzz_bytes import NUMBERS, changed, changed_text, splice
from fuzz_harness import BrokenError, Case, one_line
from PIL import Image, features

from convnextv2.data.decoding import USUAL, open_image
from convnextv2.data.folders import scan_images
from convnextv2.data.images import FORMATS, UnreadableImageError, load_image
from convnextv2.data.rasters import Raster
from convnextv2.data.sources import DataError
from convnextv2.data.transforms import Augmentation, image_transform

HUGE = 2**21
"""Pixels, all pages together, above which a case is skipped: what is large is to be refused elsewhere."""
SIZE = (11, 7)


def _picture(mode: str, number: int = 0) -> Image.Image:
    rng = np.random.default_rng(number)
    base = Image.fromarray(rng.integers(0, 256, (SIZE[1], SIZE[0], 4)).astype(np.uint8), "RGBA")
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, (SIZE[1], SIZE[0])).astype(np.uint16))
    if mode in ("I", "F"):
        return Image.fromarray(
            rng.integers(0, 65536, (SIZE[1], SIZE[0])).astype({"I": np.int32, "F": np.float32}[mode])
        )
    if mode == "LAB":
        return Image.merge("LAB", base.split()[:3])
    return base.convert(mode) if mode in ("RGBA", "LA") else base.convert("RGB").convert(mode)


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = orientation, "a photograph"
    return exif


def _variants() -> list[tuple[str, str, dict[str, Any]]]:
    """Modes, suffixes and options to save with."""
    more = [_picture("L", number) for number in (1, 2, 3)]
    tiff = [
        (mode, ".tif", {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "YCbCr", "LAB")
    ]
    for how in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "tiff_deflate", "zstd", "lzma"):
        tiff += [(mode, ".tif", {"compression": how}) for mode in ("L", "RGB")]
    tiff += [("1", ".tif", {"compression": how}) for how in ("group3", "group4", "tiff_ccitt")]
    tiff += [("L", ".tif", {"save_all": True, "append_images": more}), ("L", ".tif", {"exif": _exif(6)})]
    tiff += [("I;16", ".tif", {"compression": "tiff_lzw"}), ("RGB", ".tif", {"big_tiff": True})]
    transparent = {"transparency": 0}
    return [
        *tiff,
        *[(mode, ".bmp", {}) for mode in ("1", "L", "P", "RGB", "RGBA")],
        *[(mode, ".gif", {}) for mode in ("1", "L", "P", "RGB", "RGBA")],
        ("P", ".gif", {**transparent, "save_all": True, "append_images": more}),
        *[(mode, ".jpg", {}) for mode in ("L", "RGB", "CMYK")],
        ("RGB", ".jpg", {"progressive": True, "exif": _exif(6)}),
        ("RGB", ".jpg", {"exif": _exif(8), "icc_profile": b"not a profile", "comment": b"hello", "dpi": (72, 72)}),
        ("RGB", ".mpo", {"save_all": True, "append_images": [_picture("RGB", 1)]}),
        *[(mode, ".jp2", {}) for mode in ("L", "LA", "RGB", "RGBA", "I;16")],
        ("RGB", ".j2k", {"irreversible": True}),
        *[(mode, ".png", {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I")],
        ("P", ".png", {"transparency": bytes(range(256)), "bits": 8}),
        ("L", ".png", transparent),
        ("RGB", ".png", {"transparency": (1, 2, 3), "exif": _exif(3), "dpi": (1, 1), "icc_profile": b"none"}),
        ("RGBA", ".png", {"save_all": True, "append_images": [_picture("RGBA", 1)], "duration": 3}),
        *[(mode, ".ppm", {}) for mode in ("1", "L", "RGB", "I;16", "I", "F")],
        *[(mode, ".webp", {"lossless": lossless}) for mode in ("RGB", "RGBA") for lossless in (False, True)],
        ("RGBA", ".webp", {"save_all": True, "append_images": [_picture("RGBA", 1)], "exif": _exif(6)}),
        *[(mode, ".avif", {"speed": 10}) for mode in ("L", "RGB", "RGBA") if features.check("avif")],
        *[("RGB", ".avif", {"exif": _exif(5)}) for _ in range(features.check("avif"))],
    ]


def _arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 200, (7, 11, 3))
    return {
        "bytes": values.astype(np.uint8),
        "words": (values * 300).astype(np.uint16),
        "big": (values * 300).astype(">u2"),
        "floats": rng.random((7, 11)).astype(np.float32),
        "halves": rng.random((4, 7, 11)).astype(np.float16),
        "first": np.asfortranarray(rng.random((3, 7, 11))),
        "wide": values.astype(np.int64),
        "flags": values[..., :1] > 100,
        "bands": values[..., [0, 1, 2, 0]].astype(np.uint8),
    }


def files() -> dict[str, bytes]:
    """Good files by a name that ends in their suffix."""
    found = {}
    for number, (mode, suffix, options) in enumerate(_variants()):
        file = io.BytesIO()
        formats = {".mpo": "MPO", ".j2k": "JPEG2000"}
        kind = formats.get(suffix) or Image.registered_extensions()[suffix]
        try:
            _picture(mode, number).save(file, kind, **options)
        except (OSError, KeyError, ValueError):  # not every Pillow writes every mode
            continue
        found[f"{number}-{mode.replace(';', '')}{suffix}"] = file.getvalue()
    for name, array in _arrays().items():
        file = io.BytesIO()
        np.save(file, array)
        found[f"{name}.npy"] = file.getvalue()
    return found


def changed_png(rng: random.Random, data: bytes) -> bytes:
    """Chunks changed, removed, doubled or moved, their checksums right again; now and then what is packed in them."""
    chunks, place = [], 8
    while place < len(data):
        (length,) = struct.unpack_from(">I", data, place)
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += 12 + length
    at, other = rng.randrange(len(chunks)), rng.randrange(len(chunks))
    name, content = chunks[at]
    kind = rng.randrange(8)
    if kind == 0:
        del chunks[at]
    elif kind == 1:
        chunks.insert(other, chunks[at])
    elif kind == 2:
        chunks[at], chunks[other] = chunks[other], chunks[at]
    elif kind == 3:
        new = rng.choice(
            (b"tRNS", b"PLTE", b"iCCP", b"eXIf", b"acTL", b"fcTL", b"tEXt", b"zTXt", b"iTXt", b"gAMA", b"sBIT")
        )
        chunks.insert(min(at + 1, len(chunks)), (new, rng.randbytes(rng.choice((0, 1, 3, 6, 26, 100)))))
    elif kind == 4 and name == b"IDAT":
        try:
            chunks[at] = name, zlib.compress(changed(rng, zlib.decompress(content))[0])
        except zlib.error:
            return data
    else:
        chunks[at] = name, changed(rng, content or b"\0")[0]
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    return data[:8] + b"".join(parts)


def changed_npy(rng: random.Random, data: bytes) -> bytes:
    """The header, which is text, changed, and its length right again."""
    (length,) = struct.unpack_from("<H", data, 8)
    text = data[10 : 10 + length].decode("latin1")
    if rng.random() < 0.6:
        new = rng.choice(
            ("<f8", ">f4", "|b1", "<c8", "|O", "<U3", "|S4", "<M8[s]", "<f2", "|V4", "<i8", "x", "|u1", "[('a','<f4')]")
        )
        text = text.replace(text.split("'descr': ")[1].split(",")[0], f"'{new}'") if rng.random() < 0.5 else text
        shape = ", ".join(str(rng.choice((*NUMBERS, 0, 1, 3, 7, 11))) for _ in range(rng.choice((0, 1, 2, 3, 4))))
        text = text[: text.index("(")] + f"({shape}{',' if shape else ''})" + text[text.index(")") + 1 :]
    else:
        text = changed_text(rng, text)
    header = text.encode("latin1", errors="replace")[:65535]
    return data[:8] + struct.pack("<H", len(header)) + header + data[10 + length :]


def changed_tiff(rng: random.Random, data: bytes) -> bytes:
    """An entry of the first directory changed: its tag, type, count or value."""
    order = "<" if data[:2] == b"II" else ">"
    if data[2:4] in (b"+\0", b"\0+"):
        return changed(rng, data)[0]
    result = bytearray(data)
    (place,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, place)
    for _ in range(rng.choice((1, 1, 2))):
        entry = place + 2 + 12 * rng.randrange(count)
        field = rng.randrange(4)
        tags = (
            254,
            256,
            257,
            258,
            259,
            262,
            266,
            273,
            274,
            277,
            278,
            279,
            284,
            317,
            320,
            322,
            323,
            324,
            338,
            339,
            347,
            530,
            34665,
        )
        numbers = (*range(9), 16, 32, 64, 5, 6, 34712, 50000, 32773, 32946, *NUMBERS)
        if field == 0:
            struct.pack_into(order + "H", result, entry, rng.choice(tags))
        elif field == 1:
            struct.pack_into(order + "H", result, entry + 2, rng.randrange(20))
        elif field == 2:
            struct.pack_into(order + "I", result, entry + 4, rng.choice(numbers) % 2**32)
        elif rng.random() < 0.5:
            struct.pack_into(order + "H", result, entry + 8, rng.choice(numbers) % 2**16)
        else:
            struct.pack_into(order + "I", result, entry + 8, rng.choice(numbers) % 2**32)
    return bytes(result)


@functools.cache
def _good() -> dict[str, bytes]:
    found = files()
    assert len(found) > 60
    assert {Image.registered_extensions().get(Path(name).suffix, "JPEG2000") for name in found} >= {*FORMATS} - {"AVIF"}
    return found


def _pixels(path: Path) -> int:
    """That a file says it has, all pages together; 0 where that cannot be told."""
    try:
        if path.suffix == ".npy":
            with np.errstate(all="ignore"):
                return int(np.load(path, mmap_mode="r").size)
        with Image.open(path, formats=FORMATS) as image:
            pixels = image.size[0] * image.size[1]
            with contextlib.suppress(Exception):  # damaged behind the first page
                pixels *= getattr(image, "n_frames", 1)
            return pixels
    except Image.DecompressionBombError:  # some of these are decoded at another size
        with contextlib.suppress(UnreadableImageError), open_image(path, USUAL) as image:
            return image.size[0] * image.size[1]
        return 0
    except Exception:
        return 0


class Images:
    """Every way in for an image: pixels as documented, or a line why not."""

    name = "images"
    seconds = 2.0
    megabytes = 200

    def prepare(self) -> None:
        _good()
        mean, std = (0.5,) * 3, (0.25,) * 3
        self.transforms = {
            1: [image_transform((16, 16), mean[:1], std[:1])],
            3: [
                image_transform((16, 16), mean, std),
                image_transform((16, 16), mean, std, Augmentation((0.2, 1), 0.5, auto_augment="rand-m9-mstd0.5-inc1")),
            ],
            4: [image_transform((16, 16), (*mean, 0.5), (*std, 0.5))],
        }
        for channels, transforms in self.transforms.items():
            for transform in transforms:
                transform(np.zeros((8, 8, 4), np.float32) if channels == 4 else _picture("RGB"))

    def produce(self, seed: int, count: int, sink: Callable[[Case], None]) -> None:
        rng = random.Random(f"images {seed}")
        good = _good()
        if seed == 0:
            for name, data in good.items():
                sink(Case(Path(name).suffix, data, f"good {name}"))
        for _ in range(count):
            name = rng.choice(list(good))
            data, what = good[name], "own"
            suffix = Path(name).suffix
            own = {".png": changed_png, ".npy": changed_npy, ".tif": changed_tiff}.get(suffix)
            kind = rng.random()
            if own and kind < 0.6:
                data = own(rng, data)
            elif kind < 0.95:
                data, what = changed(rng, data, [other for key, other in good.items() if key.endswith(suffix)])
            else:
                data, what = splice(rng, data, rng.choice(list(good.values()))), "splice"
            sink(Case(rng.choice((suffix,) * 9 + (".png",)), data, f"{name}: {what}"))

    def check(self, path: Path) -> str:
        if _pixels(path) > HUGE:
            return "skipped"
        taken = set()
        for channels in (1, 3, 4):
            try:
                image = load_image(path, channels)
            except UnreadableImageError as error:
                one_line(str(error))
                continue
            taken.add(channels)
            self._as_documented(image, channels)
            for transform in self.transforms[channels]:
                tensor = transform(image)
                if tuple(tensor.shape) != (channels, 16, 16) or not torch.isfinite(tensor).all():
                    raise BrokenError(f"the transform gives {tensor.shape}, {tensor}")
            for check in ("full", "header"):
                found = scan_images(path.parent, in_chans=channels, check=check)
                if len(found.train.by_number) != 1 or found.train.skipped:
                    raise BrokenError(f"read, but not found: {found}")
        if 3 not in taken and 1 not in taken:
            try:
                found = scan_images(path.parent).train.by_number
            except DataError as error:
                one_line(str(error), path.name)
            else:  # as an image of measurements, which is no photograph
                try:
                    raster = found.load(0)
                except UnreadableImageError as error:
                    raise BrokenError("found, but not read") from error
                if not isinstance(raster, Raster) or raster.shape[2] != 3 or 0 in raster.shape:
                    raise BrokenError(f"no raster of three bands but {raster}")
        return "accepted" if taken else "refused"

    def _as_documented(self, image: Any, channels: int) -> None:
        if channels == 4:
            if image.dtype != np.float32 or image.ndim != 3 or image.shape[2] != 4 or not np.isfinite(image).all():
                raise BrokenError(f"no float32 [H, W, 4] but {image.dtype} {image.shape}")
            return
        if not isinstance(image, Image.Image) or image.mode != "RGB" or 0 in image.size:
            raise BrokenError(f"no RGB image but {image}")
        pixels = np.asarray(image)
        if channels == 1 and not (pixels == pixels[..., :1]).all():
            raise BrokenError("gray, but its channels differ")
