"""The command `ssod-fast`.

Exit codes: 0 fine, 1 training failed or something was found, 2 wrong use, 3 data that cannot be read, 130 interrupted.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from .output import Output

OK, FAILED, USAGE, DATA, INTERRUPTED = 0, 1, 2, 3, 130
PIP = 'pip install "ssod-fast[train]"'

# Command -> module of this package; imported when asked for, because most need the extra [train].
COMMANDS = {
    "train": "train",
    "val": "val",
    "predict": "predict",
    "split": "split",
    "noise": "noise",
    "refine": "refine",
    "report": "report",
    "demo": "demo",
    "ops": "ops",
}

USAGE_TEXT = """usage: ssod-fast COMMAND [OPTIONS]

  train LABELED [UNLABELED]   train a detector
  val CHECKPOINT DATA         evaluate teacher and student
  predict CHECKPOINT IMAGES   boxes of a detector on images, as JSON
  split JSON                  draw labelled and unlabelled parts
  noise DATA                  move the boxes of a set at random, for work on inaccurate labels
  refine RUN DATA             correct inaccurate boxes with the refiner of a run of ssd_det
  report RUN [RUN...]         write one self-contained report.html
  demo                        baseline and MixPL on synthetic scenes, no data needed
  ops                         what each op runs on here

  --json      machine-readable result on standard output
  --quiet     warnings only
  COMMAND --help lists the options of a command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    output = Output(as_json="--json" in arguments, quiet="--quiet" in arguments)
    arguments = [a for a in arguments if a not in ("--json", "--quiet")]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE_TEXT)
        return OK if arguments else USAGE
    name, rest = arguments[0], arguments[1:]
    if name == "--version":
        from ssod_fast import __version__

        print(f"ssod_fast {__version__}")
        return OK
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        return output.error(
            USAGE, f"unknown command {name!r}, " + (f"did you mean {close[0]!r}?" if close else f"known: {', '.join(COMMANDS)}")
        )
    return _guarded(COMMANDS[name], rest, output)


def _guarded(module: str, rest: list[str], output: Output) -> int:
    """Runs a command and turns what goes wrong into an exit code and one line."""
    try:
        result = int(importlib.import_module(f"ssod_fast.cli.{module}").run(rest, output))
        sys.stdout.flush()  # a reader that is gone shows here, not when the process ends
        return result
    except BrokenPipeError:  # `... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        return output.error(INTERRUPTED, "interrupted")
    except SystemExit as stop:  # tyro has printed help (0) or what is wrong with the options (2)
        return stop.code if isinstance(stop.code, int) else USAGE
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("ssod_fast", ""):
            raise
        return output.error(USAGE, f"this command needs {error.name}: {PIP}")
    except Exception as error:
        code = _code_of(error)
        if code is None:
            raise
        return output.error(code, str(error))


def _code_of(error: Exception) -> int | None:
    """Exit code of errors that are about the user's input or machine; None for a fault of the program."""
    from ssod_fast.data.image_io import UnreadableImageError
    from ssod_fast.report.runs import NoRunError
    from ssod_fast.training.sets import DataError
    from ssod_fast.training.trainer import TrainingFailed
    from ssod_fast.training.tree import ConfigError

    if isinstance(error, ConfigError):
        return USAGE
    if isinstance(error, (DataError, NoRunError, UnreadableImageError, FileNotFoundError)):
        return DATA
    return FAILED if isinstance(error, (TrainingFailed, PermissionError, ImportError)) else None
