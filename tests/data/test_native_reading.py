"""Files of more than 8 bits, read with all of them: against the arrays that were written, tifffile and rasterio."""

import io
import lzma
import resource
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
import rasterio
import tifffile
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

from convnextv2.data.decoding import UnreadableImageError, Wanted
from convnextv2.data.images import load_image, why_unusable
from convnextv2.data.native import is_deep, settled

NATIVE = Wanted(pixels="native")
LEVELS = 4096


def twelve_bits(bands: int, side: int = 96) -> np.ndarray:
    """``[side, side, bands]`` uint16 in which every band has each of the 4,096 levels."""
    rng = np.random.default_rng(bands)
    return np.stack([rng.permutation(side * side).reshape(side, side) % LEVELS for _ in range(bands)], -1).astype("u2")


def write_dicom(path: Path, values: np.ndarray, **more: object) -> None:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = SecondaryCaptureImageStorage, ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    file = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    file.Rows, file.Columns = values.shape[:2]
    file.SamplesPerPixel = values.shape[2] if values.ndim == 3 else 1
    file.PhotometricInterpretation = "RGB" if values.ndim == 3 else "MONOCHROME2"
    if values.ndim == 3:
        file.PlanarConfiguration = 0
    file.BitsAllocated, file.BitsStored = 8 * values.itemsize, 12 if values.itemsize == 2 else 8
    file.HighBit, file.PixelRepresentation = file.BitsStored - 1, int(values.dtype.kind == "i")
    for name, value in more.items():
        setattr(file, name, value)
    file.PixelData = values.tobytes()
    file.save_as(path, enforce_file_format=True)


