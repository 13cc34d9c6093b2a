"""Detectors of transformers by name and from folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from detectors.hf_models import NAMES, PAIR, RT_DETR, TARGETS, make
from tiny_transformers import RESNET, build

from ssod_fast.detectors import PixelStats, build_detector
from ssod_fast.detectors.transformers.families import FAMILIES, UNIT
from ssod_fast.dropin import transformers as dropin
from ssod_fast.training.checkpoint import DetectorInfo, load_detector, save_detector

pytest.importorskip("transformers")


def saved(path: Path, detector: Any, name: str) -> Path:
    info = DetectorInfo(name, detector.build_options, ["a"] * detector.num_classes, [], {}, "student", "mixpl", 1, {})
    json.dumps(detector.build_options)
    save_detector(path, detector, info)
    return path


def same(a: Any, b: Any) -> bool:
    """Equal weights, and equal predictions."""
    ours, theirs = a.state_dict(), b.state_dict()
    if ours.keys() != theirs.keys() or not all(torch.equal(ours[key], theirs[key]) for key in ours):
        return False
    found, wanted = a.predict(PAIR)[0], b.predict(PAIR)[0]
    return torch.equal(found["boxes"], wanted["boxes"]) and a.pixel_stats == b.pixel_stats


class TestBuilding:
    def test_family_and_checkpoint(self, tmp_path: Path) -> None:
        detector: Any = build_detector("hf:rt_detr", 2, **RT_DETR)
        assert detector.num_classes == 2
        loaded, _ = load_detector(saved(tmp_path / "best.safetensors", detector, "hf:rt_detr"))
        assert same(detector, loaded)

    def test_deformable_detr_needs_no_further_package(self) -> None:
        options = {"encoder_layers": 1, "decoder_layers": 2, "num_queries": 5}
        backbone = {"model_type": "resnet", **RESNET, "out_features": ["stage2", "stage3", "stage4"]}
        detector: Any = build_detector("hf:deformable_detr", 2, backbone_config=backbone, **options)
        assert detector.model.config.auxiliary_loss
        assert detector.model.class_embed[0].bias.max() < -4
        assert FAMILIES["deformable_detr"].defaults["backbone_config"]["model_type"] == "resnet"

    def test_backbones_are_trained(self, tmp_path: Path) -> None:
        backbone = {"model_type": "resnet", **RESNET, "out_features": ["stage2", "stage3", "stage4"]}
        untrained: Any = build_detector(
            "hf:deformable_detr", 3, backbone_config=backbone, d_model=32, encoder_layers=1, decoder_layers=2, num_queries=5
        )
        assert all(weight.requires_grad for weight in untrained.parameters())
        build("deformable_detr").save_pretrained(tmp_path)  # type: ignore[operator]
        for classes in (3, 5):  # the second makes a new model
            tuned: Any = build_detector(f"hf:{tmp_path}", classes)
            names = {name for name, weight in tuned.model.model.backbone.named_parameters() if weight.requires_grad}
            assert {name.split("stages.")[1][0] for name in names} == {"1", "2", "3"}
            assert len(names) == sum("stages." in name and "stages.0." not in name for name, _ in tuned.named_parameters())
            sum(tuned(PAIR, TARGETS).values()).backward()
            assert all(weight.grad.any() for name, weight in tuned.model.model.backbone.named_parameters() if name in names)

    @pytest.mark.parametrize("name", NAMES)
    def test_folder(self, name: str, tmp_path: Path) -> None:
        folder = tmp_path / "checkpoint"
        model: Any = build(name)
        model.save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(
            json.dumps({"do_normalize": True, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.25]})
        )
        detector: Any = build_detector(f"hf:{folder}", 3)
        assert all(torch.equal(value, detector.model.state_dict()[key]) for key, value in model.state_dict().items())
        assert detector.pixel_stats.mean == pytest.approx((25.5, 51.0, 76.5))
        assert detector.pixel_stats.std == pytest.approx((127.5, 127.5, 63.75))
        tuned: Any = build_detector(f"hf:{folder}", 7, patch=False)
        assert tuned.num_classes == 7
        file = saved(tmp_path / "best.safetensors", tuned, f"hf:{folder}")
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
        loaded: Any = load_detector(file)[0]
        assert same(tuned, loaded)
        assert dropin.unpatch(loaded.model) == 0

    @pytest.mark.parametrize(
        ("processor", "stats"),
        [
            ({}, UNIT),
            ({"do_normalize": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}, UNIT),
            (
                {"do_rescale": False, "do_normalize": True, "image_mean": [1, 2, 3], "image_std": [4, 5, 6]},
                PixelStats((1, 2, 3), (4, 5, 6)),
            ),
            ({"do_rescale": True, "rescale_factor": 0.5}, PixelStats((0, 0, 0), (2, 2, 2))),
        ],
    )
    def test_image_processor(self, processor: dict[str, Any], stats: PixelStats, tmp_path: Path) -> None:
        build("rt_detr").save_pretrained(tmp_path)  # type: ignore[operator]
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
        found: Any = build_detector(f"hf:{tmp_path}", 3).pixel_stats
        assert found.mean == pytest.approx(stats.mean)
        assert found.std == pytest.approx(stats.std)

    def test_options_of_a_folder(self, tmp_path: Path) -> None:
        build("deformable_detr").save_pretrained(tmp_path)  # type: ignore[operator]
        detector: Any = build_detector(f"hf:{tmp_path}", 3, auxiliary_loss=False, dropout=0.2, pixel_mean=[1, 2, 3], pixel_std=[4, 5, 6])
        assert detector.model.config.auxiliary_loss is False
        assert detector.model.config.dropout == 0.2
        assert detector.pixel_stats == PixelStats((1, 2, 3), (4, 5, 6))

    def test_trained_detectors_go_back_to_transformers(self, tmp_path: Path) -> None:
        detector = make("rt_detr", 5)
        detector.model.save_pretrained(tmp_path)
        model = type(detector.model).from_pretrained(tmp_path)
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in detector.model.state_dict().items())

    def test_function_of_a_user(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tiny_transformers.small", lambda num_classes: build("rt_detr"), raising=False)
        detector: Any = build_detector("tiny_transformers:small", 4)
        assert detector.num_classes == 4

    def test_weights_file_with_transformers_names(self, tmp_path: Path) -> None:
        from safetensors.torch import save_file

        detector: Any = build_detector("hf:rt_detr", 3, **RT_DETR)
        save_file({key: value.contiguous() for key, value in detector.model.state_dict().items()}, tmp_path / "weights.safetensors")
        again = build_detector("hf:rt_detr", 3, weights=tmp_path / "weights.safetensors", **RT_DETR)
        assert same(detector, again)


class TestBadInput:
    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("hf:rt_detr2", {}, r"unknown detector 'hf:rt_detr2' \(did you mean .*rt_detr.*nothing is downloaded"),
            ("hf:PekingU/rtdetr_r50vd", {}, "expected hf:NAME with one of deformable_detr, .* or hf:FOLDER"),
            ("hf:rt_detr", {"num_querys": 3}, r"rt_detr has no option 'num_querys' \(did you mean num_queries\?\)"),
            ("hf:rt_detr", {"num_queries": "many"}, "rt_detr cannot be configured so: .*num_queries"),
            ("hf:rt_detr", {"pixel_mean": [1, 2, 3]}, "pixel_mean and pixel_std must be given together"),
            ("hf:deformable_detr", {"backbone": "resnet50"}, "no option 'backbone'"),
            ("hf:gone", {"config": {"model_type": "bert"}}, "must have a model_type of deformable_detr, .* got 'bert'"),
            ("hf:gone", {"config": {"model_type": "rt_detr", "backbone": "resnet50"}}, "'resnet50' of a backbone, which would have to"),
        ],
    )
    def test_names_and_options(self, name: str, options: dict[str, Any], message: str) -> None:
        given = {**RT_DETR, **options} if name == "hf:rt_detr" else options
        with pytest.raises(ValueError, match=message):
            build_detector(name, 3, **given)

    def test_backbone_weights(self, tmp_path: Path) -> None:
        torch.save({}, tmp_path / "backbone.pt")
        with pytest.raises(ValueError, match="hf:rt_detr takes no backbone_weights"):
            build_detector("hf:rt_detr", 3, backbone_weights=tmp_path / "backbone.pt")

    def test_folders(self, tmp_path: Path) -> None:
        from safetensors.torch import load_file, save_file

        with pytest.raises(ValueError, match=r"must hold config\.json, got nothing"):
            build_detector(f"hf:{tmp_path}", 3)
        build("rt_detr").save_pretrained(tmp_path)  # type: ignore[operator]
        weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
        tensors, text = load_file(weights), config.read_text()
        save_file({key: value for key, value in tensors.items() if "enc_score_head" not in key}, weights, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"lacks 2 tensors of RTDetrForObjectDetection: model.enc_score_head.bias"):
            build_detector(f"hf:{tmp_path}", 3)
        weights.write_bytes(b"no weights")
        with pytest.raises(ValueError, match="cannot be loaded"):
            build_detector(f"hf:{tmp_path}", 3)
        weights.unlink()
        with pytest.raises(ValueError, match=r"must hold \*.safetensors, got config.json"):
            build_detector(f"hf:{tmp_path}", 3)
        config.write_text("{")
        with pytest.raises(ValueError, match=r"config.json is no json"):
            build_detector(f"hf:{tmp_path}", 3)
        config.write_text(text.replace('"model_type": "rt_detr"', '"model_type": "detr"'))
        with pytest.raises(ValueError, match=r"config.json must have a model_type of .* got 'detr'"):
            build_detector(f"hf:{tmp_path}", 3)
