"""The finished page: complete, partial, damaged and hostile run folders."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from ssod_fast.report import build_report, html, plots, previews, tables
from ssod_fast.report.charts import sections
from ssod_fast.report.runs import read_runs
from ssod_fast.report.svg import COLORS
from ssod_fast.report.verdict import verdict

VOID = {"meta", "input", "br", "img", "link", "hr"}


class _Page(HTMLParser):
    """Collects text, ids and addresses, and checks that tags are nested."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.addresses, self.words = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self._attributes(attrs)

    def handle_startendtag(self, tag, attrs):
        self._attributes(attrs)

    def _attributes(self, attrs):
        self.ids += [value for key, value in attrs if key == "id"]
        self.addresses += [value for key, value in attrs if key in ("href", "src", "xlink:href")]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def _read(path):
    text = path.read_text(encoding="utf-8")
    return text, _Page(text)


@pytest.fixture(scope="module")
def pair(tmp_path_factory, write_run):
    root = tmp_path_factory.mktemp("runs")
    return [write_run(root / "supervised", method="supervised"), write_run(root / "mixpl")]


@pytest.fixture(scope="module")
def overlay(pair):
    return build_report(pair)


def test_one_self_contained_file(overlay, pair):
    text, page = _read(overlay)
    assert overlay == pair[0].parent.resolve() / "report.html"
    assert all(address.startswith(("data:image/jpeg;base64,", "#")) for address in page.addresses)
    assert not re.search(r"(?:https?:)?//(?!www\.w3\.org)\w", re.sub(r"base64,[^\"]*", "", text))
    assert "<script" not in text
    assert len(text) < 8_000_000


def test_ids_are_unique_and_references_resolve(overlay):
    text, page = _read(overlay)
    assert len(page.ids) == len(set(page.ids))
    wanted = {address[1:] for address in page.addresses if address.startswith("#")} | set(re.findall(r"url\(#([^)]*)\)", text))
    assert wanted
    assert wanted <= set(page.ids)


def test_every_figure_has_words(overlay):
    text, _ = _read(overlay)
    pictures = [tag for tag in re.findall(r"<svg[^>]*>", text) if "aria-hidden" not in tag]
    assert len(pictures) > 30
    assert all('role="img"' in tag and re.search(r'aria-label="[^"]{10,}"', tag) for tag in pictures)
    assert not any(color.stand_in in text for color in COLORS)


def test_verdict_names_margin_and_quality(pair):
    sentences = verdict(read_runs(pair))
    assert re.fullmatch(r"mixpl is \d+\.\d AP50 points above the supervised baseline\. Both share the labelled images.*", sentences[0])
    assert any("85 % of the pseudo boxes above score 0.4 are right and they find 55 % of the objects" in s for s in sentences)
    assert any("the pseudo-label loss was on in" in s for s in sentences)


def test_verdict_warns_of_an_unfair_comparison(tmp_path, write_run):
    runs = [write_run(tmp_path / "supervised", method="supervised", iters=300), write_run(tmp_path / "mixpl", iters=600)]
    assert "Careful, the runs differ in more than the method: iters." in verdict(read_runs(runs))[0]


@pytest.mark.parametrize(
    ("teacher", "words"), [(0.30, "worse than its student"), (0.405, "are level in AP50"), (0.5, "10.0 AP50 points ahead")]
)
def test_verdict_compares_teacher_and_student(tmp_path, teacher, words):
    line = {"type": "eval", "it": 5, "teacher": {"AP": 0.1, "AP50": teacher}, "student": {"AP": 0.1, "AP50": 0.4}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line))
    assert any(words in sentence for sentence in verdict(read_runs([tmp_path])))


def test_seeds_are_averaged(tmp_path, write_run):
    runs = [write_run(tmp_path / f"mixpl{seed}", seed=seed) for seed in range(3)]
    assert re.search(r"AP50 \d+\.\d ± \d+\.\d \(mean ± standard deviation of 3 runs\)", verdict(read_runs(runs))[0])