def write_png(path: Path, values: np.ndarray) -> None:
    """16 bits a value, gray or RGB, without any library's opinion on that."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, bands = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 3: 2, 4: 6}[bands], 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


def write(kind: str, path: Path, values: np.ndarray) -> Path:
    path = path.with_suffix(f".{kind}")
    if kind == "png":
        write_png(path, values)
    elif kind == "tif":
        tifffile.imwrite(path, values, photometric="minisblack", planarconfig="contig" if values.shape[2] > 1 else None)
    elif kind == "npy":
        np.save(path, values)
    elif kind == "npz":
        np.savez_compressed(path, image=np.moveaxis(values, -1, 0))
    else:
        write_dicom(path, values[..., 0])
    return path


FORMATS = [("png", (1, 3)), ("tif", (1, 3, 4, 12)), ("npy", (1, 3, 4, 12)), ("npz", (1, 3, 4, 12)), ("dcm", (1,))]


@pytest.mark.parametrize("kind, bands", [(kind, bands) for kind, all_bands in FORMATS for bands in all_bands])
def test_all_levels_are_read(kind, bands, tmp_path):
    values = twelve_bits(bands)
    path = write(kind, tmp_path / "image", values)
    found = load_image(path, bands, NATIVE)
    assert found.values.dtype == np.uint16 and found.valid is None
    np.testing.assert_array_equal(found.values, values)
    assert all(len(np.unique(found.values[..., band])) == LEVELS for band in range(bands))
    assert is_deep(path) and why_unusable(path, bands, True, NATIVE) is None
    assert settled(Wanted(), [path]).native


@pytest.mark.parametrize("bands", [3, 4])
def test_colour_in_planes_is_deep_too(bands, tmp_path):
    path, values = tmp_path / "planes.tif", np.moveaxis(twelve_bits(bands), -1, 0)
    tifffile.imwrite(path, values, photometric="rgb", planarconfig="separate", extrasamples=[0] * (bands - 3))
    assert is_deep(path)
    assert settled(Wanted(), [path]).native
    np.testing.assert_array_equal(load_image(path, bands, NATIVE).values, twelve_bits(bands))


COMPRESSIONS = (None, "lzw", "deflate", "zstd", "packbits", "lzma")


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("dtype, predictor", [("u2", 1), ("u2", 2), ("i2", 2), ("f4", 1), ("f4", 3)])
@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_kinds_of_tiff_are_read_as_tifffile_reads_them(compression, dtype, predictor, tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "image.tif"
    values = rng.normal(0, 900, (50, 70, 5)).astype(dtype) if dtype != "u2" else twelve_bits(5)[:50, :70]
    for planar in ("contig", "separate"):
        for tile in (None, (32, 48)):
            for big in (False, True):
                stored = values if planar == "contig" else np.moveaxis(values, -1, 0)
                predicted = compression not in (None, "packbits")
                how = {"compression": compression, "predictor": predictor if predicted else None, "tile": tile}
                tifffile.imwrite(path, stored, photometric="minisblack", planarconfig=planar, bigtiff=big, **how)
                found = load_image(path, 5, NATIVE)
                assert found.values.dtype == values.dtype and found.valid is None
                np.testing.assert_array_equal(found.values, values)
                np.testing.assert_array_equal(np.moveaxis(found.values, -1, 0), rasterio_read(path))
                chosen = load_image(path, 3, Wanted(pixels="native", bands=(4, 3, 2)))
                np.testing.assert_array_equal(chosen.values, values[..., [3, 2, 1]])


def rasterio_read(path: Path) -> np.ndarray:
    with rasterio.open(path) as image:
        return image.read()


@pytest.mark.parametrize("compression", ["jpeg", "jpeg2000"])
def test_images_in_tiles_are_read_as_tifffile_reads_them(compression, tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "image.tif"
    smooth = np.asarray(Image.fromarray(rng.integers(0, 255, (9, 9, 3), "u1")).resize((96, 64)))
    tifffile.imwrite(path, smooth, photometric="rgb", compression=compression, tile=(32, 32))
    np.testing.assert_array_equal(load_image(path, 3, NATIVE).values, tifffile.imread(path))


def test_pages_are_bands_and_the_first_page_is_the_image(tmp_path):
    path, values = tmp_path / "stack.tif", twelve_bits(5)
    with tifffile.TiffWriter(path) as file:
        for band in range(5):
            file.write(values[..., band], photometric="minisblack", metadata=None)
    np.testing.assert_array_equal(load_image(path, 5, NATIVE).values, values)
    np.testing.assert_array_equal(load_image(path, 1, NATIVE).values, values[..., :1])
    wanted = Wanted(pixels="native", bands=(5, 1))
    np.testing.assert_array_equal(load_image(path, 2, wanted).values, values[..., [4, 0]])
    with pytest.raises(UnreadableImageError, match=r"5 pages of one band.*expected 8; `bands`|has 5 pages"):
        load_image(path, 8, NATIVE)


def write_georeferenced(path: Path, values: np.ndarray, no_data: float | None, **more: object) -> None:
    transform = rasterio.transform.from_origin(500_000, 4_000_000, 10, 10)
    height, width, count = values.shape
    how = {"count": count, "dtype": values.dtype, "nodata": no_data, "crs": "EPSG:32633", "transform": transform}
    with rasterio.open(path, "w", driver="GTiff", height=height, width=width, **how, **more) as image:
        image.write(np.moveaxis(values, -1, 0))


@pytest.mark.parametrize("by", ["rasterio", "tifffile"])
def test_no_data_values_are_a_mask(by, tmp_path, monkeypatch):
    if by == "tifffile":
        find = __import__("importlib.util").util.find_spec
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "rasterio" else find(name))
    values = np.random.default_rng(0).integers(-300, 3000, (40, 50, 6)).astype(np.int16)
    values[5:9, 7:20, 2] = -9999
    path = tmp_path / "scene.tif"
    write_georeferenced(path, values, -9999, interleave="band", compress="zstd")
    found = load_image(path, 6, NATIVE)
    np.testing.assert_array_equal(found.values, values)
    np.testing.assert_array_equal(found.valid, values != -9999)
    assert np.isnan(found.floats()[6, 8, 2]) and not np.isnan(found.floats()[6, 8, 1])
    further = load_image(path, 6, Wanted(pixels="native", no_data=float(values[0, 0, 0])))
    np.testing.assert_array_equal(further.valid, (values != -9999) & (values != values[0, 0, 0]))


def test_nan_and_values_beyond_float32_are_no_data(tmp_path):
    values = np.linspace(-1, 1, 4 * 5 * 2).reshape(4, 5, 2)
    values[1, 2, 0], values[2, 2, 1], values[3, 3, 1] = np.nan, np.inf, 1e300
    np.save(tmp_path / "a.npy", values)
    found = load_image(tmp_path / "a.npy", 2, NATIVE)
    assert found.values.dtype == np.float32
    assert set(zip(*np.nonzero(~found.valid), strict=True)) == {(1, 2, 0), (2, 2, 1), (3, 3, 1)}
    tifffile.imwrite(tmp_path / "a.tif", found.floats(), photometric="minisblack", planarconfig="contig")
    assert (~load_image(tmp_path / "a.tif", 2, NATIVE).valid).sum() == 3


def test_alpha_says_what_is_data(tmp_path):
    values = twelve_bits(4, 64)
    values[:10, :, 3] = 0
    values[10:, :, 3] = 65535
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", extrasamples=["unassalpha"])
    write_png(tmp_path / "a.png", values)
    for name in ("a.tif", "a.png"):
        found = load_image(tmp_path / name, 3, NATIVE)
        np.testing.assert_array_equal(found.values, values[..., :3])
        np.testing.assert_array_equal(found.valid.all(-1), values[..., 3] > 0)


def test_dicom_is_rescaled_inverted_and_padded(tmp_path):
    stored, path = twelve_bits(1, 64)[..., 0].astype(np.int16), tmp_path / "a.dcm"
    stored[:3] = -2000
    write_dicom(
        path, stored, RescaleSlope=2, RescaleIntercept=-1024, PixelPaddingValue=-2000, BitsStored=16, HighBit=15
    )
    found = load_image(path, 1, NATIVE)
    np.testing.assert_array_equal(found.values[3:, :, 0], stored[3:] * 2.0 - 1024)
    np.testing.assert_array_equal(found.valid[..., 0], stored != -2000)

    values = twelve_bits(1, 64)[..., 0]
    write_dicom(path, values, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(load_image(path, 1, NATIVE).values[..., 0], 4095 - values)

    colours = np.random.default_rng(0).integers(0, 255, (20, 30, 3), "u1")
    write_dicom(path, colours)
    np.testing.assert_array_equal(load_image(path, 3, NATIVE).values, colours)


@pytest.mark.parametrize(
    "orientation, undo", [(3, lambda v: v[::-1, ::-1]), (6, np.rot90), (8, lambda v: np.rot90(v, -1))]
)
def test_orientation_is_applied(orientation, undo, tmp_path):
    values = twelve_bits(1)[:20, :33]
    extra = [(274, "H", 1, orientation, True)]
    tifffile.imwrite(tmp_path / "a.tif", undo(values), photometric="minisblack", extratags=extra)
    np.testing.assert_array_equal(load_image(tmp_path / "a.tif", 1, NATIVE).values, values)


def test_a_set_is_native_where_most_files_are(tmp_path):
    deep, plain = write("png", tmp_path / "deep", twelve_bits(1)), tmp_path / "plain.jpg"
    Image.new("RGB", (30, 30)).save(plain)
    (tmp_path / "notes.txt").write_text("no image")
    notes = tmp_path / "notes.txt"
    assert settled(Wanted(), [deep, deep, plain, notes, notes]).pixels == "native"
    assert settled(Wanted(), [deep, plain, plain, notes]).pixels == "photo"
    assert settled(Wanted(bands=(1,)), [plain]).pixels == "native"
    assert settled(Wanted(pixels="photo"), [deep]).pixels == "photo"
    assert load_image(plain, 3, NATIVE).values.dtype == np.uint8


def tiff_header(width: int, height: int, **tags: tuple[int, int, int]) -> bytes:
    """A TIFF of one strip at 8 that claims a size, with more or other tags: (code, type, value)."""
    entries = {256: (4, width), 257: (4, height), 258: (3, 16), 259: (3, 1), 262: (3, 1), 273: (4, 8), 277: (3, 1)}
    entries |= {278: (4, height), 279: (4, 64)}
    entries |= {code: (kind, value) for code, kind, value in tags.values()}
    packed = b"".join(struct.pack("<HHII", code, kind, 1, value) for code, (kind, value) in sorted(entries.items()))
    return b"II*\0" + struct.pack("<I", 72) + b"\0" * 64 + struct.pack("<H", len(entries)) + packed + b"\0" * 4


def zip_of(name: str, data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
    return file.getvalue()


def npy_header(shape: tuple[int, ...], dtype: str = "<u2") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


def bomb(path: Path, compression: str) -> None:
    """A tile of 64×64 values whose stream goes on for 4 GiB."""
    tifffile.imwrite(path, np.zeros((64, 64), "u2"), photometric="minisblack", compression=compression, tile=(64, 64))
    with tifffile.TiffFile(path) as file:
        places = {name: file.pages[0].tags[code].valueoffset for name, code in (("offset", 324), ("count", 325))}
    if compression == "deflate":
        deflate = zlib.compressobj(1)
        first = deflate.compress(bytes(2**24)) + deflate.flush(zlib.Z_FULL_FLUSH)
        again = deflate.compress(bytes(2**24)) + deflate.flush(zlib.Z_FULL_FLUSH)
        stream = first + 255 * again
    elif compression == "zstd":  # one frame: its magic, that it states no size, a window, blocks of one byte repeated
        block = struct.pack("<I", (2**17 << 3) | 2)[:3] + b"\0"
        stream = struct.pack("<IBB", 0xFD2FB528, 0, 0x58) + 2**15 * block + b"\1\0\0"
    else:
        stream = lzma.compress(bytes(2**24)) * 256
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, places["offset"], len(data))
    struct.pack_into("<I", data, places["count"], len(stream))
    path.write_bytes(bytes(data) + stream)


def truncated(path: Path, how: dict[str, object]) -> None:
    tifffile.imwrite(path, twelve_bits(3), photometric="minisblack", planarconfig="contig", **how)
    path.write_bytes(path.read_bytes()[:-20_000])


LARGE_TILES = {"a": (322, 4, 10**6), "b": (323, 4, 10**6), "c": (324, 4, 8), "d": (325, 4, 8)}
HOSTILE = {
    "a trillion pixels": ("tif", tiff_header(10**6, 10**6)),
    "no pixel": ("tif", tiff_header(0, 10)),
    "65535 bands": ("tif", tiff_header(4000, 4000, bands=(277, 3, 65535))),
    "tiles of a trillion": ("tif", tiff_header(16, 16, **LARGE_TILES)),
    "an unknown compression": ("tif", tiff_header(16, 16, a=(259, 3, 4711))),
    "a float of 16 bytes": ("tif", tiff_header(16, 16, a=(258, 3, 128), b=(339, 3, 3))),
    "complex numbers": ("tif", tiff_header(4, 4, a=(258, 3, 64), b=(339, 3, 6), c=(279, 4, 128))),
    "a volume": ("tif", tiff_header(4, 4, a=(32997, 4, 10**9))),
    "data beyond its end": ("tif", tiff_header(4, 4, a=(273, 4, 10**9))),
    "a header cut": ("tif", tiff_header(4, 4)[:100]),
    "nothing but a start": ("tif", b"II*\0"),
    "a list beyond its end": ("tif", b"II*\0" + struct.pack("<I", 10**9)),
    "an empty file": ("tif", b""),
    "an array of a trillion": ("npy", npy_header((10**6, 10**6)) + bytes(100)),
    "an array of bands": ("npy", npy_header((5000, 5000, 1)) + bytes(100)),
    "an array cut": ("npy", npy_header((50, 50)) + bytes(100)),
    "objects": ("npy", npy_header((5, 5), "|O") + bytes(100)),
    "an archived trillion": ("npz", zip_of("a.npy", npy_header((10**6, 10**6)) + bytes(100))),
    "an archived array cut": ("npz", zip_of("a.npy", npy_header((8, 8)))),
    "an archive of notes": ("npz", zip_of("a.txt", b"")),
    "a tile of 4 GiB": ("tif", tiff_header(16, 16, a=(279, 4, 2**32 - 1))),
    "an element of 4 GiB": ("dcm", b"\0" * 128 + b"DICM\2\0\2\0OB\0\0\xf0\xff\xff\xff" + bytes(50)),
    "a DICOM start": ("dcm", b"\0" * 128 + b"DICM"),
    "a DICOM of noise": ("dcm", b"\0" * 128 + b"DICM" + bytes(range(256)) * 4),
}  # fmt: skip


@pytest.fixture
def little_memory():
    """At most 1 GiB more than there is: what takes a claim for real fails."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_one_line(name, tmp_path, little_memory):
    kind, data = HOSTILE[name]
    path = tmp_path / f"image.{kind}"
    path.write_bytes(data)
    reason = why_unusable(path, 1, True, NATIVE)
    assert reason and "\n" not in reason and len(reason) < 300
    assert "memory" not in reason.lower() and "allocate" not in reason.lower(), reason


