"""``scripts/warm_triton_cache.py``: what it fills, another process takes, also after a move."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import warm_triton_cache  # noqa: E402  # a script's folder

NETWORK = """
import json, os, sys
import torch, triton
sys.path.insert(0, "scripts")
import warm_triton_cache
from convnextv2.models import fcmae
from convnextv2.models.config import EncoderConfig, FCMAEConfig
from sparse_ops.backends.triton import backend as kernels, launch

def network(name=None):
    # One width without kernels of its own and one with; each of both is compiled once for the pointwise half.
    encoder = EncoderConfig(depths=(1, 1, 1, 1), dims=(8, 8, 8, 40), kernel_size=3)
    return fcmae.FCMAE(FCMAEConfig(encoder, img_size=(64, 64), decoder_dim=40))
"""
FILL = (
    NETWORK
    + """
fcmae.create_fcmae = network
sys.exit(warm_triton_cache.main(sys.argv[1:]))
"""
)
STEP = (
    NETWORK
    + """
class Backend(kernels.TritonBackend):
    def rejects(self, device, dtype, kernel_size):
        return None

found = []

def listen(**facts):
    found.append((facts["metadata"]["name"], facts["cache_hit"]))
    if not facts["cache_hit"]:
        print(json.dumps(found[-1:]), flush=True)
        os._exit(0)  # from whichever thread

triton.runtime.driver.set_active(warm_triton_cache.Driver(int(sys.argv[1])))
triton.knobs.compilation.listener = listen
launch._only_compiling = True  # nothing is launched
model = network()
model.backend = Backend()
with torch.autocast("cpu", torch.bfloat16):
    loss = model(torch.randn(2, 3, 64, 64), return_pred=False).loss
loss.backward()
print(json.dumps(found))
"""
)


def run(*arguments: object, cache: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1", **({"TRITON_CACHE_DIR": str(cache)} if cache else {})},
    )


@pytest.mark.slow
def test_a_step_in_another_process_compiles_nothing(tmp_path, capsys):
    """All kernels of a training step, encoder and decoder, come from a cache that was filled and then moved."""
    filled, moved = tmp_path / "filled", tmp_path / "moved"
    succeeded(run("-c", FILL, "--arch", 90, "--models", "tiny", filled))
    listed = json.loads((filled / "warmed.json").read_text())
    assert {kernel["dtype"] for kernel in listed["kernels"]} == {"bfloat16"}
    assert all(16 <= kernel["registers"] <= 255 and kernel["spilled"] == 0 for kernel in listed["kernels"])
    stages = {(kernel["side"], kernel["channels"]) for kernel in listed["kernels"]}
    assert stages == {(8, 8), (2, 8), (1, 40)}  # (4, 8) takes the kernels of (8, 8)
    shutil.copytree(filled, moved)
    shutil.rmtree(filled)
    assert warm_triton_cache.main(["--relocate", str(moved)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{len({kernel['folder'] for kernel in listed['kernels']})} kernels for sm_90")
    found = json.loads(succeeded(run("-c", STEP, 90, cache=moved)).splitlines()[-1])
    assert {name for name, _ in found} == {kernel["kernel"] for kernel in listed["kernels"]}
    assert all(hit for _, hit in found), [name for name, hit in found if not hit]
    found = json.loads(succeeded(run("-c", STEP, 80, cache=moved)).splitlines()[-1])
    assert [hit for _, hit in found] == [False]  # another architecture has kernels of its own: it ends at the first


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def listed(tmp_path) -> dict:
    """A cache of one kernel that lay elsewhere."""
    folder = tmp_path / "ABC"
    folder.mkdir()
    (folder / "k.cubin").write_bytes(b"code")
    (folder / "__grp__k.json").write_text(json.dumps({"child_paths": {"k.cubin": "/elsewhere/ABC/k.cubin"}}))
    made_for = {**warm_triton_cache.identity(90), "python": "3.99.0"}
    (tmp_path / "warmed.json").write_text(json.dumps(made_for))
    return made_for


def test_lists_of_files_name_the_new_place(listed, tmp_path, capsys):
    assert warm_triton_cache.main(["--relocate", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"1 kernels for sm_90 in {tmp_path}\n"
    paths = json.loads((tmp_path / "ABC/__grp__k.json").read_text())["child_paths"]
    assert paths == {"k.cubin": str(tmp_path / "ABC/k.cubin")}


@pytest.mark.parametrize("fact", ["triton", "build", "ptxas", "variables"])
def test_a_cache_of_another_triton_is_told(fact, listed, tmp_path, capsys):
    (tmp_path / "warmed.json").write_text(json.dumps({**listed, fact: "another"}))
    assert warm_triton_cache.main(["--relocate", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"compiled anew: {fact} another there" in line
    assert "Python 3.99.0 there" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--models", "gigantic", "out"), "unknown models gigantic"),
        (("--arch", "75", "out"), "compute capability 8.0"),
        (("--arch", "9", "out"), "written as 80 or 90"),
    ],
)
def test_bad_options_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        warm_triton_cache.main(list(arguments))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("content", ["{", "[1]", "{}", '{"arch": 90}', '{"arch": "new"}', "\x00", "[" * 100_000])
def test_a_list_that_the_script_did_not_write_is_told(content, listed, tmp_path, capsys):
    (tmp_path / "warmed.json").write_text(content)
    assert warm_triton_cache.main(["--relocate", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path / 'warmed.json'} is not what this script writes")
    assert "/elsewhere/" in (tmp_path / "ABC/__grp__k.json").read_text(), "nothing is moved"


def test_a_folder_that_was_not_filled_is_told(tmp_path, capsys):
    assert warm_triton_cache.main(["--relocate", str(tmp_path)]) == 2
    assert "fill it with" in capsys.readouterr().err