def test_only_repeats_are_averaged(tmp_path, write_run):
    runs = [write_run(tmp_path / "long", iters=600), write_run(tmp_path / "short", iters=300), write_run(tmp_path / "again", seed=1)]
    sentences = verdict(read_runs(runs))
    assert re.match(r"The teacher of long, again reaches AP50 .* of 2 runs\), AP .* after 600 iterations", sentences[0])
    assert re.match(r"The teacher of short reaches AP50 \d+\.\d, AP \d+\.\d after 300 iterations", sentences[1])


def test_each_method_is_compared_with_the_baseline_most_like_it(tmp_path, write_run):
    names = [(method, iters) for method in ("supervised", "mixpl") for iters in (300, 600)]
    runs = [write_run(tmp_path / f"{method}{iters}", method=method, iters=iters) for method, iters in names]
    sentences = verdict(read_runs(runs))
    for sentence, iters in zip(sentences, (300, 600), strict=False):
        words = rf"mixpl{iters} is \d+\.\d AP50 points above the supervised baseline supervised{iters}\. Both share the labelled images"
        assert re.match(words, sentence)
    assert "difference to the supervised run supervised300 at its last evaluation" in tables.ap_table(read_runs(runs))


def test_means_over_other_numbers_of_repeats_are_named(tmp_path, write_run):
    runs = [write_run(tmp_path / "base", method="supervised"), *(write_run(tmp_path / f"mixpl{seed}", seed=seed) for seed in range(2))]
    assert "Careful, the runs differ in more than the method: number of repeats." in verdict(read_runs(runs))[0]


def _edit_lines(folder, change):
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(change(json.loads(line))) + "\n" for line in path.read_text().splitlines()))


def test_classes_without_recall_are_named(tmp_path, write_run):
    folder = write_run(tmp_path / "mixpl")

    def forget(line):
        if line["type"] == "quality":
            line["per_class"]["star"]["recall"] = 0.0
        return line

    _edit_lines(folder, forget)
    assert any("they can be trusted. Of some classes they find almost nothing: star." in s for s in verdict(read_runs([folder])))


def test_stand_in_for_the_hidden_truth_is_named(tmp_path, write_run):
    folder = write_run(tmp_path / "mixpl")
    assert "as a stand-in" not in build_report([folder]).read_text()
    _edit_lines(folder, lambda line: {**line, "split_hash": None} if line["type"] == "run" else line)
    _edit_lines(folder, lambda line: {**line, "source": "val"} if line["type"] == "quality" else line)
    for path in (folder / "pseudo_preview").glob("step_*.json"):
        path.write_text(json.dumps([{**entry, "truth": None} for entry in json.loads(path.read_text())]))
    text = build_report([folder]).read_text()
    assert "precision, recall and true objects are those of the validation images, as a stand-in" in text
    assert "judged by the validation images, as a stand-in" in text
    assert 'class="show-teacher"' in text
    assert 'class="show-truth"' not in text
    assert "split hash" not in text


def test_sections_hold_every_promised_figure(pair):
    keys = {panel.key for section in sections(read_runs(pair)) for panel in section.panels}
    wanted = {"ap_ap", "ap_ap50", "ap_size", "ap_class", "pseudo_precision", "pseudo_recall", "pseudo_iou", "pseudo_count", "pseudo_gate"}
    wanted |= {"threshold", "precision_recall", "size_recall", "tail_1", "class_quality_1", "loss", "lr", "time_split", "speed"}
    wanted |= {
        f"loss_{kind}_{term}" for kind in ("sup", "mixup", "mosaic") for term in ("classification", "bbox_regression", "bbox_ctrness")
    }
    assert keys == wanted | {"ap_ap75", "pseudo_raw", "pseudo_score"}


