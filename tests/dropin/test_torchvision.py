"""Detectors of torchvision with our box overlap."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torchvision
from box_cases import valid_boxes
from dropin_cases import OurOps
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.ops import boxes as box_ops
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes, Image

from ssod_fast.dropin import NothingPatched
from ssod_fast.dropin.torchvision import patch_box_iou, unpatch_box_iou

PLACES = ("torchvision.ops.boxes.box_iou", "torchvision.ops.box_iou", "torchvision.transforms.v2._geometry.box_iou")
THEIRS = box_ops.box_iou


@pytest.fixture(autouse=True)
def undone() -> Iterator[None]:
    yield
    unpatch_box_iou()


def backbone() -> nn.Module:
    layers = nn.Sequential(nn.Conv2d(3, 16, 3, 4, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU())
    layers.out_channels = 16
    return layers


def faster_rcnn() -> nn.Module:
    anchors = AnchorGenerator(((16, 32),), ((0.5, 1.0, 2.0),))
    pool = torchvision.ops.MultiScaleRoIAlign(["0"], 3, 2)
    options = {"min_size": 64, "max_size": 96, "box_score_thresh": 0.0, "rpn_pre_nms_top_n_train": 60}
    return FasterRCNN(backbone(), 4, rpn_anchor_generator=anchors, box_roi_pool=pool, **options)


def retinanet() -> nn.Module:
    return RetinaNet(backbone(), 4, anchor_generator=AnchorGenerator(((16, 32),), ((1.0,),)), min_size=64, max_size=96)


def ssd() -> nn.Module:
    features = backbone()
    features.out_channels = [16]
    return SSD(features, DefaultBoxGenerator([[2]], scales=[0.2, 0.5]), (64, 64), 4, score_thresh=0.0)


DETECTORS = [faster_rcnn, retinanet, ssd]


def batch() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(5)
    images = [torch.rand(3, 64, 80, generator=generator), torch.rand(3, 64, 64, generator=generator)]
    boxes = torch.tensor([[4.0, 6, 30, 40], [20, 10, 60, 50], [1, 1, 9, 9]])
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 2, 3])}, {"boxes": boxes[:0], "labels": torch.zeros(0, dtype=torch.int64)}]
    return images, targets


def losses_and_detections(model: nn.Module) -> list[Any]:
    """Losses, their gradients and detections; samplers are random, so from one seed."""
    torch.manual_seed(0)
    images, targets = batch()
    losses = model.train()(images, copy.deepcopy(targets))
    gradients = torch.autograd.grad(sum(losses.values()), [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    with torch.no_grad():
        detections = model.eval()(images)
    return [losses, [g for g in gradients if g is not None], detections]


@pytest.mark.parametrize("make", DETECTORS)
def test_losses_gradients_and_detections_stay(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(1)
    model = make()
    before, state = losses_and_detections(model), list(model.state_dict())
    with patch_box_iou(model) as patched, OurOps() as ops:
        assert patched.places[:3] == PLACES
        torch.testing.assert_close(losses_and_detections(model), before, atol=1e-5, rtol=1e-5)
        assert list(model.state_dict()) == state
    assert set(ops.names) == {"box_iou"}
    with OurOps() as ops:
        torch.testing.assert_close(losses_and_detections(model), before)
    assert ops.names == []


def test_live_detector_keeps_its_function_unless_it_is_named() -> None:
    model = faster_rcnn()
    with patch_box_iou() as patched:
        assert patched.count == 3
        assert model.rpn.box_similarity is THEIRS
        assert faster_rcnn().rpn.box_similarity is box_ops.box_iou is not THEIRS
        with patch_box_iou(model) as more:
            assert more.count == 5
            assert model.rpn.box_similarity is model.roi_heads.box_similarity is box_ops.box_iou
        assert model.rpn.box_similarity is THEIRS


def test_patching_twice_and_unpatching_twice() -> None:
    model = faster_rcnn()
    places = patch_box_iou(model).places
    ours = box_ops.box_iou
    assert patch_box_iou(model).places == places
    assert torchvision.ops.box_iou is ours
    clone = copy.deepcopy(model)
    assert unpatch_box_iou(model) == 5
    assert unpatch_box_iou(model) == 0
    assert clone.rpn.box_similarity is ours
    assert box_ops.box_iou is torchvision.ops.box_iou is model.rpn.box_similarity is THEIRS


def live(model: nn.Module) -> list[Any]:
    return [model.rpn.box_similarity, model.roi_heads.box_similarity]


@pytest.mark.parametrize("first", [0, 1])
def test_two_models_are_unpatched_in_any_order(first: int) -> None:
    models = faster_rcnn(), faster_rcnn()
    for model in models:
        patch_box_iou(model)
    assert unpatch_box_iou(models[first]) == 5
    assert live(models[first]) == [THEIRS] * 2
    assert unpatch_box_iou(models[1 - first]) == 2
    assert live(models[1 - first]) == [THEIRS] * 2
    assert [unpatch_box_iou(model) for model in models] == [0, 0]


def test_torchvision_is_unpatched_before_the_model() -> None:
    model = faster_rcnn()
    patch_box_iou(model)
    assert unpatch_box_iou() == 3
    assert box_ops.box_iou is THEIRS
    assert THEIRS not in live(model)
    assert unpatch_box_iou(model) == 2
    assert live(model) == [THEIRS] * 2


def test_a_copy_is_unpatched_after_the_model() -> None:
    model = faster_rcnn()
    patched = patch_box_iou(model)
    clone = copy.deepcopy(model)
    patched.undo()
    assert live(model) == [THEIRS] * 2
    assert unpatch_box_iou(clone) == 2
    assert live(clone) == [THEIRS] * 2


@pytest.mark.parametrize("again", [False, True])
def test_a_model_that_was_built_in_between(again: bool) -> None:
    with patch_box_iou():
        model = faster_rcnn()
    assert THEIRS not in live(model)
    if again:
        patch_box_iou(model)
    assert unpatch_box_iou(model) == (5 if again else 2)
    assert live(model) == [THEIRS] * 2
    assert unpatch_box_iou(model) == 0


def test_a_module_that_was_imported_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("torchvision.later")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with patch_box_iou():
        module.box_iou = box_ops.box_iou
    assert unpatch_box_iou() == 1
    assert module.box_iou is THEIRS


def test_what_somebody_else_has_replaced_again_stays_and_the_rest_with_it() -> None:
    model = faster_rcnn()
    patch_box_iou(model)
    ours, model.roi_heads.box_similarity = model.roi_heads.box_similarity, max
    with pytest.raises(RuntimeError, match=r"roi_heads\.box_similarity has been replaced again"):
        unpatch_box_iou(model)
    assert model.rpn.box_similarity is torchvision.ops.box_iou is ours
    model.roi_heads.box_similarity = ours
    assert unpatch_box_iou(model) == 5


def test_other_arguments_are_refused() -> None:
    for call in (patch_box_iou, unpatch_box_iou):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module or None, got int"):
            call(3)  # type: ignore[arg-type]
    with pytest.raises(NothingPatched, match="Linear has no part of a detector of torchvision"):
        patch_box_iou(nn.Linear(2, 2))
    assert torchvision.ops.box_iou is THEIRS


@pytest.mark.parametrize("fmt", ["xyxy", "xywh", "cxcywh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_function_equals_theirs(fmt: str, dtype: torch.dtype) -> None:
    a, b = valid_boxes(7).to(dtype), valid_boxes(9, seed=1).to(dtype)
    with patch_box_iou():
        ours, batched = torchvision.ops.box_iou(a, b, fmt), torchvision.ops.box_iou(a.expand(2, -1, -1), b.expand(2, -1, -1), fmt=fmt)
        assert torchvision.ops.box_iou.__doc__ == THEIRS.__doc__
    expected = THEIRS(a, b, fmt)
    assert ours.dtype == expected.dtype
    tolerance = {"atol": 1e-5, "rtol": 1e-4} if dtype is not torch.float16 else {"atol": 5e-3, "rtol": 5e-3}
    torch.testing.assert_close(ours, expected, **tolerance)
    torch.testing.assert_close(batched, expected.expand(2, -1, -1), **tolerance)


def test_documented_difference_for_boxes_without_area() -> None:
    point, box = torch.tensor([[3.0, 3, 3, 3]]), torch.tensor([[1.0, 1, 5, 5]])
    assert THEIRS(point, point).isnan().all()
    with patch_box_iou():
        assert torchvision.ops.box_iou(point, point).item() == 0
        assert torchvision.ops.box_iou(point, box).item() == THEIRS(point, box).item() == 0
        endless = torch.tensor([[0.0, 0, torch.inf, 6]])
        assert torchvision.ops.box_iou(endless, box).isnan().all()
        assert THEIRS(endless, box).item() == 0
        nan = torch.full((1, 4), torch.nan)
        assert torchvision.ops.box_iou(nan, box).isnan().all()
        assert THEIRS(nan, box).isnan().all()


def test_unknown_format_is_refused() -> None:
    with patch_box_iou(), pytest.raises(ValueError, match="fmt must be one of"):
        torchvision.ops.box_iou(torch.zeros(1, 4), torch.zeros(1, 4), fmt="yxyx")


def test_crop_by_overlap_uses_it() -> None:
    image, boxes = Image(torch.zeros(3, 50, 50)), BoundingBoxes(torch.tensor([[5.0, 5, 30, 30]]), format="XYXY", canvas_size=(50, 50))
    with patch_box_iou(), OurOps() as ops:
        torch.manual_seed(0)
        cropped = v2.RandomIoUCrop()(image, boxes)
    torch.manual_seed(0)
    assert "box_iou" in ops.names
    torch.testing.assert_close(cropped[1], v2.RandomIoUCrop()(image, boxes)[1])


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_traces_hold_their_function() -> None:
    with patch_box_iou():
        traced = torch.jit.trace(lambda a, b: box_ops.box_iou(a, b), (valid_boxes(3), valid_boxes(4)))
    assert "ssod_fast" not in str(traced.graph)


def test_other_modules_of_the_user_are_left_alone() -> None:
    with patch_box_iou():
        assert sys.modules[__name__].THEIRS is THEIRS
        assert all(place.startswith("torchvision.") for place in patch_box_iou().places)
