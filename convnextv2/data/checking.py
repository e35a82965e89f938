"""What is wrong with a set of images: unreadable, duplicate and nearly equal ones, odd sizes, other bands than most."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convnextv2.data.decoding import USUAL, UnreadableImageError, Wanted, open_image, reasons
from convnextv2.data.images import load_image
from convnextv2.data.native import band_count, is_deep, load_native
from convnextv2.data.rasters import Raster
from convnextv2.data.scenes import is_scene, open_scene, scene_bands

SIDE, KEPT = 32, 8
"""Pixels a side of what a picture is compared by, and of its lowest frequencies that make the hash."""
PARTS, PART = 8, 64
"""Parts of a scene that are looked at, a row and a column, and pixels of their sides."""
FLAT = 1e-3
"""Standard deviation, of values scaled to [0, 1], below which an image shows nothing that could be compared."""
NEAR_BITS, ALIKE = 7, 0.95
"""Nearly equal are images whose hashes differ in at most so many of 64 bits, and whose thumbnails correlate so much."""
BANDS, BAND_BITS = 4, 16
MOST_PAIRS = 2**26
"""Pairs of one search that are compared; of more, found among many alike images, the rest is left out and told."""


@dataclass(frozen=True)
class Look:
    """What one image was seen to be.

    Args:
        path: the file.
        reason: why it cannot be read; all else is then 0.
        size: (H, W) in pixels, as stored.
        bands: how many, without alpha.
        deep: whether a value has more than 8 bits.
        digest: sha256 of the file.
        bits: the perceptual hash; 0 for an image that shows nothing.
        thumbnail: uint8 ``[16, 16]``.
    """

    path: Path
    reason: str = ""
    size: tuple[int, int] = (0, 0)
    bands: int = 0
    deep: bool = False
    digest: bytes = b""
    bits: int = 0
    thumbnail: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: its kind, the files that it is about, and in words what it is."""

    kind: str
    files: tuple[Path, ...]
    what: str


def look(path: Path, wanted: Wanted = USUAL) -> Look:
    """Read an image whole, at most at ``wanted.max_pixels`` pixels; a scene in parts, where ``wanted`` has a window."""
    try:
        if wanted.window is not None and is_scene(path):
            return _look_at_scene(path, wanted)
        with reasons(path=path):
            digest = hashlib.sha256(path.read_bytes()).digest()
            count, deep = band_count(path), bool(is_deep(path))
            if deep or count not in (1, 3):
                raster = load_native(path, count or 3, Wanted(wanted.max_pixels, pixels="native"))
                size, gray = raster.shape[:2], _gray(raster)
            else:
                shown: Any = load_image(path, 1, Wanted(wanted.max_pixels, least_side=2 * SIDE, pixels="photo"))
                if path.suffix.lower() == ".npy":
                    size = shown.size[::-1]
                else:  # which may have been decoded at a reduced size
                    with open_image(path, wanted) as image:
                        size = image.size[::-1]
                gray = shown.convert("L").convert("F")
    except UnreadableImageError as error:
        return Look(path, str(error))
    return _seen(Look(path, "", (int(size[0]), int(size[1])), count or 3, deep, digest), gray)


