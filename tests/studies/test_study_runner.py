"""Parts are done once, go on where they were left, fail alone, and belong to one runner at a time."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from study_helpers import tiny_study, write_study

from convnextv2.training.processes import only_run_in
from studies import __main__ as program
from studies import runner
from studies.declaration import Study, read_study
from studies.parts import Part


def run(study: Study, folder: Path, said: list[str] | None = None, **free: Any) -> int:
    return runner.run(study.parts, folder, (said if said is not None else []).append, study.probes, **free)


def results(study: Study, folder: Path) -> dict[str, Any]:
    """What came of every part, without the time that it took."""
    return {part.key: (runner.record_of(part, folder) or {}).get("result") for part in study.parts}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("done")
    assert run(tiny_study(folder), folder) == 0
    return folder


@pytest.fixture
def copy(done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(done, tmp_path / "copy"))


@pytest.fixture
def worked_on(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of the parts that are done from here on."""
    keys, do = list[str](), runner.do

    def watched(part: Part, *arguments: Any, **free: Any) -> Any:
        keys.append(part.key)
        return do(part, *arguments, **free)

    monkeypatch.setattr(runner, "do", watched)
    return keys


def test_what_a_part_leaves(done: Path) -> None:
    study = tiny_study(done)
    kinds = [part.kind for part in study.parts]
    assert kinds == ["pretrain", *["knn", "finetune"] * 2, *["knn", "finetune"] * 2]
    found = results(study, done)
    assert all(found.values())
    record = runner.record_of(study.parts[2], done)
    assert record is not None
    assert record["hardware"]["threads"] >= 1
    assert {"timm", "accelerate"} <= record["versions"].keys()
    assert record["determined_by"]["options"]["blr"] == 0.05
    assert record["determined_by"]["needs"] == study.parts[0].key
    assert record["result"]["images"] == 60
    assert found[study.parts[0].key]["knn"][-1][0] == 2
    assert not list(done.glob("parts/*/run/checkpoints/state"))
    assert [path.name for path in done.glob("parts/*/run/checkpoints/last.safetensors")] == ["last.safetensors"]


