"""The benchmark harness: gate before the clock, ratios and verdicts, raw rows, the report, and the parser of ptxas."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from no_sync import SyncError, no_sync

ROOT = Path(__file__).resolve().parent.parent
PTXAS = """\
ptxas info    : Compiling entry function '_Z12plain_kernelPf' for 'sm_90'
ptxas info    : Function properties for _Z12plain_kernelPf
    8 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 512 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_Z3fooPf' for 'sm_90'
ptxas info    : Function properties for _Z3fooPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
"""


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def load(name: str) -> Any:
    return importlib.import_module(name)


def sleeper(milliseconds: float) -> Any:
    return lambda: time.sleep(milliseconds / 1000)


def fake_machine() -> Any:
    return load("machine").Machine("cpu", "Test CPU 1", "Linux", 1, 1e9, "abc1234", "2026-01-02")


def fake_case(check: Any = lambda: None, **options: Any) -> Any:
    harness = load("harness")
    providers = {"ours": sleeper(1), "peer": sleeper(4)}
    return harness.Case("box_iou", "3x4", "iou", "float32", "uniform", 1000, providers, check, **options)


def test_nothing_is_timed_before_the_gate_has_passed() -> None:
    harness = load("harness")
    calls: list[int] = []

    def fail() -> None:
        raise AssertionError("wrong result")

    case = harness.Case("x", "1", "m", "float32", "uniform", 1, {"ours": lambda: calls.append(1)}, fail)
    with pytest.raises(AssertionError, match="wrong result"):
        harness.run_case(case, fake_machine(), harness.QUICK)
    assert not calls


def test_ours_must_come_first() -> None:
    harness = load("harness")
    case = harness.Case("x", "1", "m", "float32", "uniform", 1, {"peer": sleeper(1)}, lambda: None)
    with pytest.raises(ValueError, match="the first provider must be 'ours', got 'peer'"):
        harness.run_case(case, fake_machine(), harness.QUICK)


def test_ratios_and_verdicts() -> None:
    harness = load("harness")
    ours, peer = harness.run_case(fake_case(targets={"peer": 2.0}, ceiling_us=100.0), fake_machine(), harness.QUICK)
    assert 1000 <= ours.median_us < 4000 <= peer.median_us
    assert ours.p20_us <= ours.median_us <= ours.p80_us
    assert peer.ratio == pytest.approx(peer.median_us / ours.median_us)
    assert ours.limit_share == pytest.approx(1000 / 1e9 / (ours.median_us * 1e-6))
    assert peer.verdict == "met"
    assert ours.verdict == "missed"  # slower than its ceiling
    (_, slow) = harness.run_case(fake_case(targets={"peer": 100.0}), fake_machine(), harness.QUICK)
    assert slow.verdict == "missed"


def test_gpu_targets_are_about_one_timing() -> None:
    harness = load("harness")
    case = fake_case(targets={"peer": 2.0}, ceiling_us=5.0, wall_ceiling_us=60.0, peak_limit=8)
    assert harness.limits_of(case, "peer", "graph", "cuda", {}) == harness.Limits(ratio=2.0)
    assert harness.limits_of(case, "peer", "wall", "cuda", {}) == harness.Limits()
    assert harness.limits_of(case, "ours", "graph", "cuda", {}) == harness.Limits(time_us=5.0, peak=8)
    assert harness.limits_of(case, "ours", "wall", "cuda", {}) == harness.Limits(time_us=60.0)
    assert harness.limits_of(case, "ours", "event", "cuda", {}) == harness.Limits()
    assert harness.Limits(peak=8).verdict(None, 1.0, peak=9) == "missed"
    assert harness.Limits(peak=8).verdict(None, 1.0, peak=None) == ""


def test_overhead_over_a_peer_is_a_ceiling() -> None:
    harness, medians = load("harness"), {"ours": 15.0, "peer": 8.0}
    case = fake_case(overhead_us={"peer": 10.0})
    assert harness.limits_of(case, "ours", "wall", "cpu", medians) == harness.Limits(time_us=18.0)
    assert harness.limits_of(case, "ours", "wall", "cuda", medians) == harness.Limits(time_us=18.0)
    assert harness.limits_of(case, "ours", "graph", "cuda", medians) == harness.Limits()
    assert harness.limits_of(fake_case(overhead_us={"peer": 10.0}, ceiling_us=12.0), "ours", "wall", "cpu", medians).time_us == 12.0
    ours, _ = harness.run_case(fake_case(overhead_us={"peer": 1000.0}), fake_machine(), harness.QUICK)
    assert ours.verdict == "met"


@pytest.mark.gpu
def test_every_gpu_timing() -> None:
    harness, machine = load("harness"), load("machine")
    x = torch.rand(1 << 20, device="cuda")
    providers = {"ours": lambda: x + 1, "peer": lambda: (x + 1) * 2, "syncs": lambda: (x + 1).sum().item()}
    case = harness.Case("x", "1M", "add", "float32", "uniform", 1 << 23, providers, lambda: None, {"peer": 1.1}, eager_only=("syncs",))
    rows = harness.run_case(case, machine.describe("cuda", 1), harness.QUICK)
    assert {row.timing for row in rows if row.provider == "syncs"} == {"wall", "event"}
    graph = {row.provider: row for row in rows if row.timing == "graph"}
    assert graph["peer"].median_us > graph["ours"].median_us > 0
    assert graph["peer"].verdict == "met"


def gpu_cases() -> list[Any]:
    """What a GPU times, built on the CPU with small shapes where there are some."""
    cpu, builders = torch.device("cpu"), {stem: load("run").load(stem) for stem in load("run").available()}
    compose = builders.pop("compose").__globals__
    cases = [case for stem, builder in builders.items() for case in builder.__globals__.get("gpu_cases", builder)(cpu, True)]
    return [*cases, compose["mix_case"]("mosaic bilinear", compose["mosaic"](), 4, compose["SOURCE"], "bilinear", cpu, dense=True)]


def test_what_a_cuda_graph_captures_never_syncs() -> None:
    cases = gpu_cases()
    for case in cases:
        case.check()
        unguarded = {*case.eager_only, *(["ours"] if case.op == "compose" else [])}  # compose reads sizes that lie on the host, as here
        for name, call in case.providers.items():
            if name not in unguarded:
                with no_sync():
                    call()
    losses = [case.providers["torchvision loss"] for case in cases if "torchvision loss" in case.eager_only]
    with pytest.raises(SyncError), no_sync():
        losses[0]()


def test_no_graph_timing_without_ours() -> None:
    harness = load("harness")
    assert harness.timings_of(fake_case(), "cuda") == ("wall", "event", "graph")
    assert harness.timings_of(fake_case(eager_only=("peer",)), "cuda") == ("wall", "event", "graph")
    assert harness.timings_of(fake_case(eager_only=("ours",)), "cuda") == ("wall", "event")
    assert harness.timings_of(fake_case(), "cpu") == ("wall",)


def test_peak_counts_temporaries() -> None:
    machine = load("machine")
    if machine.peak_bytes(lambda: None, torch.device("cpu")) is None:
        pytest.skip("this system has no resettable peak of the resident size")
    lean = machine.peak_bytes(lambda: torch.ones(4 * 2**20), torch.device("cpu"))
    wasteful = machine.peak_bytes(lambda: torch.ones(4 * 2**20) + torch.ones(4 * 2**20), torch.device("cpu"))
    assert 15 * 2**20 <= lean <= 20 * 2**20
    assert 45 * 2**20 <= wasteful <= 52 * 2**20


def test_rotation_takes_the_inputs_in_turn() -> None:
    call = load("harness").rotate(lambda x: x, [(1,), (2,), (3,)])
    assert [call() for _ in range(5)] == [1, 2, 3, 1, 2]


def test_rounds_are_interleaved() -> None:
    harness = load("harness")
    order: list[str] = []

    def sampler(name: str) -> Any:
        return lambda repeats: order.append(name) or 0.002

    effort = harness.Effort(sample_s=0.001, case_s=0.0, min_rounds=3, max_rounds=3)
    harness.interleave({"ours": sampler("ours"), "peer": sampler("peer")}, effort)
    assert order[-12:] == ["ours", "ours", "peer", "peer"] * 3  # an untimed call, then the sample


def test_report_replaces_rows_of_the_op_and_states_what_was_missed(tmp_path: Path) -> None:
    harness, report = load("harness"), load("report")
    rows = harness.run_case(fake_case(targets={"peer": 100.0}), fake_machine(), harness.QUICK)
    path = tmp_path / "test-cpu-1.csv"
    report.merge(path, rows)
    report.merge(path, rows)
    with path.open(newline="") as file:
        assert [record["provider"] for record in csv.DictReader(file)] == ["ours", "peer"]
    (tmp_path / "ptxas.csv").write_text("file,kernel\nx.cu,foo\n")  # another kind of csv in the same folder
    report.write_report(tmp_path, tmp_path / "RESULTS.md")
    text = (tmp_path / "RESULTS.md").read_text()
    assert "Targets: 0 met, 1 missed." in text
    assert "- box_iou, iou, 3x4, uniform, wall: " in text
    assert "against peer, wanted 100x" in text
    assert "commit `abc1234`" in text


def test_report_without_rows(tmp_path: Path) -> None:
    load("report").write_report(tmp_path, tmp_path / "RESULTS.md")
    assert "No rows yet." in (tmp_path / "RESULTS.md").read_text()


def test_unknown_op_is_refused_before_anything_runs() -> None:
    with pytest.raises(SystemExit, match=r"no benchmark named 'nothing'; there are .*box_iou"):
        load("run").load("nothing")


def test_whole_models_agree_with_transformers() -> None:
    pytest.importorskip("transformers")
    path = ROOT / "benchmarks" / "dropin" / "transformers_models.py"
    spec = importlib.util.spec_from_file_location("benchmark_transformers_models", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    model, cpu = module.deformable_detr(quick=True), torch.device("cpu")
    for build in (module.inference_case, module.training_case):
        case = build("small", model, (64, 96), cpu)
        case.check()
        case.providers["ours"]()


def test_the_folder_ops_is_not_importable() -> None:
    load("run").load("box_iou")
    assert "ops" not in sys.modules


def test_ptxas_records() -> None:
    first, second = load("compile_report").parse(PTXAS)
    assert first == {
        "name": "_Z12plain_kernelPf",
        "arch": "sm_90",
        "stack": "8",
        "stores": "16",
        "loads": "24",
        "registers": "32",
        "smem": "512",
    }
    assert (second["registers"], second["smem"]) == ("8", "0")
    mangled = ["_Z12plain_kernelPf", "_Z3fooIfL4Mode2EEvPT_"]
    assert load("compile_report").readable(mangled) == ["plain_kernel", "foo<float, (Mode)2>"]