def _look_at_scene(path: Path, wanted: Wanted) -> Look:
    """By parts of a scene, :data:`PARTS` a row and column of them: their pixels make the digest and the picture."""
    count = scene_bands(path) or 3
    scene = open_scene(path, count, Wanted(wanted.max_pixels, pixels="native", window=wanted.window))
    digest, deep = hashlib.sha256(repr((scene.size, path.stat().st_size)).encode()), False
    gray = Image.new("F", (SIDE, SIDE))
    for number in range(PARTS * PARTS):
        row, column = divmod(number, PARTS)
        starts = [int((place + 0.5) / PARTS * side) for place, side in zip((row, column), scene.size, strict=True)]
        top, left = (max(0, start - PART // 2) for start in starts)
        raster = scene.read((top, left, min(top + PART, scene.size[0]), min(left + PART, scene.size[1])))
        digest.update(np.ascontiguousarray(raster.values).tobytes())
        deep = raster.values.dtype != np.uint8
        small = _gray(raster).resize((SIDE // PARTS, SIDE // PARTS), Image.Resampling.BOX)
        gray.paste(small, (column * small.width, row * small.height))
    return _seen(Look(path, "", scene.size, count, deep, digest.digest()), gray)


def _seen(found: Look, gray: Image.Image) -> Look:
    """With the hash and the thumbnail of a picture."""
    small = np.asarray(gray.resize((SIDE, SIDE), Image.Resampling.BOX), np.float64)
    low, high = small.min(), small.max()
    scaled = (small - low) / (high - low) if high > low else np.zeros_like(small)
    bits = perceptual_hash(scaled) if high - low > FLAT * max(abs(low), abs(high)) else 0
    halves = scaled.reshape(SIDE // 2, 2, SIDE // 2, 2).mean((1, 3))
    return replace(found, bits=bits, thumbnail=np.rint(255 * halves).astype(np.uint8))


def _gray(raster: Raster) -> Image.Image:
    values = raster.floats()
    missing = np.isnan(values)
    values[missing] = 0.0
    counted = np.maximum((~missing).sum(2), 1)
    return Image.fromarray((values.sum(2, dtype=np.float64) / counted).astype(np.float32), "F")


def perceptual_hash(values: NDArray[np.float64]) -> int:
    """64 bits of ``[32, 32]``: which of the 8×8 lowest frequencies of the cosine transform, but the mean, lie above
    their median; equal for a picture that was scaled, recompressed, or changed in brightness and contrast (pHash)."""
    from scipy.fft import dctn

    lowest = dctn(values, norm="ortho")[:KEPT, :KEPT].flatten()
    above = lowest > np.median(lowest[1:])
    above[0] = True  # so that no picture has the hash of none
    return int.from_bytes(np.packbits(above).tobytes(), "big")


def near_pairs(bits: NDArray[np.uint64]) -> tuple[NDArray[np.int64], bool]:
    """Pairs of places whose hashes differ in at most :data:`NEAR_BITS` bits, ``[n, 2]``; and whether some are left out.

    Of two hashes that differ in at most seven bits one of the four parts of 16 differs in at most one: places are
    sought by the parts, and by each part with one bit turned.
    """
    found, more, limit = list[NDArray[np.int64]](), False, MOST_PAIRS
    for band in range(BANDS):
        part = ((bits >> np.uint64(band * BAND_BITS)) & np.uint64(2**BAND_BITS - 1)).astype(np.int64)
        order = np.argsort(part, kind="stable")
        ordered = part[order]
        for flipped in (0, *(1 << bit for bit in range(BAND_BITS))):
            sought = part ^ flipped
            first, last = np.searchsorted(ordered, sought, "left"), np.searchsorted(ordered, sought, "right")
            counts = last - first
            keep = np.cumsum(counts) <= limit
            more = more or not bool(keep.all())
            counts = np.where(keep, counts, 0)
            left = np.repeat(np.arange(len(bits)), counts)
            inside = np.arange(len(left)) - np.repeat(np.cumsum(counts) - counts, counts)
            right = order[np.repeat(first, counts) + inside]
            chosen = left < right
            left, right = left[chosen], right[chosen]
            other = np.unpackbits((bits[left] ^ bits[right]).view(np.uint8).reshape(-1, 8), axis=1).sum(1)
            found.append(np.stack([left, right], 1)[other <= NEAR_BITS])
    return np.unique(np.concatenate(found), axis=0), more


def groups(count: int, pairs: Sequence[tuple[int, int]] | NDArray[np.int64]) -> list[list[int]]:
    """What is connected by pairs, each sorted; what is in no pair is left out."""
    parent = list(range(count))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    for one, other in pairs:
        parent[root(int(other))] = root(int(one))
    found = defaultdict[int, list[int]](list)
    for number in range(count):
        found[root(number)].append(number)
    return [members for members in found.values() if len(members) > 1]


def findings(looks: Sequence[Look], parts: Sequence[str], least_side: int = 32) -> Iterator[Finding]:
    """What is wrong with the images.

    Args:
        looks: of all.
        parts: to which part of the data each belongs, such as ``train`` and ``val``.
        least_side: an image with a shorter side is odd.
    """
    yield from (Finding("unreadable", (one.path,), one.reason) for one in looks if one.reason)
    good = [number for number, one in enumerate(looks) if not one.reason]
    part_of = {looks[number].path: parts[number] for number in good}
    same = defaultdict[bytes, list[int]](list)
    for number in good:
        same[looks[number].digest].append(number)
    for members in same.values():
        if len(members) > 1:
            yield _alike("duplicate", [looks[number].path for number in members], part_of, "the same file")
    once = [members[0] for members in same.values()]
    clear = [number for number in once if looks[number].bits]
    pairs, more = near_pairs(np.array([looks[number].bits for number in clear], np.uint64))
    pairs = pairs[_correlations([looks[number].thumbnail for number in clear], pairs) >= ALIKE]
    for members in groups(len(clear), pairs):
        files = [looks[clear[place]].path for place in members]
        yield _alike("near duplicate", files, part_of, "nearly the same picture")
    if more:
        yield Finding("near duplicate", (), "more pairs than were compared: many images are alike")
    yield from (Finding("blank", (looks[n].path,), "shows one value alone") for n in good if not looks[n].bits)
    yield from _odd(looks, good, least_side)


def _alike(kind: str, files: Sequence[Path], part_of: dict[Path, str], what: str) -> Finding:
    held = sorted({part_of[file] for file in files})
    return Finding(kind, tuple(sorted(files)), f"{what}, in {' and '.join(held)}" if len(held) > 1 else what)


def _correlations(thumbnails: Sequence[Any], pairs: NDArray[np.int64]) -> NDArray[np.float64]:
    if not len(pairs):
        return np.empty(0)
    values = np.stack(thumbnails).reshape(len(thumbnails), -1).astype(np.float32)
    values -= values.mean(1, keepdims=True)
    values /= np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-6)
    chunks = np.array_split(pairs, max(1, len(pairs) // 2**16))
    return np.concatenate([(values[chunk[:, 0]] * values[chunk[:, 1]]).sum(1) for chunk in chunks])


def _odd(looks: Sequence[Look], good: Sequence[int], least_side: int) -> Iterator[Finding]:
    """Small and long images, and those whose bands, depth or size are not what nearly all have."""
    for number in good:
        height, width = looks[number].size
        if min(height, width) < least_side:
            yield Finding("odd size", (looks[number].path,), f"{height}×{width} pixels, a side below {least_side}")
        elif max(height, width) > 4 * min(height, width):
            yield Finding("odd size", (looks[number].path,), f"{height}×{width} pixels, more than four times as long")
    kinds = ("size", "bands", "depth"), (0.9, 0.5, 0.5)
    for name, share in zip(*kinds, strict=True):
        values = [_value(looks[number], name) for number in good]
        usual, count = Counter(values).most_common(1)[0] if values else ("", 0)
        if share * len(values) <= count < len(values):
            for number, value in zip(good, values, strict=True):
                if value != usual:
                    kind = "odd size" if name == "size" else f"other {name}"
                    yield Finding(kind, (looks[number].path,), f"{value}, where {count} have {usual}")


def _value(one: Look, name: str) -> str:
    if name == "size":
        return f"{one.size[0]}×{one.size[1]} pixels"
    return f"{one.bands} band(s)" if name == "bands" else "more than 8 bits" if one.deep else "8 bits"


def pairs_to_show(found: Sequence[Finding], most: int) -> list[tuple[Finding, Path, Path]]:
    """Pairs of files that are alike, those of different parts first, one of each group before a second."""
    alike = [one for one in found if len(one.files) > 1]
    alike.sort(key=lambda one: " and " not in one.what)
    shown = [(one, *pair) for one in alike for pair in list(combinations(one.files, 2))[:1]]
    return shown[:most]
