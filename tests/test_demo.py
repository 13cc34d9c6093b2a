"""The demonstration, shortened: what it writes and says, not how good it gets in a few steps."""

from __future__ import annotations

import json
import re

import pytest

from ssod_fast.demo import BASELINE, METHOD, DemoConfig, run_demo, training_config

SHORT = DemoConfig(train_images=30, val_images=6, iters=8, evaluations=2, preview_images=2, percent=20.0, batch=(2, 2))


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    said: list[str] = []
    return run_demo(tmp_path_factory.mktemp("demo"), seed=1, config=SHORT, quiet=True, say=said.append), said


def test_report_shows_both_runs(short):
    result, _ = short
    page = result.report.read_text(encoding="utf-8")
    for words in ("supervised teacher", "mixpl teacher", "mixpl student", "every setting that both have", "AP by class", "Loss mixup/"):
        assert words in page, words
    assert page.count("data:image/jpeg;base64,") >= 4
    assert "Careful" not in page


def test_result_is_said_in_words(short):
    result, said = short
    text = "\n".join(said)
    assert re.search(r"supervised, 6 labelled images +\d+\.\d +\d+\.\d +\d+\n", text)
    assert re.search(r"MixPL, the same \+ 24 unlabelled +\d+\.\d +\d+\.\d +\d+\n", text)
    assert re.search(r"MixPL is \d+\.\d AP50 points (better|worse) than the baseline", text)
    assert said[-1] == f"report: {result.report}"


def test_both_runs_draw_the_same_labels(short):
    result, _ = short
    heads = {m: json.loads((folder / "metrics.jsonl").read_text().splitlines()[0]) for m, folder in result.runs.items()}
    assert heads[BASELINE]["split_hash"] == heads[METHOD]["split_hash"] is not None
    assert heads[BASELINE]["labeled"] == heads[METHOD]["labeled"] == 6


def test_settings_differ_in_the_method_alone(tmp_path):
    one, other = (training_config(tmp_path, method, 0, DemoConfig()).__dict__ for method in (BASELINE, METHOD))
    assert {key for key in one if one[key] != other[key]} == {"method", "name", "batch"}
    assert other["batch"].partition(":")[0] == one["batch"]
    assert one["method"].ema == other["method"].ema


def test_the_same_seed_gives_the_same_numbers(short, tmp_path):
    again = run_demo(tmp_path, seed=1, config=SHORT, quiet=True, say=lambda _: None)
    assert again.metrics == short[0].metrics


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"iters": 0}, "iters must be at least 1, got 0"),
        ({"percent": 100.0}, "percent must lie in"),
        ({"batch": (1, 0)}, "batch must hold"),
    ],
)
def test_bad_sizes(change, message):
    with pytest.raises(ValueError, match=message):
        DemoConfig(**change)
