"""The model of scaling: what it counts is what is there, it is what the page shows, and a check of it runs."""

import json
import re
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from convnextv2 import create_fcmae, create_model
from convnextv2.models.config import VARIANTS
from convnextv2.models.summary import layers
from convnextv2.recipes import recipes

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import scaling  # noqa: E402  # a script's folder

GIVEN = scaling.Assumptions()


def test_the_page_shows_what_the_model_says() -> None:
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert scaling.tables(GIVEN) in page
    for name in ("share", "launch", "node", "network", "hidden", "usable"):  # nobody is to take them for measured
        assert re.search(rf"^\| `{name}` \| ", page, re.M), name
    values = re.findall(r"^\| `(\w+)` \| ([\d.e+-]+)", page, re.M)
    assert {name: float(value) for name, value in values} == {name: float(value) for name, value in vars(GIVEN).items()}


def test_batches_of_the_published_recipe_fit_by_the_model() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    rows = re.findall(r"`--model (\w+) --batch-size (\d+) --accum (\d+)`", page)
    assert len(rows) == len(VARIANTS)
    for model, size, accum in rows:
        fits = scaling.largest_batch(scaling.sizes(model), GIVEN)
        assert int(size) == min(512, fits // 2)
        assert int(size) * int(accum) == 512


def test_sizes_are_those_of_the_network() -> None:
    name = "convnextv2_atto"
    size = scaling.sizes(name)
    with torch.device("meta"):
        network = create_fcmae(name)
    assert size.parameters == sum(parameter.numel() for parameter in network.parameters())
    assert size.multiply_adds == sum(row.multiply_adds for row in layers(network, (224, 224)))
    assert size.blocks == sum(VARIANTS[name][0]) + 1
    less = scaling.sizes(name, (224, 224), 0.8)
    assert less.multiply_adds < size.multiply_adds
    assert less.kept < size.kept


def test_a_backward_pass_is_two_forward_passes() -> None:
    """Of the linear layers; torch counts the weight gradient of a depthwise convolution as if it were a dense one."""
    with torch.device("meta"):
        model, images = create_model("convnextv2_atto", num_classes=10), torch.empty(1, 3, 224, 224)
    with FlopCounterMode(display=False) as forward:
        logits = model(images)
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    found = [counter.get_flop_counts()["Global"] for counter in (forward, backward)]
    counts = [sum(flop for op, flop in ops.items() if str(op).startswith(("aten.mm", "aten.addmm"))) for ops in found]
    assert counts[1] == 2 * counts[0] > 5e8


def test_kept_numbers_are_what_autograd_keeps() -> None:
    size = scaling.sizes("convnextv2_atto")
    model = create_fcmae("convnextv2_atto", backend="cpu")
    one, three = (scaling.kept_bytes(model, torch.randn(batch, 3, 224, 224)) for batch in (1, 3))
    assert (three - one) / 8 == pytest.approx(size.kept, rel=0.02)


def test_shards_take_what_they_hold() -> None:
    size = scaling.Sizes("x", 10**9, 10**10, 50, 10**7, 10**8, 10**8)
    assert size.sharded_bytes(2) == pytest.approx((8 + 1.6 + 2) * 1e9)
    assert size.sharded_bytes(4) == pytest.approx((4 + 1.6 + 2) * 1e9)
    assert size.sharded_sent(2) == 3 * size.sent(2) / 2 == 6e9
    with torch.device("meta"):
        blocks = create_fcmae("convnextv2_atto").encoder.stages[3]
    assert scaling.sizes("convnextv2_atto").largest == sum(parameter.numel() for parameter in blocks[0].parameters())


def test_the_recipe_with_shards_fits_into_the_gpus_that_it_names() -> None:
    recipe = recipes()["pretrain_huge_fsdp"].read_text(encoding="utf-8")
    batch = int(re.search(r"^batch_size: (\d+)$", recipe, re.M)[1])  # type: ignore[index]
    numbers = []
    for model in ("convnextv2_huge", "convnextv2_large"):
        size = scaling.sizes(model)
        activations = batch * size.kept * GIVEN.kept_bytes
        numbers += [(held + activations) / 1e9 for held in (size.sharded_bytes(8), 18 * size.parameters)]
    assert numbers[0] < GIVEN.usable * 24 < numbers[1]
    told = re.search(r"Expect: (\d+) GB of each .*, (\d+) GB without shards; large (\d+) GB and (\d+) GB", recipe)
    assert told is not None
    assert [int(number) for number in told.groups()] == [round(number) for number in numbers]


def test_steps() -> None:
    size = scaling.Sizes("x", 10**9, 10**10, 50, 10**7, 10**8)
    assert size.sent(1) == 0
    assert size.sent(2) == 4e9
    assert size.sent(512) == pytest.approx(8e9, rel=0.01)
    given = replace(GIVEN, memory=80e9, usable=1.0, kept_bytes=2)
    assert scaling.largest_batch(size, given) == 256  # (80 - 16) GB / 0.2 GB = 320
    alone = scaling.step(size, 1, given)
    assert (alone.micro, alone.accum, alone.seconds) == (256, 16, alone.compute)
    image = (3e10 / given.peak + 210 * 1e7 / given.bandwidth) / given.share
    assert alone.compute == pytest.approx(4096 * image)
    two = scaling.step(size, 2, given)
    assert (two.micro, two.accum) == (256, 8)
    assert two.seconds == two.compute  # hidden
    many = scaling.step(size, 512, given)
    assert (many.micro, many.accum) == (8, 1)
    assert many.compute == pytest.approx(max(8 * image, 50 * 20 * given.launch))
    assert many.seconds == pytest.approx(many.compute + size.sent(512) / given.network - 0.8 * 2 / 3 * many.compute)
    assert many.images_per_s < 512 * alone.images_per_s
    with pytest.raises(ValueError, match="x does not fit into 1 GB"):
        scaling.step(size, 1, replace(given, memory=1e9))
    assert all(scaling.step(scaling.sizes(name), gpus, GIVEN).images == 4096 for name in VARIANTS for gpus in (1, 512))


def test_a_check_measures_a_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = Namespace(threads=1, seed=0, img_size=(64, 64), mask_ratio=0.6, batch_size=2, warmup=0, repeats=1)
    scaling.work(0, 1, args, "convnextv2_atto", str(tmp_path))
    found = json.loads((tmp_path / "0.json").read_text())
    size = scaling.sizes("convnextv2_atto", (64, 64), 0.6)
    assert found["sent"] == 4 * size.parameters  # of a ring of two each process sends as much
    rows = scaling.rows_of(args, "convnextv2_atto", [found, {**found, "times": {**found["times"], "alone": []}}])
    assert [(row.way, row.processes) for row in rows] == [("alone", 1), ("side by side", 2), ("sharing gradients", 2)]
    assert rows[2].sent_mb == rows[2].sent_mb_predicted == pytest.approx(4e-6 * size.parameters)
    assert rows[2].step_ms_predicted >= rows[1].step_ms > 0
    assert "MB kept" in scaling.line(rows[2])


def test_tables_are_printed_and_wrong_options_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling.main([]) == 0
    assert capsys.readouterr().out.strip() == scaling.tables(GIVEN)
    for wrong in (["--json", "x.json"], ["--check", "--models", "giant"], ["--check", "--device", "meta"]):
        with pytest.raises(SystemExit) as stop:
            scaling.main(wrong)
        assert stop.value.code == 2