@pytest.mark.parametrize("compression", ["deflate", "zstd", "lzma"])
def test_a_stream_that_goes_on_takes_no_memory(compression, tmp_path, little_memory):
    bomb(tmp_path / "a.tif", compression)
    reason = why_unusable(tmp_path / "a.tif", 1, True, NATIVE)
    assert reason is None or "memory" not in reason.lower()


@pytest.mark.parametrize("how", [{}, {"tile": (32, 32)}, {"compression": "deflate"}, {"compression": "zstd"},
                                 {"compression": "lzw", "tile": (32, 32)}], ids=str)  # fmt: skip
def test_truncated_files_are_refused(how, tmp_path):
    truncated(tmp_path / "a.tif", how)
    assert why_unusable(tmp_path / "a.tif", 3, True, NATIVE)


def test_a_tile_that_states_another_size_is_refused(tmp_path, little_memory):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((32, 32), "u1"), photometric="minisblack", compression="jpeg", tile=(32, 32))
    data = path.read_bytes()
    head = data.index(b"\xff\xc0")
    path.write_bytes(data[: head + 5] + struct.pack(">HH", 65000, 65000) + data[head + 9 :])
    assert "states 65000×65000" in str(why_unusable(path, 1, True, NATIVE))


SHIPPED = Path(pydicom.__file__).parent / "data" / "test_files"
"""Files of scanners and of other programs that come with pydicom."""


