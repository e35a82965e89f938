"""``benchmarks/counts.py``: a toy kernel whose bytes are known, and operators of torch that launch or do not."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]

TOY = """
import triton
import triton.language as tl

@triton.jit
def toy(x, table, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    value = tl.load(x + at, mask=inside) + tl.load(x + at, mask=inside)  # read twice
    first = tl.load(table)  # a number, by each program
    tl.store(out + at, value + first, mask=inside)
"""
COUNT = """
import json, sys
sys.path[:0] = sys.argv[1:]
import torch, counts, toy
from sparse_ops.backends.triton import depthwise

x, table, out = torch.ones(100), torch.ones(7), torch.empty(100, dtype=torch.bfloat16)
with counts.counting() as launches:
    depthwise.launch(toy.toy, (2,), x, table, out, 100, BLOCK=64)
assert out.eq(3).all()
with counts.counting() as operators:
    y = x.view(10, 10).t()[2:].unsqueeze(0)  # views
    same = x.to(torch.float32).contiguous().reshape(100)  # nothing to do
    torch.empty(5)
    cast = x.to(torch.bfloat16)  # one
    cast.add_(1)  # one
    product = x.view(10, 10) @ x.view(10, 10)  # one
    out.copy_(x)  # one, which does not read what it overwrites
    torch.mm(x.view(10, 10), x.view(10, 10), out=product)  # nor this one
told = [{"name": n.name, "read": n.read, "written": n.written, "floor": n.floor} for n in (*launches, *operators)]
print(json.dumps(told))
"""


def test_bytes_of_a_toy_and_launches_of_operators(interpreted, tmp_path):
    (tmp_path / "toy.py").write_text(TOY)
    told = interpreted("-c", COUNT, tmp_path, ROOT / "benchmarks")
    toy, *operators = json.loads(told.splitlines()[-1])
    assert toy == {
        "name": "toy",
        "read": {"x": 2 * 100 * 4, "table": 2 * 4},
        "written": {"out": 100 * 2},
        "floor": 100 * 4 + 7 * 4 + 100 * 2,
    }
    assert [found["name"] for found in operators] == ["aten._to_copy", "aten.add_", "aten.mm", "aten.copy_", "aten.mm"]
    assert [found["floor"] for found in operators] == [600, 400, 1200, 600, 1200]


@pytest.fixture(scope="module")
def counts():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("counts", ROOT / "benchmarks/counts.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["counts"] = module
    spec.loader.exec_module(module)
    return module


def test_a_table_adds_up(counts):
    launch = counts.Launch("k", {"x": 40}, {"y": 20}, {"x": 20, "y": 20, "z": 1000})
    found = counts.BlockCounts("convnextv2_tiny", 1, 2, 5, [launch, launch], [counts.Launch("aten.mm")])
    rows = counts.rows_of(found, {"k": [(123, 45), (99, 44), (123, 45)]})
    assert [(r.pass_, r.kernel, r.launches) for r in rows] == [("forward", "k", 2), ("backward", "aten.mm", 1)]
    text = counts.markdown(rows)
    assert "2 + 1 launches, 12.0 bytes a number of `[N, C]`, 8.0 if" in text
    assert "| forward | k | 2 | 4.00 | 2.00 | 4.00 | 99, 123 | 44, 45 |" in text
    assert "| backward | aten.mm | 1 | 0.00 | 0.00 | 0.00 |  |  |" in text


def test_instructions_are_counted_without_the_padding(counts, monkeypatch):
    sass = "\tFunction : k\n        /*0000*/    LDC R1, c[0x0][0x28] ;   /* 0x00 */\n" + " " * 80 + "/* 0x00 */\n"
    sass += "        /*0010*/    @P0 EXIT ;   /* 0x1 */\n        /*0020*/    NOP;    /* 0x2 */\n"
    monkeypatch.setattr(counts.subprocess, "run", lambda *args, **options: SimpleNamespace(stdout=sass))
    assert counts.instructions(Path()) == 2


def test_without_the_interpreter_it_says_so(counts, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit) as stop:
        counts.main([])
    assert stop.value.code == 2
    assert "set TRITON_INTERPRET=1" in capsys.readouterr().err
