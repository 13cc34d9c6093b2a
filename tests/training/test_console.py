from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import textwrap

import torch

from ssod_fast.data.records import ImageRecord
from ssod_fast.training.console import Console, clock, eval_line, live_line, table
from ssod_fast.training.evaluation import STAT_NAMES
from ssod_fast.training.previews import spread
from ssod_fast.training.signals import StopSignal


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_live_line() -> None:
    pseudo = {"raw_per_image": 5.31, "kept_per_image": 4.1}
    losses = {"sup/a": 1.0, "sup/b": 0.12, "mixup/a": 0.84}
    line = live_line(1200, 90_000, losses, pseudo, 0.7, {"teacher": 0.312, "student": -1.0}, 2.0, 0.03, 21 * 2**30)
    assert line == (
        "it 1200/90000 | sup 1.12 mixup 0.84 | pseudo 5.3/img (kept 4.1) thr 0.7 | AP teacher 31.20 student n/a"
        " | 2.00 it/s data 3% | mem 21.0G | ETA 12:20:00"
    )
    assert live_line(1, 2, {"sup/a": 1.0}, None, None, {}, 0.0, 0.0, 0) == "it 1/2 | sup 1 | 0.00 it/s data 0% | ETA 0:00"
    overlaps = {"noisy_iou": 0.453, "refined_iou": 0.617}
    assert "| sup 1 | boxes IoU 0.45 -> 0.62 |" in live_line(1, 2, {"sup/a": 1.0}, None, None, {}, 0.0, 0.0, 0, overlaps)
    assert "boxes" not in live_line(1, 2, {"sup/a": 1.0}, None, None, {}, 0.0, 0.0, 0, {"left_out": 0.0})


def test_lines_without_a_terminal() -> None:
    stream = io.StringIO()
    with Console(stream=stream) as console:
        console.progress("one")
        console.progress("two")
        console.warn("careful")
    assert stream.getvalue() == "one\ntwo\nwarning: careful\n"


def test_one_line_on_a_terminal() -> None:
    stream = Terminal()
    with Console(stream=stream) as console:
        console.progress("first line")
        console.say("a message [with brackets]")
        console.progress("last line")
    text = stream.getvalue()
    assert "a message [with brackets]" in text
    assert "last line" in text


def test_quiet_and_silent_ranks() -> None:
    quiet, silent = io.StringIO(), io.StringIO()
    for console in (Console(quiet=True, stream=quiet), Console(active=False, stream=silent)):
        with console:
            console.say("x")
            console.progress("y")
            console.warn("z")
    assert (quiet.getvalue(), silent.getvalue()) == ("warning: z\n", "")


def test_small_texts() -> None:
    assert (clock(59.6), clock(3600), clock(3725)) == ("1:00", "1:00:00", "1:02:05")
    assert table([("a", 1), ("long", "x"), ("none", None)]) == "a     1\nlong  x"
    stats = dict.fromkeys(STAT_NAMES, 0.5) | {"AP_large": -1.0}
    line = eval_line(10, {"teacher": stats}, {"teacher": 0.6})
    assert line == "evaluation at 10: teacher AP 50.00 AP50 50.00 S/M/L 50.00/50.00/n/a (best 60.00)"


def test_preview_images_are_spread(tmp_path: object) -> None:
    records = [ImageRecord(i, __file__, None) for i in range(100)]  # type: ignore[arg-type]
    assert [r.id for r in spread(records, 4)] == [0, 33, 66, 99]
    assert [r.id for r in spread(records[:3], 16)] == [0, 1, 2]
    assert spread(records, 0) == spread([], 4) == []


def test_first_signal_waits_and_the_handler_is_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopSignal() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGINT)
        assert not stop  # until the loop asks for it, so that no rank leaves the others behind
        stop.agree(torch.device("cpu"), it=1)
        assert stop
    assert signal.getsignal(signal.SIGINT) is before


def test_second_signal_leaves_at_once() -> None:
    code = """
        import os, signal
        from ssod_fast.training.signals import StopSignal
        with StopSignal():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            print("still here")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "")
