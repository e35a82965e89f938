"""Checkpoints: good ones of every kind that is read, changed; and structures that are none."""

from __future__ import annotations

import argparse
import functools
import io
import json
import pickle
import pickletools
import random
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz_scripts
import hypothesis
import numpy as np
import safetensors.torch
import torch
from fuzz_bytes import JSON, NUMBERS, TEXTS, changed, changed_json, splice
from fuzz_harness import BrokenError, Case, one_line
from hypothesis import strategies as st
from torch import Tensor

from convnextv2 import EncoderConfig, create_fcmae
from convnextv2.data.transforms import preprocessing_from_metadata
from convnextv2.evaluation.prediction import load_classifier
from convnextv2.models.classifier import ConvNeXtV2
from convnextv2.models.config import ClassifierConfig, FCMAEConfig, config_to_dict
from convnextv2.models.encoder import Encoder
from convnextv2.models.fcmae import FCMAE
from convnextv2.training.finetuning import FinetuneOptions, resolve
from convnextv2.weights.checkpoint import Checkpoint, Config, load_checkpoint
from convnextv2.weights.layout import Layout
from convnextv2.weights.layouts import LAYOUTS
from convnextv2.weights.loading import complete_model, init_classifier, init_fcmae, load_model
from convnextv2.weights.reading import DTYPES, Weights, read_checkpoint, read_weights, weights_config

SMALL = EncoderConfig((1, 1, 1, 1), (2, 2, 3, 3), in_chans=1, patch_size=8, kernel_size=3)
USUAL = EncoderConfig((1, 2, 1, 1), (2, 2, 2, 3))
METADATA = {"mean": [0.5], "std": [0.25], "img_size": [16, 16], "epoch": 3}
SPARSE = LAYOUTS["sparse-official"]


def _fcmae(config: EncoderConfig = SMALL) -> FCMAE:
    torch.manual_seed(0)
    return create_fcmae(config, img_size=2 * config.patch_size, decoder_dim=2)


def _classifier() -> ConvNeXtV2:
    torch.manual_seed(0)
    return ConvNeXtV2(ClassifierConfig(SMALL, 2, class_names=("a", "b")))


def _in(layout: Layout, weights: Weights) -> dict[str, Tensor]:
    """All of the weights in the layout's names."""
    return {layout.name_of(name): layout.write(name, tensor, weights.config) for name, tensor in weights}


def contents() -> dict[str, Any]:
    """Structures that are checkpoints, for torch's formats."""
    fcmae, classifier, usual = _fcmae(), _classifier(), _fcmae(USUAL)
    ours = {"model": dict(fcmae.state_dict()), "config": config_to_dict(fcmae.config), "metadata": dict(METADATA)}
    own_classifier = {"model": dict(classifier.state_dict()), "config": config_to_dict(classifier.config)}
    own_classifier["metadata"] = dict(METADATA)
    whole, head = read_weights(usual.state_dict()), read_weights(classifier.state_dict())
    state, half = classifier.state_dict(), {name: value.half() for name, value in classifier.state_dict().items()}
    official = {"model": _in(SPARSE, whole), "optimizer": {"state": {0: {"step": 1.0}}, "param_groups": [{"lr": 0.1}]}}
    official |= {"epoch": 7, "scaler": {}, "args": argparse.Namespace(model="x", lr=0.1, dist=False, betas=(0.9, 0.95))}
    ema = {"model": {f"module.{name}": value for name, value in state.items()}, "model_ema": OrderedDict(state)}
    return {
        "fcmae": ours,
        "classifier": own_classifier,
        "sparse": official,
        "dense": {"model": OrderedDict(half)},
        "timm": _in(LAYOUTS["timm"], head),
        "transformers": _in(LAYOUTS["transformers"], head),
        "ema": {**ema, "state_dict": {"n_averaged": torch.tensor(3)}},
        "compiled": {"state_dict": {f"_orig_mod.{name}": value.bfloat16() for name, value in state.items()}},
        "parameters": {name: torch.nn.Parameter(value) for name, value in state.items()},
    }


def saved(content: Any, old: bool = False) -> bytes:
    """As torch writes it."""
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not old)
    return file.getvalue()


