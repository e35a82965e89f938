"""DICOM files: stored values rescaled to their units, inverted where low is shown bright, padding left out."""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from convnextv2.data.decoding import USUAL, UnreadableImageError, Wanted, reasons
from convnextv2.data.encoded import Stored
from convnextv2.data.rasters import Raster, chosen_bands, raster_of
from convnextv2.data.tiff import jpeg_size, need

COLOURS = {"MONOCHROME1": 1, "MONOCHROME2": 1, "RGB": 3, "PALETTE COLOR": 3, "YBR_FULL": 3, "YBR_FULL_422": 3,
           "YBR_ICT": 3, "YBR_RCT": 3}  # fmt: skip
"""Bands by photometric interpretation."""
DEFLATED = b"1.2.840.10008.1.2.1.99"
CODECS = {
    "1.2.840.10008.1.2.4.51": "jpeg8_decode",  # 12 bits
    "1.2.840.10008.1.2.4.57": "jpeg8_decode",  # lossless
    "1.2.840.10008.1.2.4.70": "jpeg8_decode",
    "1.2.840.10008.1.2.4.80": "jpegls_decode",
    "1.2.840.10008.1.2.4.81": "jpegls_decode",
}
"""Decoders of imagecodecs, by transfer syntax: of those that pydicom needs other libraries for."""
LONG = (b"OB", b"OW", b"OF", b"OD", b"OL", b"OV", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
"""Types of elements whose length has four bytes."""


class Within(io.FileIO):
    """A file of which nothing beyond its end is asked for: a length that it claims takes no memory."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._length = path.stat().st_size

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(0, self._length - self.tell())
        return super().read(left if size is None or size < 0 else min(size, left)) or b""


def is_dicom(start: bytes) -> bool:
    """Whether a file that begins so is a DICOM file."""
    return start[128:132] == b"DICM"


def dicom_bands(path: Stored) -> int:
    """Bands by its photometric interpretation."""
    with reasons("not a readable DICOM file: ", path):
        return COLOURS[str(_header(path, None, USUAL, pixels=False).PhotometricInterpretation)]


def dicom_pixels(path: Stored, in_chans: int, wanted: Wanted) -> int:
    """Rows × columns by the header; UnreadableImageError if the file cannot be what is wanted."""
    with reasons("not a readable DICOM file: ", path):
        found = _header(path, in_chans, wanted, pixels=False)
        return int(found.Rows) * int(found.Columns)


def load_dicom(path: Stored, in_chans: int, wanted: Wanted) -> Raster:
    """The first frame, in the units that its rescale slope and intercept, or its modality table, give it.

    MONOCHROME1, in which low values are bright, is inverted within the range of its stored bits, so that bright is high
    in every file; the padding value is no data; palettes become RGB, and YBR does.
    """
    with reasons("not a readable DICOM file: ", path), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = _header(path, in_chans, wanted, pixels=True)
        from pydicom.pixels import apply_color_lut, apply_modality_lut

        kind = str(found.PhotometricInterpretation)
        stored = _stored(found)
        valid = _not_padding(stored, found) if COLOURS[kind] == 1 else None
        values: Any = stored
        if kind == "PALETTE COLOR":
            values = apply_color_lut(stored, found)
        if kind == "MONOCHROME1":
            low, high = (-(1 << found.BitsStored - 1), (1 << found.BitsStored - 1) - 1)
            low, high = (low, high) if found.PixelRepresentation else (0, (1 << found.BitsStored) - 1)
            values = (high + low - stored.astype(np.int64)).astype(stored.dtype)
        if COLOURS[kind] == 1:
            values = apply_modality_lut(values, found)
        values = values.reshape(*values.shape[:2], -1)
        chosen = chosen_bands(values.shape[2], in_chans, wanted)
        return raster_of(values[..., chosen], in_chans, wanted, valid=None if valid is None else valid[..., None])


def _stored(found: Any) -> Any:
    """Values of the first frame, ``[H, W]`` or ``[H, W, 3]``: by pydicom, or by imagecodecs where it has no decoder."""
    from pydicom.encaps import get_frame
    from pydicom.pixels import pixel_array

    codec = CODECS.get(str(found.file_meta.TransferSyntaxUID))
    if codec is None:
        return pixel_array(found, index=0)
    frame = get_frame(found.PixelData, 0, number_of_frames=int(found.get("NumberOfFrames") or 1))
    if (size := jpeg_size(frame)) != (found.Columns, found.Rows):
        raise UnreadableImageError(f"its frame states a size of {size}, its header of {(found.Columns, found.Rows)}")
    values = getattr(need("imagecodecs", "this compression of DICOM"), codec)(frame)
    if found.get("PixelRepresentation"):
        wide = values.astype(np.int64) & ((1 << found.BitsStored) - 1)
        values = np.where(wide >> (found.BitsStored - 1), wide - (1 << found.BitsStored), wide).astype(np.int16)
    return values


def _header(path: Stored, in_chans: int | None, wanted: Wanted, pixels: bool) -> Any:
    pydicom = need("pydicom", "DICOM")
    with Within(path) if isinstance(path, Path) else path.open() as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if _transfer_syntax(file) == DEFLATED:
            raise UnreadableImageError("is deflated as a whole, to a size that it does not say; write it uncompressed")
        file.seek(0)
        found = pydicom.dcmread(file, stop_before_pixels=not pixels)
    for name in ("Rows", "Columns", "PhotometricInterpretation", "BitsStored"):
        if found.get(name) in (None, ""):
            raise UnreadableImageError(f"has no {name}: is no image")
    kind = str(found.PhotometricInterpretation)
    if kind not in COLOURS:
        raise UnreadableImageError(f"its photometric interpretation, {kind:.40}, is not read")
    if in_chans is not None:
        chosen_bands(COLOURS[kind], in_chans, wanted)
    wanted.check_values(int(found.Columns), int(found.Rows), COLOURS[kind])
    return found


def _transfer_syntax(file: io.RawIOBase | io.BufferedIOBase) -> bytes:
    """How the data set is encoded, by the file's meta information, whose elements tell their types."""
    file.seek(132)
    while len(head := file.read(8)) == 8:
        group, element, kind, length = struct.unpack("<HH2sH", head)
        if group != 2:
            break
        if not kind.isalpha():
            raise UnreadableImageError("its meta information is not as the standard has it")
        if kind in LONG:
            (length,) = struct.unpack("<I", file.read(4))
        if element == 0x10:
            return file.read(length).rstrip(b"\0 ")
        file.seek(length, io.SEEK_CUR)
    raise UnreadableImageError("does not say how it is encoded")


def _not_padding(stored: Any, found: Any) -> Any:
    """Where stored values are no padding; None where none is declared."""
    value = found.get("PixelPaddingValue")
    if value is None:
        return None
    limit = found.get("PixelPaddingRangeLimit", value)
    low, high = sorted((int(value), int(limit)))
    return ~((stored >= low) & (stored <= high))
