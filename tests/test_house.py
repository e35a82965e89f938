"""The house: sizes of files and functions, no banners, lines in all, the environment variables that are read."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("convnextv2", "sparse_ops")
MOST_LINES = 10_767
"""Of the rooms that were there when the house was built, to be lowered only. They had 10,804 before it, and
10,569 when it stood: with runs from Python, kinds of sources, layouts as objects and prediction in the package."""
NEW = (
    "__main__ commands/__init__ commands/_cli commands/_minkowski_check commands/_minkowski_source "
    "commands/_minkowski_toolchain commands/backends commands/check commands/completion commands/convert "
    "commands/demo commands/download_data commands/download_weights commands/embed commands/evaluate "
    "commands/finetune commands/info commands/minkowski commands/model_card commands/predict commands/pretrain "
    "commands/recipes commands/report commands/segment commands/shards commands/stats commands/visualize "
    "data/augmentation data/bands data/batches data/cache data/checking data/crops data/decoding data/dicom "
    "data/encoded data/encoded_sources data/hub_datasets data/listings data/lists data/metadata data/names "
    "data/native data/native_transforms data/now_reading data/parquet data/paths data/piped data/plain data/rasters "
    "data/reading data/remote data/resampling data/scene_tiff data/scenes data/shard_writing data/shards data/spool "
    "data/statistics data/stored data/subsets data/tables data/tar_index data/tiff data/whole data/windows "
    "data/worker_signals data/writing deferred evaluation/answers evaluation/calibration evaluation/choices "
    "evaluation/embedding evaluation/feature_files evaluation/features evaluation/frozen evaluation/imagenet "
    "evaluation/inference evaluation/knn evaluation/linear evaluation/neighbours evaluation/onnx_network "
    "evaluation/projection evaluation/scores export/__init__ export/folders export/onnx export/refusal export/source "
    "export/target export/targets export/torch_export export/transformers export/writing messages models/interface "
    "models/modes models/no_data models/pooling models/recomputing models/spent outputs recipes/__init__ "
    "report/__init__ report/curves report/embedding report/page report/pictures report/runs segmentation/__init__ "
    "segmentation/config segmentation/datasets segmentation/loading segmentation/masks segmentation/network "
    "segmentation/options segmentation/pairs segmentation/predicting segmentation/scenes segmentation/scores "
    "segmentation/training segmentation/transforms segmentation/windows timm training/bad_data training/budget "
    "training/claim training/compiling training/components training/cooldown training/diverged training/draws "
    "training/environment training/epoch_pass training/exchange training/feeding training/feeding_options "
    "training/handlers training/hardware training/head_start training/keeping training/measures training/neighbours "
    "training/option_types training/patience training/pixel_options training/probe_options training/probing "
    "training/processes training/recipe_files training/reliability training/saved_state training/sharding "
    "training/so_far training/starting training/states training/watching version weights/adapting weights/addresses "
    "weights/beside weights/download weights/figures weights/guard weights/hub weights/layouts/mmpretrain "
    "weights/loaders weights/names weights/old_format weights/pretrained weights/stated weights/transfer "
    "weights/unwrapping weights/whole "
)
TRITON = "block depthwise_sum_kernels gelu_kernels mlp_backward products rows_kernels sums_kernels"
NEW_BELOW = [
    "conformance_block.py",
    "conformance_maps.py",
    "residual.py",
    "checks.py",
    "map_grid.py",
    "map_kernels.py",
    "backends/cpu/maps.py",
]
NEW_BELOW += ["backends/cpu/csrc/depthwise_map.inc", "backends/cpu/csrc/lanes.h", "backends/cpu/csrc/mlp_result.inc"]
NEW_BELOW += [*(f"backends/triton/{name}.py" for name in TRITON.split())]
ROOMS_SINCE = {f"convnextv2/{name}.py" for name in NEW.split()} | {f"sparse_ops/{name}" for name in NEW_BELOW}
"""What has been added for purposes of its own; a file that takes over from an older one does not belong here."""
BANNER = re.compile(r"^[ \t]*(?:#|//)[^\n]*[-=*#]{8,}\s*$", re.M)
SOURCES = sorted(
    file
    for folder in (*PACKAGES, "studies")
    for pattern in ("*.py", "csrc/*")
    for file in (ROOT / folder).rglob(pattern)
    if file.suffix in {".py", ".inc", ".cpp", ".h"}
)


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def lines_of(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


def functions(file: Path) -> Iterator[tuple[str, int]]:
    """Names and lines, without decorators."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield f"{relative(file)}: {node.name}", node.end_lineno - node.lineno + 1