@pytest.mark.parametrize("kind", ["RLE", "bigendian", "expb", "implicit", "jp2klossless", "jpeg_ls_lossless", "padded"])
def test_dicom_of_other_programs_is_the_same_in_every_encoding(kind):
    plain = pydicom.dcmread(SHIPPED / "MR_small.dcm").pixel_array
    assert len(np.unique(plain)) > 500
    np.testing.assert_array_equal(load_image(SHIPPED / "MR_small.dcm", 1, NATIVE).values[..., 0], plain)
    np.testing.assert_array_equal(load_image(SHIPPED / f"MR_small_{kind}.dcm", 1, NATIVE).values[..., 0], plain)


def test_dicom_of_other_programs_is_in_its_units_and_colours():
    scan = pydicom.dcmread(SHIPPED / "CT_small.dcm")
    found = load_image(SHIPPED / "CT_small.dcm", 1, NATIVE).values[..., 0]
    np.testing.assert_array_equal(found, scan.pixel_array * float(scan.RescaleSlope) + float(scan.RescaleIntercept))
    plain = load_image(SHIPPED / "SC_rgb_rle.dcm", 3, NATIVE).values
    np.testing.assert_array_equal(load_image(SHIPPED / "SC_rgb_jpeg_gdcm.dcm", 3, NATIVE).values, plain)
    assert load_image(SHIPPED / "JPGExtended.dcm", 1, NATIVE).shape == (1024, 256, 1)
    assert "less than expected" in str(why_unusable(SHIPPED / "MR_truncated.dcm", 1, True, NATIVE))
    assert "is deflated as a whole" in str(why_unusable(SHIPPED / "image_dfl.dcm", 1, True, NATIVE))