def files() -> dict[str, bytes]:
    """Good files by a name that ends in their suffix."""
    found = {}
    for name, content in contents().items():
        found[f"{name}.pth"] = saved(content)
        if name in ("fcmae", "sparse", "ema", "timm", "parameters"):
            found[f"{name}-old.pt"] = saved(content, old=True)
        if name in ("fcmae", "classifier"):
            header = {key: json.dumps(content[key]) for key in ("config", "metadata")}
            found[f"{name}.safetensors"] = safetensors.torch.save(content["model"], {"format": "pt", **header})
        if name in ("timm", "transformers"):
            found[f"{name}.safetensors"] = safetensors.torch.save(content, {"format": "pt"})
    return found


def changed_safetensors(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """The header edited as JSON, what it holds of ours as well."""
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    about = header.get("__metadata__", {})
    key = rng.choice([*(set(about) & {"config", "metadata"}), "", ""])
    if key:
        about[key] = json.dumps(changed_json(rng, json.loads(about[key])))
        if rng.random() < 0.1:
            about[key] = changed(rng, about[key].encode())[0].decode(errors="replace")
    else:
        header = changed_json(rng, header)
    text = json.dumps(header, ensure_ascii=rng.random() < 0.8).encode(errors="surrogatepass")
    size = len(text) if rng.random() < 0.95 else rng.choice(NUMBERS) % 2**64
    return struct.pack("<Q", size) + text + data[8 + length :], f"header {key}"


GLOBALS = (
    "collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor", "torch FloatStorage",
    "torch LongStorage", "torch float32", "torch Size", "torch device", "torch strided", "builtins set",
    "argparse Namespace", "_codecs encode", "torch.nn.parameter Parameter", "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_sparse_tensor", "torch._utils _rebuild_qtensor", "torch._utils _rebuild_nested_tensor",
    "torch._utils _rebuild_meta_tensor_no_storage", "torch.serialization _get_layout", "collections Counter",
    "collections defaultdict", "os system", "builtins eval", "__builtin__ bytearray", "torch.storage UntypedStorage",
    "torch.storage TypedStorage", "torch Tensor", "torch per_tensor_affine", "torch load", "torch quint8", "complex x",
    "builtins complex", "builtins getattr", "torch._utils _rebuild_wrapper_subclass",
    "torch._tensor _rebuild_from_type_v2",
)  # fmt: skip
PLAIN_OPS = tuple(b"(012})]N\x88\x89RQtsuea\x81\x85\x86\x87b.o\x93\x94\x8f\x90\x91\x92\x98\x97")


def _new_op(rng: random.Random) -> bytes:
    kind = rng.randrange(8)
    if kind == 0:
        module, name = rng.choice(GLOBALS).split(" ")
        return f"c{module}\n{name}\n".encode()
    if kind == 1:
        return b"X" + struct.pack("<I", len(text := rng.choice(TEXTS).encode(errors="surrogatepass"))) + text
    if kind == 2:
        return rng.choice((b"h", b"q", b"K", b"\x82", b"\x80")) + rng.randbytes(1)
    if kind == 3:
        return b"J" + struct.pack("<I", rng.choice(NUMBERS) % 2**32)
    if kind == 4:
        number = rng.choice(NUMBERS).to_bytes(9, "little", signed=True)
        return b"\x8a\x09" + number
    if kind == 5:
        return rng.choice(
            (b"B\x04\0\0\0abcd", b"\x96\x04" + bytes(7) + b"abcd", b"G" + struct.pack(">d", np.inf), b"P0\n")
        )
    return bytes([rng.choice(PLAIN_OPS)])


def ops_of(data: bytes) -> list[bytes]:
    """The bytes of each opcode of a pickle, which must be whole."""
    places = [place for _, _, place in pickletools.genops(data)]
    return [data[place:end] for place, end in zip(places, [*places[1:], len(data)], strict=True)]  # type: ignore[misc]


def changed_pickle(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """A pickle with opcodes removed, doubled, swapped, replaced, or taken from another."""
    ops = ops_of(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        place, kind, other = rng.randrange(len(ops)), rng.randrange(8), rng.randrange(len(ops))
        if kind == 0:
            del ops[place : place + rng.choice((1, 1, 2, 10))]
        elif kind == 1:
            ops[place:place] = ops[other : other + rng.choice((1, 1, 2, 10))]
        elif kind == 2:
            ops[place], ops[other] = ops[other], ops[place]
        elif kind == 3:
            ops.insert(place, _new_op(rng))
        elif kind == 4 and others:
            more = ops_of(rng.choice(others))
            start = rng.randrange(len(more))
            ops[place:place] = more[start : start + rng.choice((1, 5, 30))]
        elif ops[place][:1] in b"KMJX\x8a" and rng.random() < 0.8:  # another number or text, so that the rest stays
            ops[place] = _argument(rng, ops[place])
        else:
            ops[place] = _new_op(rng)
        if not ops:
            return b""
    return b"".join(ops)


def _argument(rng: random.Random, op: bytes) -> bytes:
    if op[:1] == b"X":
        text = rng.choice((*TEXTS, "cpu", "meta", "cuda:0", "0", "1", "99"))
        return b"X" + struct.pack("<I", len(encoded := text.encode(errors="surrogatepass"))) + encoded
    return b"\x8a\x09" + rng.choice(NUMBERS).to_bytes(9, "little", signed=True)


def changed_zip(rng: random.Random, data: bytes, others: list[bytes]) -> tuple[bytes, str]:
    """An archive whose pickle, or list of entries, is another."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    places = {name.rpartition("/")[2]: place for place, (name, _) in enumerate(entries)}
    kind = rng.randrange(10)
    if kind < 6:
        place = places["data.pkl"]
        pickles = [_pickle_of(other) for other in others]
        entries[place] = entries[place][0], changed_pickle(rng, entries[place][1], pickles)
        what = "pickle"
    else:
        place, other = rng.randrange(len(entries)), rng.randrange(len(entries))
        name, content = entries[place]
        what = ("rename", "remove", "double", "content")[kind - 6]
        if kind == 6:
            new = rng.choice(
                (entries[other][0], f"archive/{rng.choice(TEXTS)}", name.replace("data/", "data/0"), "../x")
            )
            entries[place] = new.replace("\ud800", ""), content
        elif kind == 7:
            del entries[place]
        elif kind == 8:
            entries.insert(other, (name, entries[other][1]))
        else:
            place = rng.choice([place, *(places[key] for key in ("version", "byteorder") if key in places)])
            entries[place] = entries[place][0], changed(rng, entries[place][1] + b"\n")[0]
    file = io.BytesIO()
    packed = zipfile.ZIP_DEFLATED if rng.random() < 0.03 else zipfile.ZIP_STORED
    with zipfile.ZipFile(file, "w", packed) as archive:
        for name, content in entries:
            archive.writestr(zipfile.ZipInfo(name), content)
    return file.getvalue(), what


def _pickle_of(data: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def changed_old(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """The old format: one of its five pickles edited."""
    stream, parts = io.BytesIO(data), []
    for _ in range(5):
        start = stream.tell()
        for _ in pickletools.genops(stream):
            pass
        parts.append(data[start : stream.tell()])
    rest, place = data[stream.tell() :], rng.choice((0, 1, 2, 3, 3, 3, 3, 4, 4))
    parts[place] = changed_pickle(rng, parts[place], parts[3:])
    return b"".join(parts) + rest, f"pickle {place}"


DTYPE = (*DTYPES, torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint16)


def _odd_tensor(numbers: list[int]) -> Tensor:
    """A tensor of an odd kind from four numbers."""
    kind, dtype, rank, side = numbers[0], numbers[1], numbers[2], numbers[3] % 5
    shape = [(side + axis) % 5 for axis in range(rank % 6)]
    plain = torch.ones(shape).to(DTYPE[dtype % len(DTYPE)])
    makers: tuple[Callable[[], Tensor], ...] = (
        lambda: plain,
        lambda: plain.to("meta"),
        lambda: torch.full(shape, float("nan")),
        lambda: torch.full(shape, 3e38, dtype=torch.float64) * 10,
        lambda: torch.ones(1).expand(1000, 1000 + side),
        lambda: torch.ones(shape).to_sparse(),
        lambda: torch.ones(3, 4).to_sparse_csr(),
        lambda: torch.quantize_per_tensor(torch.ones(shape), 0.1, 0, torch.qint8),
        lambda: torch.arange(64.0).as_strided(shape, [side] * len(shape)),
        lambda: torch.ones(shape).t() if len(shape) == 2 else torch.ones(2, 3, 4).permute(2, 0, 1),
        lambda: torch.nn.Parameter(torch.ones(shape)),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(side + 1)]),
        lambda: torch.view_as_complex(torch.ones(*shape, 2)).conj(),
        lambda: torch.ones(shape)[..., :0] if shape else torch.ones(0),
    )
    return makers[kind % len(makers)]()


TENSORS = st.lists(st.integers(0, 1000), min_size=4, max_size=4).map(_odd_tensor)
ATOMS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.binary(max_size=8), TENSORS, TENSORS,
    st.sampled_from(JSON), st.sampled_from(TEXTS), st.complex_numbers(), st.just(torch.float32),
    st.sampled_from([argparse.Namespace(a=1), {1, 2}, OrderedDict(a=1), torch.device("cpu"), torch.strided]),
    st.just(torch.Size([1])),
)  # fmt: skip
KEYS = st.one_of(
    st.text(max_size=6), st.integers(), st.none(), st.binary(max_size=3), st.tuples(st.integers(), st.text(max_size=2)),
    st.booleans(), st.floats(), st.sampled_from((*TEXTS, "model", "model_ema", "state_dict", "config", "metadata")),
    st.sampled_from(("mean", "std", "img_size", "kind", "mask_token", "head.weight", "norm.weight", "stages.0.0.x")),
)  # fmt: skip
ANYTHING = st.recursive(ATOMS, lambda inner: st.dictionaries(KEYS, inner, max_size=4) | st.lists(inner, max_size=4))


@st.composite
def nearly(draw: Callable[[Any], Any], bases: dict[str, Any]) -> tuple[Any, str]:
    """One of ``bases`` with a few nodes replaced, removed, renamed or added."""
    name = draw(st.sampled_from(sorted(bases)))
    content = bases[name]
    for _ in range(draw(st.integers(1, 3))):
        content = _edited(draw, content)
    return content, name


def _edited(draw: Callable[[Any], Any], node: Any) -> Any:
    if not isinstance(node, dict) or not node:
        return draw(ANYTHING)
    result = type(node)(node)
    key = draw(st.sampled_from(list(result)))
    action = draw(st.integers(0, 9))
    if action < 5:
        result[key] = _edited(draw, result[key])
    elif action < 7:
        result[key] = draw(ANYTHING)
    elif action == 7:
        del result[key]
    elif action == 8:
        result[draw(KEYS)] = result.pop(key)
    else:
        result[draw(KEYS)] = draw(ANYTHING)
    return result


@functools.cache
def _good() -> tuple[dict[str, bytes], dict[str, Any]]:
    return files(), contents()


def _finetuning(checkpoint: Checkpoint) -> EncoderConfig:
    """The network that a fine-tuning from the checkpoint would build."""
    options = FinetuneOptions(init=checkpoint.path, model=None, img_size=None, patch_size=None, in_chans=None)
    return resolve(options)[0].encoder()


class Checkpoints:
    """Every way in for a checkpoint: a result of the shapes of its configuration, or a line that names the file."""

    name = "checkpoints"
    seconds = 2.0
    megabytes = 300

    def prepare(self) -> None:
        _good()
        self.scripts = fuzz_scripts.load()
        import timm.models  # noqa: F401  # what verification imports

    def produce(self, seed: int, count: int, sink: Callable[[Case], None]) -> None:
        rng = random.Random(f"checkpoints {seed}")
        good, bases = _good()
        if seed == 0:
            for name, data in good.items():
                sink(Case(Path(name).suffix, data, f"good {name}"))
        for _ in range(count * 3 // 4):
            sink(self._mutant(rng, good))

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=count // 4,
            database=None,
            deadline=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(nearly(bases) | st.tuples(ANYTHING, st.just("drawn")), st.booleans())
        def draw(drawn: tuple[Any, str], old: bool) -> None:
            content, name = drawn
            try:
                data = saved(content, old)
            except (RuntimeError, TypeError, pickle.PicklingError, NotImplementedError, AttributeError, UnicodeError):
                return  # torch does not write such tensors
            sink(Case(".pth", data, f"drawn from {name}"))

        draw()

    def _mutant(self, rng: random.Random, good: dict[str, bytes]) -> Case:
        name = rng.choice(list(good))
        data, what = good[name], ""
        suffix = Path(name).suffix
        kind = rng.random()
        alike = [other for key, other in good.items() if Path(key).suffix == suffix]
        if kind < 0.35:
            data, what = changed(rng, data, list(good.values()))
        elif suffix == ".safetensors":
            data, what = changed_safetensors(rng, data)
        elif suffix == ".pth":
            data, what = changed_zip(rng, data, alike)
        else:
            data, what = changed_old(rng, data)
        if kind > 0.95:
            data, what = (
                (changed(rng, data)[0], f"{what}, bytes")
                if rng.random() < 0.5
                else (splice(rng, data, rng.choice(alike)), what)
            )
        return Case(rng.choice((suffix, suffix, suffix, ".pth", ".safetensors")), data, f"{name}: {what}")

    def check(self, path: Path) -> str:
        status, _, err = fuzz_scripts.run(self.scripts["summary"].main, "summary", path)
        summed = fuzz_scripts.ended_well(status, err)
        try:
            checkpoint = load_checkpoint(path)
        except (ValueError, OSError) as error:
            told(error, path)
            if summed:
                raise BrokenError("summary took what load_checkpoint refuses") from error
            with refusal(path):
                load_model(path)
            return "refused"
        json.dumps(checkpoint.metadata)
        for channels in (1, 3):
            try:
                preprocessing_from_metadata(checkpoint.metadata, channels)
            except ValueError as error:  # noqa: PERF203  # two numbers
                one_line(str(error))
        try:
            weights = read_checkpoint(checkpoint)
        except (ValueError, OSError) as error:
            told(error, path)
            functions = complete_model, lambda given: init_classifier(_classifier(), given), _finetuning
            for function in functions:
                with refusal(path):
                    function(checkpoint)
            return "refused"
        self._sound(weights, weights_config(weights))
        classifier = ConvNeXtV2(ClassifierConfig(weights.config, 2))
        init_classifier(classifier, checkpoint)
        side = 2 * weights.config.patch_size
        autoencoder = FCMAE(FCMAEConfig(weights.config, (side, side), decoder_dim=2))
        init_fcmae(autoencoder, checkpoint)
        finite(classifier, autoencoder)
        if weights.config not in (SMALL, USUAL):
            with refusal(path):
                init_classifier(_classifier(), checkpoint)
        try:
            _finetuning(checkpoint)
        except (ValueError, OSError) as error:
            told(error, path)
        try:
            finite(complete_model(checkpoint))
        except (ValueError, OSError) as error:
            told(error, path)
        try:
            finite(load_classifier(path).model)
        except (ValueError, OSError) as error:
            told(error) if str(error).startswith("image size") else told(error, path)
        self._convert(path)
        return "accepted"

    def _sound(self, weights: Weights, config: Config) -> None:
        network = {EncoderConfig: Encoder, FCMAEConfig: FCMAE, ClassifierConfig: ConvNeXtV2}[type(config)]
        with torch.device("meta"):
            expected = {
                name.removeprefix("encoder."): value.shape for name, value in network(config).state_dict().items()
            }
        found = {name: tensor.shape for name, tensor in weights if weights.decoder == {} or name not in weights.head}
        missing = {name for name in expected if name not in found}
        if {**expected, **found} != expected or not missing <= {"head.weight", "head.bias"}:
            raise BrokenError(f"of other names and shapes than {config}: {found}")
        for name, tensor in weights:
            if tensor.dtype not in DTYPES or not torch.isfinite(tensor).all():
                raise BrokenError(f"{name} is {tensor}")

    def _convert(self, path: Path) -> None:
        main = self.scripts["convert_sparse_to_dense"].main
        to = ("official-dense", "timm", "sparse-official")[path.stat().st_size % 3]
        output = path.parent / "out" / "converted.safetensors"
        output.parent.mkdir()
        status, _, err = fuzz_scripts.run(main, "convert", path, output, "--to", to)
        if fuzz_scripts.ended_well(status, err, str(path)):
            read_checkpoint(load_checkpoint(output))
        elif output.exists():
            raise BrokenError(f"refused, and written: {err}")


def finite(*models: torch.nn.Module) -> None:
    """Raise BrokenError where a parameter is not."""
    for model in models:
        for name, parameter in model.named_parameters():
            if parameter.is_meta or not torch.isfinite(parameter).all():
                raise BrokenError(f"{name} is {parameter}")


def told(error: Exception, *files: Path) -> None:
    """Raise BrokenError unless an error is told in one line that names the files."""
    if isinstance(error, OSError) and error.filename is not None:
        one_line(f"{error.filename}: {error.strerror}", *map(str, files))
    else:
        one_line(str(error), *map(str, files))


class refusal:  # noqa: N801  # as pytest.raises
    """A block that has to be refused in one line that names the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if error is None:
            raise BrokenError("taken, though not whole")
        if not isinstance(error, ValueError | OSError):
            return False
        told(error, self.path)
        return True
