"""Texts that people write: recipes, masks, command lines."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fuzz_scripts
import hypothesis
import torch
import yaml
from fuzz_bytes import JSON, NUMBERS, TEXTS, changed, changed_json, changed_text
from fuzz_harness import BrokenError, Case, one_line
from hypothesis import strategies as st

from convnextv2 import EncoderConfig, create_fcmae
from convnextv2.commands import minkowski
from convnextv2.commands.visualize import read_mask
from convnextv2.models.masking import parse_mask
from convnextv2.recipes import recipes
from convnextv2.training import FinetuneOptions, PretrainOptions
from convnextv2.training.recipe import parse_options, recipe_text


def _drawn(strategy: Any, seed: int, count: int, use: Callable[[Any], None]) -> None:
    """``count`` draws of a strategy, the same for the same seed."""

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def draw(value: Any) -> None:
        use(value)

    draw()


YAML = (
    "!!python/object/apply:os.mkdir [executed]", "!!python/name:os.system", "!!binary aGk=", "!!timestamp 2020-01-01",
    "2020-01-01", "!!set {a, b}", "!!omap [a: 1]", "&a [*a]", "*nowhere", "? [a]\n: 1", "{[a]: 1}", "0o17", "1:30",
    "1e3", ".nan", ".inf", "-.inf", "~", "|\n  text\n  more", ">-\n  folded", "'", '"', "[1, 2", "{a: 1", "<<: *x",
    "yes", "off", "!x 1", "%TAG", "---", "...", "\t1", "0x_", "1_000", "0b1", "- 1", "[" * 60, "!!float x", "!!int x",
    "!!null x", "=", "&a {b: &c {d: [*a, *c]}}", "../../x.yaml", "configs", "${HOME}", "{{x}}", "print('x')",
    "1" * 5000,
    "-", "a: b: c",
)  # fmt: skip
LAUGHS = "a0: &a0 [x, x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))


class Recipes:
    """Options, or a line."""

    name = "recipes"
    seconds = 2.0
    megabytes = 200
    tasks = PretrainOptions, FinetuneOptions

    def prepare(self) -> None:
        self.good = [path.read_text() for path in recipes().values()]
        self.keys = sorted(
            {key for text in self.good for key in yaml.safe_load(text)} | {"depths", "dims", "config", "resume"}
        )
        for task in self.tasks:
            parse_options(task, [])

    def produce(self, seed: int, count: int, sink: Callable[[Case], None]) -> None:
        rng = random.Random(f"recipes {seed}")
        if seed == 0:
            for text in [*self.good, LAUGHS, f"data: x\n{LAUGHS}lr: *a11\n"]:
                sink(Case(".yaml", text.encode(), "good, or laughing"))
        for _ in range(count // 2):
            text = rng.choice(self.good)
            kind = rng.randrange(5)
            if kind == 0:
                content = changed(rng, text.encode())[0]
                sink(Case(".yaml", content, "bytes"))
                continue
            if kind == 1:
                text = changed_text(rng, text, self.good)
            elif kind == 2:
                lines = [line for line in text.splitlines() if ":" in line and not line.startswith("#")]
                place = rng.randrange(len(lines))
                key = lines[place].partition(":")[0]
                lines[place] = f"{rng.choice((key, key, *self.keys))}: {rng.choice((*YAML, *TEXTS))}"
                text = "\n".join(lines) + "\n"
            elif kind == 3:
                text = yaml.safe_dump(changed_json(rng, yaml.safe_load(text)), allow_unicode=rng.random() < 0.5)
            else:
                chosen = rng.sample(self.keys, rng.randrange(1, 4))
                text = "".join(f"{key}: {json.dumps(rng.choice(JSON))}\n" for key in chosen)
            codec = rng.choice(("utf-8",) * 8 + ("utf-16", "utf-8-sig", "latin1"))
            sink(Case(".yaml", text.encode(codec, errors="replace"), f"text {kind}"))
        anything = st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats()
            | st.text(max_size=8)
            | st.binary(max_size=4)
            | st.dates(),
            lambda inner: (
                st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3)
            ),
        )
        keys = st.sampled_from(self.keys) | st.text(max_size=5) | st.integers() | st.none()

        def use(drawn: Any) -> None:
            sink(Case(".yaml", yaml.safe_dump(drawn).encode(errors="replace"), "drawn"))

        _drawn(st.dictionaries(keys, anything, max_size=3) | anything, seed, count // 2, use)

    def check(self, path: Path) -> str:
        outcome = "refused"
        for task in self.tasks:
            try:
                options = parse_options(task, ["--config", str(path)])
            except (ValueError, OSError) as error:
                one_line(fuzz_scripts.load()["_cli"].describe(error))
                if isinstance(error, ValueError) and not re.search(r"\S", str(error)):
                    raise BrokenError("no reason") from error
                continue
            outcome = "accepted"
            for method in (options.check, options.encoder):
                try:
                    method()
                except ValueError as error:  # noqa: PERF203  # two methods
                    one_line(str(error))
                except TypeError as error:
                    if method != options.check or not str(error).startswith("`"):  # the name of an option
                        raise
                    one_line(str(error))
                    break
            (path.parent / "out").mkdir(exist_ok=True)
            own = path.parent / "out" / "config.yaml"
            own.write_text(recipe_text(options), encoding="utf-8")
            if repr(parse_options(task, ["--config", str(own)])) != repr(_without_switches(options)):
                raise BrokenError(f"{options} is written as\n{own.read_text()}")
        return outcome


def _without_switches(options: Any) -> Any:
    from dataclasses import replace

    return replace(options, resume=False, overwrite=False)


class Masks:
    """A mask as text, or as a tensor described by JSON: {"shape", "dtype", "values", "images"}."""

    name = "masks"
    seconds = 2.0
    megabytes = 200
    dtypes = (
        "float32",
        "float64",
        "float16",
        "bfloat16",
        "bool",
        "int64",
        "uint8",
        "int8",
        "complex64",
        "float8_e4m3fn",
    )

    def prepare(self) -> None:
        self.model = create_fcmae(EncoderConfig((1, 1, 1, 1), (2, 2, 3, 3), 1, 8, 3), img_size=16, decoder_dim=2)
        self.model(torch.zeros(2, 1, 16, 16))

    def produce(self, seed: int, count: int, sink: Callable[[Case], None]) -> None:
        rng = random.Random(f"masks {seed}")
        good = ("10\n01\n", "#.\n.#", "x_ X_\n\n0 1\t1 0\n", "1\n", "11\n11")
        for _ in range(count // 4):
            text = changed_text(rng, rng.choice(good), good)
            sink(Case(".txt", text.encode(errors="surrogatepass"), "text"))
        for _ in range(count // 4):
            rows = ["".join(rng.choice("01#.xX_") for _ in range(2)) for _ in range(2)]
            sink(Case(".txt", changed(rng, "\n".join(rows).encode())[0], "bytes"))
        _drawn(st.text() | st.text("01#.xX_ \n\r\t\x0b\x85\u2028"), seed, count // 4,
               lambda text: sink(Case(".txt", text.encode(errors="surrogatepass"), "drawn")))  # fmt: skip
        shapes = st.lists(st.integers(0, 5), max_size=4) | st.sampled_from(
            [[2, 4], [2, 2, 2], [1, 4], [4, 2], [2, 1, 4]]
        )
        values = st.sampled_from([0, 1, 0.5, 2, -1, 255, "nan", "inf", 1e-9, "mixed"])
        images = st.sampled_from(
            [[2, 1, 16, 16]] * 4 + [[0, 1, 16, 16], [1, 1, 8, 8], [2, 1, 16], [2, 3, 16, 16], [2, 1, 0, 16]]
        )
        odd = st.none() | st.floats() | st.integers() | st.sampled_from([0.0, 1.0, 0.5, 1e-9])
        described = {
            "shape": shapes,
            "dtype": st.sampled_from(self.dtypes),
            "values": values,
            "images": images,
            "ratio": odd,
        }
        _drawn(st.fixed_dictionaries(described), seed, count // 4,
               lambda drawn: sink(Case(".json", json.dumps(drawn).encode(), "drawn")))  # fmt: skip

    def check(self, path: Path) -> str:
        return self._tensor(json.loads(path.read_text())) if path.suffix == ".json" else self._text(path)

    def _text(self, path: Path) -> str:
        try:
            text = path.read_bytes().decode(errors="surrogatepass")
        except UnicodeDecodeError:
            text = path.read_bytes().decode(errors="replace")
        mask = None
        try:
            mask = parse_mask(text)
        except ValueError as error:
            one_line(str(error))
        else:
            if mask.dim() != 2 or mask.dtype != torch.float32 or not mask.numel() or ((mask != 0) & (mask != 1)).any():
                raise BrokenError(f"a mask {mask}")
        try:
            read = read_mask(path, (2, 2))
        except ValueError as error:
            one_line(str(error), str(path))
            return "refused"
        if mask is None or tuple(read.shape) != (2, 2) or not torch.equal(read, mask):
            raise BrokenError(f"{read}, {mask}")
        return "accepted"

    def _tensor(self, about: dict[str, Any]) -> str:
        value, generator = about["values"], torch.Generator().manual_seed(0)
        plain = torch.full(about["shape"], 0.0 if value == "mixed" else float(value), dtype=torch.float64)
        if value == "mixed":
            plain = torch.randint(0, 2, about["shape"], generator=generator).double()
        mask = plain.to(getattr(torch, about["dtype"]))
        images = torch.zeros(about["images"])
        outcome = "refused"
        for options in ({"mask": mask}, {"mask_ratio": about["ratio"]}, {"mask": mask, "mask_ratio": about["ratio"]}):
            try:
                loss, pred, used = self.model(images, **options)
            except (ValueError, TypeError) as error:
                one_line(str(error))
                continue
            outcome = "accepted"
            if not torch.isfinite(loss) or not torch.isfinite(pred).all() or used.dtype != torch.float32:
                raise BrokenError(f"loss {loss}, mask {used}, of {options}")
            if used.shape != (images.shape[0], pred.shape[-2] * pred.shape[-1]) or ((used != 0) & (used != 1)).any():
                raise BrokenError(f"mask {used}, of {options}")
        return outcome


class Commands:
    """Command lines of the scripts, as JSON [script, arguments…]: a line and status 2, or a clean run."""

    name = "commands"
    seconds = 6.0
    megabytes = 400
    """A network may be built: ``summary`` of the largest variant, with all that its options ask for."""
    most = 6

    def prepare(self) -> None:
        self.scripts = fuzz_scripts.load()
        fuzz_scripts.run(self._main("summary"), "summary", "convnextv2_atto")  # what torch imports and makes only once
        self.options: dict[str, list[str]] = {}
        for name in fuzz_scripts.NAMES:
            _, out, err = fuzz_scripts.run(self._main(name), name, "--help")
            self.options[name] = sorted(set(re.findall(r"--[a-z][a-z0-9-]+", out + err)))
            assert len(self.options[name]) > 3, (name, out, err)

    def _main(self, name: str) -> Callable[[], Any]:
        if name == "install_minkowski":  # it would build for minutes
            return lambda: minkowski.parse_arguments() and None
        return self.scripts[name].main

    def produce(self, seed: int, count: int, sink: Callable[[Case], None]) -> None:
        rng = random.Random(f"commands {seed}")
        for _ in range(count // 2):
            sink(self._case(rng, rng.choice(list(self.options)), iter(lambda: self._value(rng), None)))
        texts = st.lists(st.text(max_size=12), min_size=self.most, max_size=self.most)

        def use(drawn: tuple[str, int, list[str]]) -> None:
            name, number, values = drawn
            sink(self._case(random.Random(number), name, iter(values * 3)))

        _drawn(st.tuples(st.sampled_from(sorted(self.options)), st.integers(), texts), seed, count // 2, use)

    def _value(self, rng: random.Random) -> str:
        usual = (
            "32", "0", "1", "-1", "0.5", "224", "32x64", "cpu", "auto", "cuda:99", "meta", "convnextv2_atto",
            "atto", "bf16", "reference", "nowhere", "nowhere/x", "x.csv", "x.png", "x.pth", "adamw",
            "timm", "1,2", "[1, 2]",
        )  # fmt: skip
        kind = rng.randrange(4)
        if kind == 0:
            return rng.choice(TEXTS)
        if kind == 1:
            return str(rng.choice((*NUMBERS, 10**30, 1e300, "1e-300", "9" * 5000)))
        return rng.choice(usual)

    def _case(self, rng: random.Random, name: str, values: Iterator[str]) -> Case:
        arguments: list[str] = []
        first = {"summary": ["convnextv2_atto"], "install_minkowski": [], "demo": [], "pretrain": [], "finetune": []}
        first["model_info"] = first["summary"]
        first["evaluate"] = [rng.choice(("knn", "linear", "classify")), "nowhere.pth", "nowhere"]
        arguments += first.get(name, ["nowhere.pth", "nowhere"])
        if arguments and rng.random() < 0.3:
            arguments[rng.randrange(len(arguments))] = next(values)
        for _ in range(rng.randrange(self.most)):
            option = rng.choice(self.options[name])
            if name == "demo" and option == "--help":
                continue
            arguments += rng.choice(([option, next(values)], [f"{option}={next(values)}"], [option]))
            if rng.random() < 0.1:
                arguments += [option, next(values)]
        if name == "demo":
            arguments += ["--data", "nowhere"]  # it would run for minutes
        arguments = [argument.replace("\0", "0") for argument in arguments]  # the system passes none on
        if name == "install_minkowski":  # argparse's own parser repeats them as they are
            arguments = ["".join(filter(str.isprintable, argument[:60])) for argument in arguments]
        return Case(".json", json.dumps([name, *arguments]).encode(), name)

    def check(self, path: Path) -> str:
        name, *arguments = json.loads(path.read_text())
        status, _, err = fuzz_scripts.run(self._main(name), name, *arguments)
        notices = [line for line in err.splitlines() if line.startswith(("notice:", "warning:"))]
        kept = "".join(line + "\n" for line in err.splitlines() if line not in notices)
        return "accepted" if fuzz_scripts.ended_well(status, kept) else "refused"