def test_a_deflated_dicom_is_refused(tmp_path, little_memory):
    meta = b"\2\0\x10\0UI" + struct.pack("<H", 22) + b"1.2.840.10008.1.2.1.99"
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    first = deflate.compress(bytes(2**24)) + deflate.flush(zlib.Z_FULL_FLUSH)
    again = deflate.compress(bytes(2**24)) + deflate.flush(zlib.Z_FULL_FLUSH)
    (tmp_path / "a.dcm").write_bytes(b"\0" * 128 + b"DICM" + meta + first + 255 * again)
    assert "is deflated as a whole" in str(why_unusable(tmp_path / "a.dcm", 1, True, NATIVE))


def test_a_damaged_png_is_refused(tmp_path):
    path = write("png", tmp_path / "a", twelve_bits(3))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert "damaged: a checksum of b'IDAT' is wrong" in str(why_unusable(path, 3, True, NATIVE))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damage_anywhere_is_told_or_harmless(tmp_path, little_memory):
    rng, seeds = np.random.default_rng(0), []
    values = twelve_bits(3)[:40, :50]
    for number, compression in enumerate((None, "lzw", "deflate", "zstd")):
        path = tmp_path / f"{number}.tif"
        tifffile.imwrite(path, values, photometric="minisblack", planarconfig="contig", compression=compression)
        seeds.append(path)
    seeds += [write(kind, tmp_path / "seed", values) for kind in ("png", "npy", "npz", "dcm")]
    for number in range(240):
        data = bytearray(seeds[number % len(seeds)].read_bytes())
        for place in rng.integers(0, min(len(data), 400), 3):
            data[place] = rng.choice([0, 1, 255, 128])
        path = tmp_path / f"damaged{seeds[number % len(seeds)].suffix}"
        path.write_bytes(data[: rng.integers(100, 10**6)])
        channels = 1 if path.suffix == ".dcm" else 3
        reason = why_unusable(path, channels, True, NATIVE)
        assert reason is None or ("\n" not in reason and "MemoryError" not in reason), (number, reason)
        assert is_deep(path) in (True, False, None)


@pytest.mark.parametrize("missing, kind", [("tifffile", "tif"), ("pydicom", "dcm"), ("imagecodecs", "png")])
def test_what_is_missing_is_named(missing, kind, tmp_path, monkeypatch):
    path = write(kind, tmp_path / "a", twelve_bits(3 if kind == "png" else 1))
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else find(name))
    reason = why_unusable(path, 3 if kind == "png" else 1, True, NATIVE)
    assert f"needs {missing}: pip install 'sparse-fcmae[science]'" in reason


WRONG = (
    {"bands": (0,)},
    {"bands": ()},
    {"pixels": "deep"},
    {"crop": "all"},
    {"value_range": (2.0, 1.0)},
    {"pixels": "photo", "bands": (1,)},
)


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_wrong_wishes_are_refused(wrong):
    with pytest.raises(ValueError, match="`"):
        Wanted(**wrong)
