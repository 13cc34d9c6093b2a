from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ssod_fast.training.checkpoint import (
    DetectorInfo,
    differing_keys,
    find_detector,
    has_last,
    load_last,
    load_matching,
    read_detector_info,
    rng_state,
    save_detector,
    save_last,
    set_rng_state,
)
from ssod_fast.training.files import previous

INFO = DetectorInfo(
    "torchvision:fcos_mobilenet_v2_fpn", {"fpn_channels": 32}, ["a"], [1], {"max_side": 64}, "teacher", "mixpl", 5, {"AP": 0.5}
)


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_random_states_round_trip_through_a_file(tmp_path: Path) -> None:
    np.random.standard_normal()  # leaves a cached value behind
    save_last(tmp_path / "last.pt", {"rng": rng_state()})
    expected = [draw() for _ in range(3)]
    state, note = load_last(tmp_path / "last.pt")
    set_rng_state(state["rng"])
    assert [draw() for _ in range(3)] == expected
    assert note is None


def test_damaged_file_falls_back_to_the_previous_one(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    assert not has_last(path)
    with pytest.raises(ValueError, match="no readable checkpoint"):
        load_last(path)
    for it in (1, 2):
        save_last(path, {"it": it})
    path.write_bytes(path.read_bytes()[:100])
    state, note = load_last(path)
    assert state["it"] == 1
    assert note is not None
    assert note.endswith("continuing from last.previous.pt")
    path.unlink()
    assert has_last(path)
    assert load_last(path)[0]["it"] == 1


def test_empty_file_falls_back_to_the_previous_one(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_last(path, {"it": 1})
    save_last(path, {"it": 2})
    path.write_bytes(b"")
    state, note = load_last(path)
    assert state["it"] == 1
    assert note is not None
    assert "it ends too early" in note


def test_saves_after_a_kill_between_the_renames_write_into_no_kept_file(tmp_path: Path) -> None:
    """The newest file then has two names, and a third, temporary one must not become what a later save writes into."""
    path = tmp_path / "last.pt"
    save_last(path, {"it": 1})
    os.link(path, previous(path))  # what a kill after the first rename leaves
    os.link(path, previous(path).with_name(f".{previous(path).name}.tmp"))  # and one before it
    for it in (2, 3, 4):
        kept = path.stat().st_ino
        save_last(path, {"it": it})
        assert load_last(path)[0]["it"] == it
        assert load_last(previous(path))[0]["it"] == it - 1
        assert previous(path).stat().st_ino == kept  # a name, not a copy
        assert not list(tmp_path.glob(".*.tmp"))


def test_other_format_is_refused(tmp_path: Path) -> None:
    torch.save({"format": 99}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="has checkpoint format 99, this version reads 1"):
        load_last(tmp_path / "last.pt")


def test_kill_during_save_leaves_a_loadable_file(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    code = """
        import sys, torch
        from pathlib import Path
        from ssod_fast.training.checkpoint import save_last
        for it in range(10_000):
            save_last(Path(sys.argv[1]), {"it": it, "x": torch.full((200_000,), float(it))})
            print(it, flush=True)
    """
    for delay in (0.01, 0.03, 0.05):
        child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(path)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        for _ in range(3):
            child.stdout.readline()
        time.sleep(delay)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
        state, _ = load_last(path)
        assert torch.equal(state["x"], torch.full((200_000,), float(state["it"])))
        assert load_last(previous(path))[0]["it"] in (state["it"] - 1, state["it"])  # the same between the two renames


def test_detector_file_describes_itself(tmp_path: Path) -> None:
    path = tmp_path / "weights" / "best_teacher.safetensors"
    path.parent.mkdir()
    save_detector(path, nn.Linear(2, 3), INFO)
    assert read_detector_info(path) == INFO
    assert find_detector(path) == find_detector(tmp_path) == find_detector(tmp_path, "teacher") == path
    with pytest.raises(FileNotFoundError, match=r"run folder with weights/best_student.safetensors"):
        find_detector(tmp_path, "student")


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="does not describe its detector"):
        read_detector_info(tmp_path / "x.safetensors")
    (tmp_path / "y.safetensors").write_text("not a tensor")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        read_detector_info(tmp_path / "y.safetensors")


def test_load_matching_says_what_stayed() -> None:
    target = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    source = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 5))
    assert load_matching(target, source.state_dict()) == ["1.weight", "1.bias"]
    assert torch.equal(target[0].weight, source[0].weight)


def test_differing_keys_are_dotted() -> None:
    old = {"lr": 0.1, "method": {"thr": 0.7, "x": 1}, "out": "a"}
    new = {"lr": 0.1, "method": {"thr": 0.5, "x": 1}, "out": "b"}
    assert differing_keys(old, new, ignore=("out",)) == ["method.thr: 0.7 -> 0.5"]