def test_one_part_that_is_gone_is_done_again_alone(copy: Path, worked_on: list[str]) -> None:
    study = tiny_study(copy)
    before = results(study, copy)
    for part in (study.parts[2], study.parts[0]):
        shutil.rmtree(part.place(copy))
        assert run(study, copy) == 0
        assert worked_on.pop() == part.key
        assert worked_on == []
        assert results(study, copy) == before


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"result": 3, "seconds": 1}', '{"result": {"top1": null}, "seconds": 1}', "[" * 99999]
)
def test_a_damaged_record_is_none(copy: Path, worked_on: list[str], text: str) -> None:
    study = tiny_study(copy)
    before, part = results(study, copy), study.parts[1]
    (part.place(copy) / "result.json").write_text(text)
    assert runner.state_of(part, copy) == "open"
    assert run(study, copy) == 0
    assert worked_on == [part.key]
    assert results(study, copy) == before


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_a_study_that_was_killed_comes_to_the_same(done: Path, tmp_path: Path, kind: str) -> None:
    file = write_study(tmp_path)
    script = Path(__file__).with_name("killed_study.py")
    command = [sys.executable, script, kind, "run", file, "--scale", "smoke", "--output", tmp_path / "all"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    killed = subprocess.run(list(map(str, command)), env=environment, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    study, folder = tiny_study(tmp_path), tmp_path / "all" / "tiny"
    states = [runner.state_of(part, folder) for part in study.parts]
    ended = states.index("open")  # the part that was killed, and none after it is done
    assert study.parts[ended].kind == kind
    assert states[ended:] == ["open"] * len(states[ended:])
    assert (study.parts[ended].run(folder) / "checkpoints" / "state").is_dir()
    assert run(study, folder) == 0
    assert "resuming after epoch 1" in (study.parts[ended].place(folder) / "log.txt").read_text()
    assert results(study, folder) == results(study, done)


def test_a_part_that_fails_stops_no_other(tmp_path: Path, worked_on: list[str]) -> None:
    arms = {"FCMAE": {"pretrain": {"lr": 1e30}}, "scratch": {"pretrain": None}, "steep": {"pretrain": None}}
    arms["steep"]["finetune"] = {"lr": 1e30}
    changes: dict[str, Any] = {"labels": [1], "questions": {"labels": {"arms": arms}}}
    study, said = tiny_study(tmp_path, **changes), list[str]()
    assert run(study, tmp_path, said) == 4
    states = [(part.kind, runner.state_of(part, tmp_path)) for part in study.parts]
    assert states == [
        ("pretrain", "failed"), ("knn", "open"), ("finetune", "open"), ("knn", "done"), ("finetune", "done"),
        ("finetune", "failed"),
    ]  # fmt: skip
    assert sum("left out, for pretrain" in line for line in said) == 2
    error = runner.read_json(study.parts[0].place(tmp_path) / "error.json")
    assert error is not None
    assert error["kind"] == "DivergedError"
    assert any(str(error["error"]) in line for line in runner.status(study.parts, tmp_path))
    worked_on.clear()
    file = str(write_study(tmp_path, **changes))
    assert program.main(["run", file, "--scale", "smoke", "--output", str(tmp_path / "all")]) == 1


def test_a_part_is_done_by_one_runner(copy: Path, worked_on: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    study = tiny_study(copy)
    place = study.parts[0].place(copy)
    (place / "result.json").rename(place / "kept.json")
    monkeypatch.setattr(runner, "PAUSE", 0.01)
    with only_run_in(place):
        assert runner.state_of(study.parts[0], copy) == "running"
        other = threading.Thread(target=run, args=(study, copy))
        other.start()
        other.join(0.3)
        assert other.is_alive()
        (place / "kept.json").rename(place / "result.json")  # as the runner that holds it would
    other.join(10)
    assert not other.is_alive()
    assert worked_on == []


def test_a_full_disk_is_told_and_leaves_nothing_behind(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, said = tiny_study(copy), list[str]()
    before = results(study, copy)
    shutil.rmtree(study.parts[1].place(copy))

    def full(path: Path, record: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(runner, "write_json", full)
        assert run(study, copy, said) == 1
    assert "No space left on device" in said[-1]
    assert run(study, copy) == 0
    assert results(study, copy) == before


def test_a_study_from_the_command_line(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, folder = str(write_study(tmp_path)), tmp_path / "all" / "tiny"
    folder.parent.mkdir(parents=True)
    shutil.copytree(copy, folder)
    where = [file, "--scale", "smoke", "--output", str(tmp_path / "all")]
    assert program.main(["run", *where, "--free", "workers=1", "--threads", "1"]) == 0
    assert "9 of 9 parts are done" in capsys.readouterr().out
    assert program.main(["status", *where]) == 0
    told = capsys.readouterr().out
    assert "pretrain: 1 done\n" in told
    assert "left about 0.0 min" in told
    assert program.main(["table", *where, "--save", str(tmp_path / "kept.json")]) == 0
    assert "| FCMAE | 20% | finetune |" in capsys.readouterr().out
    plots = {path.name for path in (folder / "smoke" / "plots").glob("*")}
    assert plots == {"labels-labels.png", "labels-time.png", "labels-probes.png", "labels-FCMAE"}
    pictures = sorted(path.name for path in (folder / "smoke" / "plots" / "labels-FCMAE").iterdir())
    assert pictures == ["epoch_0001.png", "epoch_0002.png"]
    assert (tmp_path / "kept.json").read_text() == (folder / "smoke" / "results.json").read_text()
    assert program.main(["run", *where, "--free", "epochs=1"]) == 2
    assert "--free takes workers, device" in capsys.readouterr().err


def test_what_one_scale_did_another_takes(copy: Path, tmp_path: Path, worked_on: list[str], capsys) -> None:
    copy.rename(tmp_path / "tiny")
    scales = {"smoke": {"images": 60, "seeds": 2}, "more": {"images": 60}}
    study = str(write_study(tmp_path, seeds=[0, 1], scales=scales))
    assert program.main(["run", study, "--scale", "smoke", "--output", str(tmp_path)]) == 0
    first = list(worked_on)
    assert program.main(["run", study, "--scale", "more", "--output", str(tmp_path)]) == 0
    assert worked_on == first
    seeds = {part.key: part.seed for part in read_study(study, "more").parts}
    assert {seeds[key] for key in first} == {1}


def test_numbers_that_are_known_are_not_measured_again(
    copy: Path, tmp_path: Path, worked_on: list[str], capsys
) -> None:
    """Of another machine, whose folder is not there: more seeds are added to them."""
    file, folder, kept = write_study(tmp_path), tmp_path / "all" / "tiny", tmp_path / "kept.json"
    folder.parent.mkdir(parents=True)
    copy.rename(folder)
    where = [str(file), "--scale", "smoke", "--output", str(tmp_path / "all")]
    assert program.main(["table", *where, "--save", str(kept)]) == 0
    before = json.loads(kept.read_text())
    where = [str(write_study(tmp_path, seeds=[0, 1])), "--scale", "smoke", "--output", str(tmp_path / "new")]
    where += ["--known", str(kept)]
    assert program.main(["status", *where]) == 0
    assert "pretrain: 1 open" in capsys.readouterr().out
    assert program.main(["run", *where]) == 0
    study = read_study(str(file), "smoke")
    assert sorted(worked_on) == sorted(part.key for part in study.parts if part.seed == 1)
    assert program.main(["table", *where, "--save", str(kept)]) == 0
    after = json.loads(kept.read_text())
    assert after["missing"] == 0
    assert [row for row in after["numbers"] if row["seed"] == 0] == before["numbers"]
    assert len(after["numbers"]) == 2 * len(before["numbers"])
    assert [row["seed"] for row in after["curves"]] == [0, 1]
    assert program.main(["run", *where]) == 0
    assert "0 of 0 parts" in capsys.readouterr().out
    fewer, elsewhere = [row for row in after["numbers"] if row["seed"] == 0], tmp_path / "elsewhere.json"
    elsewhere.write_text(json.dumps({**after, "scale": "other", "numbers": fewer}))
    for file in (elsewhere, kept):  # numbers of other scales count; of other parts, or of other questions, they do not
        found = json.loads(file.read_text())
        found["numbers"].append({**fewer[0], "part": "of something else"})
        found["curves"].append({"question": "another", "arm": "FCMAE", "seed": 0, "knn": []})
        file.write_text(json.dumps(found))
    assert program.main(["status", *where[:4], str(tmp_path / "third"), "--known", str(elsewhere)]) == 0
    assert "pretrain: 1 open" in capsys.readouterr().out
    assert program.main(["table", *where, str(elsewhere), "--save", str(tmp_path / "both.json")]) == 0
    assert json.loads((tmp_path / "both.json").read_text()) == after
    capsys.readouterr()
    kept.write_text(json.dumps({**after, "study": "other"}))
    assert program.main(["run", *where]) == 2
    assert "kept.json: holds no numbers of tiny" in capsys.readouterr().err
    for damaged in ({"numbers": [{"part": "x"}]}, {"curves": None}, {"measured_on": {"torch": "2"}}):
        kept.write_text(json.dumps({**after, **damaged}))
        assert program.main(["run", *where]) == 2
        assert "kept.json: is damaged" in capsys.readouterr().err
