"""What a plan refuses, and that its tables arrive as they were made."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from ssod_fast.ops.compose import cache_view, cache_write, compose, compose_boxes, compose_images
from ssod_fast.ops.compose_plan import BoxRule, ComposePlan, PlaceF, PlaceI, Placement, blank_tables
from ssod_fast.structures import PaddedTargets


def one(canvas: tuple[int, int] = (8, 8), **options: Any) -> ComposePlan:
    return ComposePlan.from_placements([(4, 4), canvas], [[], [Placement(**{"src": 0, "out_hw": (8, 8), **options})]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rect": (0, 0, 9, 8)}, "canvas 1 (8, 8), placement 0: its visible rectangle leaves the canvas"),
        ({"rect": (-1, 0, 8, 8)}, "leaves the canvas"),
        ({"rect": (0, 0, 8, 8), "out_hw": (8, 7)}, "canvas 1 (8, 8), placement 0: its visible rectangle leaves the resized source"),
        ({"rect": (0, 0, 8, 8), "offset": (1, 0)}, "leaves the resized source"),
        ({"flip": 4}, "flip bits must be 0, 1, 2 or 3"),
        ({"inv": (0.0, 1.0)}, "inv and box scale must be positive and finite"),
        ({"inv": (1.0, float("nan"))}, "inv and box scale must be positive and finite"),
        ({"box_scale": (float("inf"), 1.0)}, "inv and box scale must be positive and finite"),
        ({"weight": -0.1}, "weight must be finite and not negative"),
        ({"weight": float("nan")}, "weight must be finite and not negative"),
        ({"canvas": (-1, 8), "rect": (0, 0, 0, 0)}, "canvas 1: height and width must not be negative, got (-1, 8)"),
    ],
)
def test_geometry_that_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        one(**options)


def test_tables_of_wrong_shape_or_dtype() -> None:
    tables = blank_tables(2, 3, 1)
    with pytest.raises(ValueError, match=re.escape("place_i must have the shape [2, '*', 11], got [2, 3, 10]")):
        ComposePlan(**{**tables, "place_i": tables["place_i"][..., :10]})
    with pytest.raises(ValueError, match=re.escape("erase must have the shape [2, 3, '*', 4], got [1, 3, 1, 4]")):
        ComposePlan(**{**tables, "erase": tables["erase"][:1]})
    with pytest.raises(TypeError, match="canvas must be int32, got float64"):
        ComposePlan(**{**tables, "canvas": np.zeros((2, 2))})
    with pytest.raises(ValueError, match="placements must have one list per canvas, got 1 for 2 canvases"):
        ComposePlan.from_placements([(2, 2)] * 2, [[]])
    tables["place_i"][0, 0, [PlaceI.SRC, PlaceI.X1, PlaceI.Y1, PlaceI.OUT_W, PlaceI.OUT_H, PlaceI.N_ERASE]] = (0, 1, 1, 1, 1, 2)
    tables["place_f"][0, 0] = 1
    with pytest.raises(ValueError, match=re.escape("canvas 0 (1, 1), placement 0: n_erase must lie in [0, 1]")):
        ComposePlan(**tables)


def test_weights_above_one_are_refused_where_placements_overlap() -> None:
    halves = [Placement(0, (8, 8), weight=0.6), Placement(0, (8, 8), offset=(8, 0), weight=0.6)]
    apart = ComposePlan.from_placements([(8, 16)], [halves])
    touching = ComposePlan.from_placements([(8, 16)], [[halves[0], Placement(0, (8, 8), offset=(7, 0), weight=0.6)]])
    source = [torch.zeros(3, 8, 8)]
    compose_images(source, apart)
    compose_images(source, touching, blend="over")
    with pytest.raises(ValueError, match=r"canvas 0, placement 0: .* sum to 1\.2, expected at most 1"):
        compose_images(source, touching)
    thirds = [Placement(0, (8, 8), weight=1 / 3) for _ in range(3)]
    compose_images(source, ComposePlan.from_placements([(8, 8)], [thirds]))


def test_packing_keeps_every_table() -> None:
    patches = [(1, 2, 3, 4), (5, 6, 7, 8)]
    plan = one(weight=0.25, inv=(0.1, 3.0), erase=patches)
    tables = plan.to("cpu")
    for name in ("canvas", "place_i", "place_f", "erase", "erase_canvas"):
        assert np.array_equal(getattr(tables, name).numpy(), getattr(plan, name)), name
    assert tables.host is plan
    assert tables.erase[1, 0].tolist() == [list(p) for p in patches]
    assert tables.place_f[1, 0, PlaceF.WEIGHT] == 0.25
    assert plan.padded_hw() == (32, 32)
    assert plan.padded_hw(5) == (10, 10)
    assert (plan.batch, plan.places) == (2, 1)
    assert plan.pack().dtype == torch.int32


@pytest.mark.gpu
def test_upload_does_not_wait() -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        tables = one().to("cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert np.array_equal(tables.place_i.cpu().numpy(), one().place_i)


GOOD = torch.zeros(3, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("error", "message", "sources", "options"),
    [
        (ValueError, "canvas 1, placement 0: src is 0, but there are 0 sources", [], {}),
        (ValueError, "out_hw must hold every canvas, got (8, 7), but canvas 1 is (8, 8)", [GOOD], {"out_hw": (8, 7)}),
        (TypeError, "out_hw must be two integers (height, width), got 64", [GOOD], {"out_hw": 64}),
        (TypeError, "out_hw must be two integers (height, width), got (64.5, 64)", [GOOD], {"out_hw": (64.5, 64)}),
        (TypeError, "sources[0] must be uint8, float16, bfloat16 or float32, got torch.int64", [GOOD.long()], {}),
        (TypeError, "sources[0] must be a tensor, got ndarray", [GOOD.numpy()], {}),
        (TypeError, "sources must have one dtype, got torch.uint8 and sources[1] torch.float32", [GOOD, GOOD.float()], {}),
        (ValueError, "sources must have 3 channels in one layout", [torch.zeros(4, 8, 8)], {}),
        (ValueError, "sources must have 3 channels in one layout", [torch.zeros(3, 8, 8), torch.zeros(8, 8, 3)], {}),
        (ValueError, "sources must all be [3, h, w] or all dense [N, 3, H, W] blocks, got sources[0] [8, 8]", [GOOD[0]], {}),
        (ValueError, "sources[0] must be [N, 3, H, W], got [1, 4, 8, 8]", torch.zeros(1, 4, 8, 8), {}),
        (ValueError, "sources[0] must have pixels, got [3, 0, 8]", [GOOD[:, :0]], {}),
        (ValueError, "sources must be at most two dense blocks, got 3", [GOOD[None]] * 3, {}),
        (ValueError, "sources[0] requires grad", [torch.zeros(3, 8, 8, requires_grad=True)], {}),
        (ValueError, "sizes belong to dense blocks", [GOOD], {"sizes": [(8, 8)]}),
        (ValueError, "sizes must be [1, 2] (height, width), got [2, 2]", GOOD[None], {"sizes": [(8, 8)] * 2}),
        (ValueError, "sizes must lie between 1 and the block's own, got [[9, 8]]", GOOD[None], {"sizes": [(9, 8)]}),
        (TypeError, "sizes must be integers, got torch.float32", GOOD[None], {"sizes": torch.ones(1, 2)}),
        (ValueError, "interp must be one of nearest, bilinear, bilinear_aa, got 'cubic'", [GOOD], {"interp": "cubic"}),
        (ValueError, "blend must be one of sum, over, got 'mean'", [GOOD], {"blend": "mean"}),
        (ValueError, "fill must be 'mean', a number or three numbers, got 'grey'", [GOOD], {"fill": "grey"}),
        (ValueError, "fill must be three finite numbers, got (1, 2)", [GOOD], {"fill": (1, 2)}),
        (ValueError, "mean must be three finite numbers, got (0, nan, 0)", [GOOD], {"mean": (0, float("nan"), 0)}),
        (ValueError, "std must be positive, got [1.0, 0.0, 1.0]", [GOOD], {"std": (1, 0, 1)}),
        (
            ValueError,
            "out_dtype uint8 needs mean 0 and std 1, got [0.0, 0.0, 0.0] and [2.0",
            [GOOD],
            {"std": (2,) * 3, "out_dtype": torch.uint8},
        ),
        (TypeError, "out_dtype must be float32, bfloat16, float16 or uint8, got torch.float64", [GOOD], {"out_dtype": torch.float64}),
    ],
)
def test_bad_arguments(error: type[Exception], message: str, sources: Any, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=re.escape(message)):
        compose_images(sources, one(), **options)


@pytest.mark.parametrize("plan", [None, [one()]])
def test_what_is_no_plan(plan: Any) -> None:
    targets = PaddedTargets.empty(1, 1, torch.device("cpu"))
    message = f"plan must be a ComposePlan or its PlanTables, got {type(plan).__name__}"
    for call in (lambda: compose_images([GOOD], plan), lambda: compose_boxes(targets, plan), lambda: compose([GOOD], targets, plan)):
        with pytest.raises(TypeError, match=message):
            call()


BEYOND = "canvas 1, placement 0: out_w, out_h and inv need a source of at least (8, 8) (height, width), but source 0 is "


@pytest.mark.parametrize("interp", ["nearest", "bilinear", "bilinear_aa"])
@pytest.mark.parametrize(
    ("sources", "options", "size"),
    [
        ([GOOD[:, :7]], {}, "(7, 8)"),
        ([GOOD[..., :7]], {}, "(8, 7)"),
        (GOOD[None, ..., :7], {}, "(8, 7)"),
        (GOOD[None], {"sizes": [(7, 8)]}, "(7, 8)"),
    ],
)
def test_sources_smaller_than_planned(interp: Any, sources: Any, options: dict[str, Any], size: str) -> None:
    for plan in (one(), one().to("cpu")):
        with pytest.raises(ValueError, match=re.escape(BEYOND + size)):
            compose_images(sources, plan, interp=interp, **options)


def test_reach_of_a_shrinking_placement() -> None:
    plan = one((10, 10), out_hw=(10, 4), inv=(2.0, 2.0))
    assert plan.reads == ((0, 19, 7),)  # the last output pixels begin at 18 and 6
    compose_images([torch.zeros(3, 19, 7)], plan)
    with pytest.raises(ValueError, match=re.escape("canvas 1, placement 0: out_w, out_h and inv need a source of at least (19, 7)")):
        compose_images([torch.zeros(3, 7, 7)], plan)
    hidden = one((10, 10), out_hw=(10, 4), inv=(2.0, 2.0), rect=(0, 0, 0, 0))
    assert hidden.reads == ()


def test_larger_sources_than_planned_show_the_part_that_the_plan_knows() -> None:
    large = torch.arange(3 * 9 * 10, dtype=torch.float32).view(3, 9, 10)
    assert torch.equal(compose_images([large], one()), compose_images([large[:, :8, :8]], one()))


def test_a_block_needs_no_sizes() -> None:
    assert torch.equal(compose_images(GOOD[None], one()), compose_images([GOOD], one()))


@pytest.mark.parametrize(
    ("error", "message", "images", "slots"),
    [
        (ValueError, "slots must have one entry per image, got 1 for 2 images", [GOOD, GOOD], [0]),
        (ValueError, "slots must be different numbers in [0, 3), got [1, 1]", [GOOD, GOOD], [1, 1]),
        (ValueError, "slots must be different numbers in [0, 3), got [3]", [GOOD], [3]),
        (TypeError, "slots must be integers, got [1.0]", [GOOD], [1.0]),
        (ValueError, "images[0] has 243 values, but a slot of the ring holds 192", [torch.zeros(3, 9, 9, dtype=torch.uint8)], [0]),
        (
            ValueError,
            "images must be [3, h, w] or [h, w, 3], got images[0] [2, 3, 4, 4]",
            [torch.zeros(2, 3, 4, 4, dtype=torch.uint8)],
            [0],
        ),
        (TypeError, "images[0] must be torch.uint8 on cpu like the ring, got torch.float32 on cpu", [GOOD.float()], [0]),
    ],
)
def test_bad_cache_writes(error: type[Exception], message: str, images: list[torch.Tensor], slots: list[Any]) -> None:
    with pytest.raises(error, match=re.escape(message)):
        cache_write(torch.zeros(3, 192, dtype=torch.uint8), images, slots)


@pytest.mark.parametrize(
    ("error", "message", "slot", "size"),
    [
        (ValueError, "slot must lie in [0, 3), got 3", 3, (8, 8)),
        (ValueError, "slot must lie in [0, 3), got -1", -1, (8, 8)),
        (TypeError, "slot must be an integer, got 1.0", 1.0, (8, 8)),
        (TypeError, "size must be two integers (height, width), got 8", 1, 8),
        (TypeError, "size must be two integers (height, width), got (3, 8, 8)", 1, (3, 8, 8)),
        (ValueError, "size must be positive with 3 * h * w <= 192, what a slot of the ring holds, got (9, 8)", 1, (9, 8)),
        (ValueError, "size must be positive with 3 * h * w <= 192, what a slot of the ring holds, got (0, 8)", 1, (0, 8)),
    ],
)
def test_bad_cache_views(error: type[Exception], message: str, slot: Any, size: Any) -> None:
    with pytest.raises(error, match=re.escape(message)):
        cache_view(torch.zeros(3, 192, dtype=torch.uint8), slot, size)


def test_bad_ring() -> None:
    with pytest.raises(TypeError, match="ring must be a tensor, got NoneType"):
        cache_view(None, 0, (8, 8))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=re.escape("ring must be a contiguous [R, capacity] tensor, got [192]")):
        cache_view(torch.zeros(192, dtype=torch.uint8), 0, (8, 8))
    with pytest.raises(ValueError, match=re.escape("ring must be a contiguous [R, capacity] tensor")):
        cache_write(torch.zeros(3, 400, dtype=torch.uint8)[:, :192], [GOOD], [0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"erase_thr": 0}, "erase_thr must be positive"),
        ({"erase_overlap": "max"}, "erase_overlap must be 'sum' or 'union', got 'max'"),
        ({"min_visibility": 1.5}, "min_visibility must lie in [0, 1], got 1.5"),
        ({"min_wh": -1}, "min_wh must not be negative, got -1"),
    ],
)
def test_bad_rules(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        BoxRule(**options)