def test_methods_without_gates_have_their_own_figures(tmp_path, pair, write_run):
    runs = read_runs([pair[0], write_run(tmp_path / "semi_detr", method="semi_detr")])
    panels = {panel.key: panel for section in sections(runs) for panel in section.panels}
    assert panels.keys() >= {"pseudo_count", "pseudo_mined", "pseudo_cost", "loss_unsup_classification"}
    assert "pseudo_gate" not in panels
    assert panels["ap_ap50"].caption == "Dotted: from here on each object is matched with one query."
    assert "semi_detr reliable" in panels["pseudo_mined"].alt
    assert not any("was on in" in sentence for sentence in verdict(runs))
    assert any("AP50 points above the supervised baseline" in sentence for sentence in verdict(runs))


def test_no_switch_is_marked_that_the_run_did_not_reach(tmp_path, write_run):
    short = write_run(tmp_path / "short", method="semi_detr", iters=600)
    text = (short / "metrics.jsonl").read_text().replace('"switch_at": 300', '"switch_at": 900')
    (short / "metrics.jsonl").write_text(text)
    panels = {panel.key: panel for section in sections(read_runs([short])) for panel in section.panels}
    assert panels["ap_ap50"].caption == ""


def test_figures_are_saved_in_plain_colours(overlay):
    saved = sorted((overlay.parent / "plots").glob("*.svg"))
    assert len(saved) > 20
    assert not any("fe01" in path.read_text() for path in saved)


def test_table_shows_differences_and_gaps(overlay):
    _, page = _read(overlay)
    words = " ".join(page.words)
    assert "mixpl teacher" in words
    assert "supervised student" in words
    assert re.search(r"\+\d+\.\d", words)
    assert "n/a" in words


def test_image_layers_share_one_jpeg(overlay):
    text, _ = _read(overlay)
    assert text.count('<use href="#shot1-') == previews.MAX_IMAGES_OVERLAID * previews.MAX_STEPS
    assert text.count("base64,") == previews.MAX_IMAGES_OVERLAID + 2 * previews.MAX_MIXED
    assert text.count('class="truth"') == previews.MAX_IMAGES_OVERLAID * previews.MAX_STEPS
    assert 'class="show-student"' in text


def test_killed_run_says_what_is_missing(tmp_path, write_run):
    folder = write_run(tmp_path / "mixpl", finished=False, quality=False, previews=False)
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text()[:-40])
    (folder / "env.json").unlink()
    words = " ".join(_read(build_report([folder]))[1].words)
    assert "did not finish" in words
    assert "is not valid JSON (the run was probably stopped while writing it)" in words
    assert "No pseudo-label quality was logged" in words
    assert "No run wrote preview images" in words
    assert "env.json is missing" in words


