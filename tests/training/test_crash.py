"""Runs that are killed, and runs of two processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from ssod_fast.training.checkpoint import load_last
from ssod_fast.training.config import write_config
from ssod_fast.training.run_folder import last_path
from ssod_fast.training.trainer import train

from .conftest import MakeConfig
from .test_trainer import assert_same_weights, curves, of_type

KILLED = """
    import os, signal, sys
    from pathlib import Path
    from ssod_fast.training.config import config_from_tree, read_tree
    from ssod_fast.training.trainer import Trainer

    class Killed(Trainer):
        def _iterate(self, want_preview):
            if self.it + 1 == int(sys.argv[2]):
                os.kill(os.getpid(), signal.SIGKILL)
            return super()._iterate(want_preview)

    Killed(config_from_tree(read_tree(Path(sys.argv[1])))).run()
"""

RANK = """
    import hashlib, json, os, sys
    from pathlib import Path
    import torch
    from ssod_fast.training.config import config_from_tree, read_tree
    from ssod_fast.training.trainer import Trainer

    torch.set_num_threads(1)

    class OneSided(Trainer):
        def _build(self, start):
            super()._build(start)
            if self.rank == 1:  # this rank's teacher never sees anything
                see = self.model.teacher.predict
                self.model.teacher.predict = lambda *a, **k: [{n: v[:0] for n, v in p.items()} for p in see(*a, **k)]

    trainer = OneSided(config_from_tree(read_tree(Path(sys.argv[1]))))
    assert trainer.processes == 2
    result = trainer.run()
    weights = torch.cat([p.detach().flatten() for p in trainer.model.student.parameters()])
    images = len(trainer.referee._evaluator("student")._rows)
    print("RESULT" + json.dumps({
        "rank": trainer.rank, "status": result.status, "metrics": result.metrics["teacher"]["AP"],
        "images": images, "hash": hashlib.sha256(weights.numpy().tobytes()).hexdigest(),
    }))
    torch.distributed.destroy_process_group()
"""


def python(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    return subprocess.Popen(
        command, env={**os.environ, **environment, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("at", [3, 6])  # before and after the cache is full
def test_killed_run_continues_bit_for_bit(make_config: MakeConfig, tmp_path: Path, at: int) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # Saved after iterations 2, 4, ...: one iteration was done for nothing, and logged windows of 2 straddle the checkpoint.
    settings = {"iters": 8, "save_every": 2, "eval_every": 4, "log_every": 3, "threads": 1}
    whole, parts = make_config(name="whole", **settings), make_config(name="parts", **settings)
    train(whole)
    write_config(parts, tmp_path / "parts.yaml")
    child = python(KILLED, str(tmp_path / "parts.yaml"), str(at))
    _, err = child.communicate(timeout=120)
    assert child.returncode == -signal.SIGKILL, err
    assert load_last(last_path(parts.folder))[0]["it"] == (at - 1) // 2 * 2
    assert train(parts).status == "finished"
    torch.set_num_threads(threads)
    assert curves(parts.folder) == curves(whole.folder)
    assert of_type(parts.folder, "eval") == of_type(whole.folder, "eval")
    assert_same_weights(parts.folder, whole.folder)


def test_two_ranks_with_and_without_pseudo_labels(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(iters=3, accumulate=2, threads=1)
    write_config(config, tmp_path / "config.yaml")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": "2"}
    ranks = [python(RANK, str(tmp_path / "config.yaml"), RANK=str(r), LOCAL_RANK=str(r), **common) for r in range(2)]
    outputs = []
    for rank in ranks:
        out, err = rank.communicate(timeout=180)
        assert rank.returncode == 0, err
        outputs.append(json.loads(out.partition("RESULT")[2]))
    assert [o["status"] for o in outputs] == ["finished"] * 2
    assert outputs[0]["hash"] == outputs[1]["hash"]  # gradients were reduced
    assert [o["images"] for o in outputs] == [4, 4]  # each image once
    assert outputs[0]["metrics"] == outputs[1]["metrics"]
    assert len(load_last(last_path(config.folder))[0]["ranks"]) == 2
    assert [line["it"] for line in of_type(config.folder, "train")] == [1, 2, 3]


def test_interrupt_of_the_whole_group_with_loader_processes(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(iters=500, workers=2, log_every=2, eval_every=500, threads=1)
    write_config(config, tmp_path / "config.yaml")
    command = [sys.executable, "-m", "ssod_fast.cli", "train", "--config", str(tmp_path / "config.yaml"), "--json"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert child.stderr is not None
    while not (line := child.stderr.readline()).startswith("it 4/"):
        assert line, "the run ended before it was interrupted"
    os.killpg(child.pid, signal.SIGINT)  # what a terminal does on Ctrl-C
    out, err = child.communicate(timeout=120)
    assert child.returncode == 130, err
    assert "Traceback" not in err
    result = json.loads(out)
    assert result["status"] == "interrupted"
    assert load_last(last_path(config.folder))[0]["it"] == result["it"] >= 4