def test_files_have_at_most_450_lines() -> None:
    assert len(SOURCES) > 60
    assert not {relative(file): lines_of(file) for file in SOURCES if lines_of(file) > 450}


def test_functions_have_at_most_80_lines() -> None:
    found = [found for file in SOURCES if file.suffix == ".py" for found in functions(file)]
    assert len(found) > 300
    assert not {name: lines for name, lines in found if lines > 80}


def test_there_are_no_banners() -> None:
    python = [
        file
        for folder in (*PACKAGES, "scripts", "benchmarks", "studies", "tests")
        for file in (ROOT / folder).rglob("*.py")
    ]
    files = {*SOURCES, *python}
    found = {relative(file): BANNER.findall(file.read_text(encoding="utf-8")) for file in sorted(files)}
    assert not {name: banners for name, banners in found.items() if banners}


@pytest.mark.parametrize("text", ["# Files " + "-" * 40, "// " + "=" * 20, "#" * 30])
def test_banners_are_recognised(text: str) -> None:
    assert BANNER.search(f"x = 1\n{text}\n")
    assert not BANNER.search('# a sum - and more\nx = 1  # -1\n"-----------"\n')


def test_the_house_has_fewer_lines_than_it_had() -> None:
    assert {relative(file) for file in SOURCES} >= ROOMS_SINCE
    old = [file for file in SOURCES if relative(file) not in ROOMS_SINCE and relative(file).startswith(PACKAGES)]
    counts = {relative(file): lines_of(file) for file in old}
    assert sum(counts.values()) < MOST_LINES, sorted(counts.items(), key=lambda item: -item[1])[:10]


NAME = r"([A-Z][A-Z_0-9]+)"
READS = {
    "*.py": (r"environ(?:ment)?(?:\.get\(|\[)[\"'](?:%s)[\"']", r"_VARIABLE = \"%s\"", r"with_front\(\"%s\""),
    "*.cpp": (r"getenv\(\"%s\"\)",),
    "*.sh": (r"\$\{%s:[-+]",),
    "Makefile": (r"^%s \?=",),
}
"""Patterns of what reads a variable, by kind of file."""


def variables_read() -> dict[str, str]:
    """Environment variables to a file that reads it."""
    found = {}
    for kind, patterns in READS.items():
        for file in sorted(ROOT.glob(kind)) + [
            file
            for folder in (*PACKAGES, "scripts", "benchmarks", "studies", "tests")
            for file in (ROOT / folder).rglob(kind)
        ]:
            text = file.read_text(encoding="utf-8")
            for pattern in patterns:
                found |= dict.fromkeys(re.findall(pattern % NAME, text, re.M), relative(file))
            for names in re.findall(r"for name in \(([A-Z_\", ]+)\) if name in os\.environ", text):
                found |= dict.fromkeys(re.findall(NAME, names), relative(file))
    return found


def test_the_table_of_environment_variables_is_what_is_read() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    _, _, section = page.partition("\n## Environment variables\n")
    rows = re.findall(r"^\| (`[^|]+`) \|", section.partition("\n## ")[0], re.M)
    table = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert len(set(table)) == len(table) > 10
    read = variables_read()
    assert not {name: file for name, file in read.items() if name not in table}, "read, but not in the table"
    assert not set(table) - set(read), "in the table, but never read"