@pytest.mark.parametrize(
    "content", ["", "\n", "garbage", '{"type": "run"}', '{"type": "eval", "it": 5, "teacher": {}, "student": {"AP": -1}}']
)
def test_nearly_empty_metrics_still_give_a_page(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_text(content)
    words = " ".join(_read(build_report([tmp_path], tmp_path / "out" / "page.html"))[1].words)
    assert "What is missing" in words


def test_values_that_are_not_finite(tmp_path, write_run):
    folder = write_run(tmp_path / "mixpl")
    broken = '{"type": "train", "it": 605, "loss": NaN, "losses": {"sup/classification": Infinity}, "lr": null, "pseudo": {"gate": null}}\n'
    (folder / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text() + broken)
    text, page = _read(build_report([folder]))
    assert "not finite in 1 logged iteration(s): 605" in " ".join(page.words)
    assert "nan" not in re.sub(r"base64,[^\"]*", "", text).lower().replace("anan", "")


def test_damaged_previews_do_not_break_the_page(tmp_path, write_run):
    folder = write_run(tmp_path / "mixpl")
    preview = folder / "pseudo_preview"
    (preview / "images" / "0.jpg").write_bytes(b"not a jpeg")
    (preview / "images" / "1.jpg").unlink()
    (preview / "step_000100.json").write_text('[{"image_id": 0')
    entries = json.loads((preview / "step_000600.json").read_text())
    entries[2] |= {"truth": None, "teacher": {"boxes": [[0, 0, None, 5], [1, 2, 3]], "labels": [0, 99], "scores": [0.9, 0.8]}}
    entries[3]["teacher"] = {"boxes": [[1, 2, 30, 40]], "labels": [99], "scores": [0.8]}
    (preview / "step_000600.json").write_text(json.dumps(entries))
    words = " ".join(_read(build_report([folder]))[1].words)
    assert "Image 0 cannot be read" in words
    assert "Image 1 cannot be read" in words
    assert "class 99 .80" in words


def test_text_of_a_run_cannot_become_markup(tmp_path, write_run):
    evil = '<script>alert("x")</script>$_{'
    folder = write_run(tmp_path / "mixpl", classes=[evil, "b&b", "c", "d", "e", "f"], name=evil)
    line = {"type": "event", "level": "warning", "it": 5, "message": evil}
    (folder / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text() + json.dumps(line) + "\n")
    text, page = _read(build_report([folder]))
    assert "<script" not in text
    assert evil in " ".join(page.words)


def test_many_classes_and_many_runs_stay_moderate(tmp_path, write_run):
    names = [f"class {i}" for i in range(80)]
    runs = [write_run(tmp_path / f"run{i}", classes=names, seed=i) for i in range(6)]
    assert build_report(runs, tmp_path / "all.html").stat().st_size < 8_000_000


def test_large_previews_are_shrunk(tmp_path):
    from PIL import Image

    Image.effect_noise((1600, 1200), 90).convert("RGB").save(tmp_path / "big.jpg", quality=95)
    picture = previews.load_picture(tmp_path / "big.jpg")
    assert (picture.width, picture.height) == (1600, 1200)
    assert len(picture.uri) < 200_000


def test_importing_the_report_needs_no_extra():
    code = "import sys, ssod_fast.report; sys.exit(any(name in sys.modules for name in ('matplotlib', 'PIL', 'torchvision')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_missing_matplotlib_names_the_extra(pair, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install \"ssod-fast\[train\]\""):
        build_report(pair, tmp_path / "r.html")


def test_default_place_of_one_run(pair):
    assert html._default_target(pair[:1]) == pair[0] / "report.html"


def test_refined_boxes_are_plotted_and_summed_up(tmp_path, write_run):
    runs = read_runs([write_run(tmp_path / "supervised", method="supervised"), write_run(tmp_path / "ssd_det", method="ssd_det")])
    found = {panel.key: panel for section in sections(runs) if section.title == "Refined boxes" for panel in section.panels}
    assert list(found) == ["refined_iou", "bag_iou", "bag_best_iou"]
    assert "ssd_det refined: 0.4" in found["refined_iou"].alt
    assert "supervised" not in found["bag_iou"].alt
    assert any("ssd_det: refined boxes overlap the clean ones by 0.6" in s and "they are better." in s for s in verdict(runs))
    assert not any("pseudo" in problem for run in runs for problem in run.problems)
    text, _ = _read(build_report([run.folder for run in runs], tmp_path / "report.html"))
    assert "Mean IoU of the proposals of a bag" in text


def test_refined_boxes_that_are_worse_are_called_worse(tmp_path, write_run):
    folder = write_run(tmp_path / "ssd_det", method="ssd_det")
    lines = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "diagnostics" in line:
            line["diagnostics"]["refined_iou"] = 0.2
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert any("they are worse: do not use them" in sentence for sentence in verdict(read_runs([folder])))


def test_axes_of_zeros_begin_at_zero() -> None:
    figure = plots.bars("k", "Bars", ["a", "b"], [plots.Bars("run", [0.0, 0.0], 0)])
    assert figure is not None
    ticks = re.findall("<text[^>]*>([\u2212-]?[0-9.]+)</text>", figure.svg)
    assert ticks
    assert not [t for t in ticks if t[0] in "\u2212-"], ticks
