"""compose_images and the ring cache against cases checked by hand, torch's own resizing, and a float64 oracle."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from compose_cases import IMAGENET_MEAN, IMAGENET_STD, IMPLEMENTATIONS, MEAN, STD, constant, noise, oracle, random_plan, use
from torch import Tensor
from torch.nn.functional import interpolate

from ssod_fast.ops.compose import cache_view, cache_write, compose_images, valid_mask
from ssod_fast.ops.compose_plan import FLIP_X, FLIP_Y, ComposePlan, Placement


@pytest.fixture(params=IMPLEMENTATIONS)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    return use(request.param, monkeypatch)


def ramp(n: int, device: torch.device) -> Tensor:
    """One column of n rows that hold their own number."""
    return torch.arange(n, dtype=torch.float32, device=device).view(1, n, 1).expand(3, n, 1)


def column(source: Tensor, placement: Placement, **options: Any) -> list[float]:
    plan = ComposePlan.from_placements([placement.out_hw], [[placement]])
    return compose_images([source], plan, out_hw=placement.out_hw, fill=0, **options)[0, 0, :, 0].tolist()


# Sampling rules


@pytest.mark.parametrize(
    ("n", "scale", "rows"),
    [
        (7, 0.45, [0, 2, 4]),
        (4, 2.3, [0, 0, 0, 1, 1, 2, 2, 3, 3]),
        (6, 0.35, [0, 2]),
        (5, 0.6, [0, 1, 3]),
        (5, 1.5, [0, 0, 1, 2, 2, 3, 4]),
    ],
)
def test_nearest_reads_the_rows_of_a_given_scale(n: int, scale: float, rows: list[int], device: torch.device) -> None:
    assert column(ramp(n, device), Placement.scaled(0, (n, 1), scale), interp="nearest") == rows


@pytest.mark.parametrize(("n", "target", "row", "reads"), [(20, 12, 9, 15), (20, 52, 39, 15)])
def test_nearest_multiplies_in_float32(n: int, target: int, row: int, reads: int, device: torch.device) -> None:
    assert column(ramp(n, device), Placement.scaled(0, (n, 1), target / n), interp="nearest")[row] == reads


@pytest.mark.parametrize(("n", "target", "size"), [(21, 51, 50), (116, 59, 58), (22, 15, 14), (400, 402, 401), (555, 401, 400)])
def test_sizes_of_a_given_scale_are_rounded_down(n: int, target: int, size: int, device: torch.device) -> None:
    placement = Placement.scaled(0, (n, 1), target / n)
    rows = column(ramp(n, device), placement, interp="nearest")
    assert len(rows) == size
    by_torch = interpolate(ramp(n, torch.device("cpu"))[None, :1], scale_factor=(target / n, 1.0))[0, 0, :, 0]
    assert rows == by_torch.tolist()


def test_scale_and_size_samplers_differ() -> None:
    rows = column(ramp(116, torch.device("cpu")), Placement.scaled(0, (116, 1), 59 / 116), interp="nearest")
    assert rows[:6] == [0, 1, 3, 5, 7, 9]
    assert rows[-4:] == [106, 108, 110, 112]
    by_size = interpolate(ramp(116, torch.device("cpu"))[None, :1], size=(58, 1))[0, 0, :, 0]
    assert sum(a != b for a, b in zip(rows, by_size.tolist(), strict=True)) == 57


def weights_of(n_in: int, n_out: int, interp: str, device: torch.device) -> Tensor:
    """[n_out, n_in]: response of a resize to unit rows."""
    unit = torch.eye(n_in, device=device)
    plan = ComposePlan.from_placements([(n_out, 1)], [[Placement.resized(0, (n_in, 1), (n_out, 1))]])
    columns = [compose_images([row.view(1, n_in, 1).expand(3, n_in, 1)], plan, out_hw=(n_out, 1), fill=0, interp=interp) for row in unit]
    return torch.stack([c[0, 0, :, 0] for c in columns], 1).cpu()


def test_bilinear_weights(device: torch.device) -> None:
    down = [[2 / 3, 1 / 3, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1 / 3, 2 / 3]]
    up = [[1, 0, 0], [0.6, 0.4, 0], [0, 1, 0], [0, 0.4, 0.6], [0, 0, 1]]
    torch.testing.assert_close(weights_of(5, 3, "bilinear", device), torch.tensor(down), atol=1e-6, rtol=0)
    for interp in ("bilinear", "bilinear_aa"):
        torch.testing.assert_close(weights_of(3, 5, interp, device), torch.tensor(up), atol=1e-6, rtol=0)


def test_antialias_weights(device: torch.device) -> None:
    half = torch.tensor([[3 / 7, 3 / 7, 1 / 7, 0, 0, 0, 0, 0], [0, 0.125, 0.375, 0.375, 0.125, 0, 0, 0]])
    two_thirds = torch.tensor([[0.625, 0.375, 0, 0, 0, 0], [0, 1 / 3, 5 / 9, 1 / 9, 0, 0]])
    for n_out, expected in ((4, half), (4, two_thirds)):
        mirrored = torch.cat([expected, expected.flip(0, 1)])
        torch.testing.assert_close(weights_of(expected.shape[1], n_out, "bilinear_aa", device), mirrored, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("interp", "antialias"), [("bilinear", False), ("bilinear_aa", True)])
@pytest.mark.parametrize("out_hw", [(20, 13), (33, 61), (7, 90)])
def test_resizing_equals_torch(interp: Any, antialias: bool, out_hw: tuple[int, int], device: torch.device) -> None:
    image = noise(random.Random(0), 37, 53, torch.float32)
    plan = ComposePlan.from_placements([out_hw], [[Placement.resized(0, (37, 53), out_hw)]])
    ours = compose_images([image.to(device)], plan, out_hw=out_hw, interp=interp).cpu()
    torch.testing.assert_close(ours, interpolate(image[None], out_hw, mode="bilinear", antialias=antialias), atol=2e-3, rtol=0)


@pytest.mark.parametrize("inv", [(2.0, 2.0), (2.0, 0.9), (0.9, 2.0), (0.9, 0.9)])
def test_all_implementations_agree_beyond_the_source(
    inv: tuple[float, float], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten pixels per side at these scales need a larger source than 7x7; with sizes on a device the host cannot know."""
    monkeypatch.setattr(ComposePlan, "check_sizes", lambda plan, sizes: None)
    source = torch.arange(1.0, 50.0).repeat(3).view(3, 7, 7).to(device)
    plan = ComposePlan.from_placements([(10, 10)], [[Placement(0, (10, 10), inv=inv)]])
    ours = compose_images([source], plan, out_hw=(10, 10), interp="bilinear_aa").cpu()
    rows, columns = (4 if scale > 1 else 10 for scale in reversed(inv))  # a triangle of 2 pixels finds something up to the fourth
    assert (ours[..., :rows, :columns] > 0).all()
    assert (ours[..., rows:, :] == 0).all()
    assert (ours[..., columns:] == 0).all()
    torch.testing.assert_close(ours, oracle([source.cpu()], plan, out_hw=(10, 10)).float())


# Mixes checked by hand


def mosaic() -> tuple[list[tuple[int, int]], ComposePlan]:
    """Four tiles that touch the centre of a 64x64 canvas, resized to fit 20x25 and flipped."""
    sizes = [(30, 50), (40, 45), (35, 38), (40, 50)]
    tiles = [Placement.scaled(i, hw, min(20 / hw[0], 25 / hw[1]), flip=FLIP_X) for i, hw in enumerate(sizes)]
    assert [tile.out_hw for tile in tiles] == [(15, 25), (20, 22), (20, 21), (20, 25)]
    heights, widths = zip(*(tile.out_hw for tile in tiles), strict=True)
    offsets = [(32 - widths[0], 32 - heights[0]), (32, 32 - heights[1]), (32 - widths[2], 32), (32, 32)]
    moved = [Placement(**{**vars(tile), "offset": offset}) for tile, offset in zip(tiles, offsets, strict=True)]
    return sizes, ComposePlan.from_placements([(64, 64)], [moved])


@pytest.mark.parametrize(("fill", "sums"), [("mean", (36475, 13900, 7650)), (114, (159247, 69383.5, 47314.8))])
def test_mosaic_of_constants(fill: Any, sums: tuple[float, ...], device: torch.device) -> None:
    sizes, plan = mosaic()
    assert plan.place_i[0, :, 4:8].tolist() == [[7, 17, 32, 32], [32, 12, 54, 32], [11, 32, 32, 52], [32, 32, 57, 52]]
    sources = [constant(h, w, value, device) for (h, w), value in zip(sizes, (20, 40, 60, 80), strict=True)]
    out = compose_images(sources, plan, fill=fill, interp="nearest", mean=MEAN, std=STD)
    assert out.shape == (1, 3, 64, 64)
    torch.testing.assert_close(out.double().sum((0, 2, 3)).cpu(), torch.tensor(sums, dtype=torch.float64), atol=0.01, rtol=0)
    corner = (0.0, 0.0, 0.0) if fill == "mean" else (52, 23.5, 16.8)
    torch.testing.assert_close(out[0, :, 0, 0].cpu(), torch.tensor(corner))


def mixup(device: torch.device) -> tuple[list[Tensor], ComposePlan]:
    """dst 12x20 of 40 and src 16x10 of 90, half each, src erased in the middle."""
    src = Placement(1, (16, 10), offset=(7, 0), weight=0.5, erase=[(2, 4, 6, 9)])
    plan = ComposePlan.from_placements([(16, 20)], [[Placement(0, (12, 20), offset=(0, 3), weight=0.5), src]])
    return [constant(12, 20, 40, device), constant(16, 10, 90, device)], plan


@pytest.mark.parametrize(
    ("options", "sums", "pixels"),
    [
        (
            {"fill": "mean"},
            (4600, 1825, 1080),
            {"both": (27.5, 11.25, 7), "dst": (7.5, 2.5, 1), "src": (20, 8.75, 6), "none": (0, 0, 0), "erased": (7.5, 2.5, 1)},
        ),
        ({"fill": 114}, (11360, 4880, 3264), {"dst": (33.5, 14.25, 9.4), "none": (52, 23.5, 16.8)}),
        ({"fill": 0}, (3950, 1175, 300), {"dst": (5, 0, -2)}),
        ({"fill": "mean", "blend": "over"}, (7400, 3050, 1920), {"both": (40, 17.5, 12)}),
    ],
)
def test_mixup_of_constants(options: dict[str, Any], sums: tuple[float, ...], pixels: dict[str, Any], device: torch.device) -> None:
    sources, plan = mixup(device)
    out = compose_images(sources, plan, out_hw=(16, 20), interp="nearest", mean=MEAN, std=STD, **options)
    torch.testing.assert_close(out.sum((0, 2, 3)).cpu(), torch.tensor(sums, dtype=torch.float32), atol=0.01, rtol=0)
    places = {"both": (12, 8), "dst": (10, 2), "src": (1, 8), "none": (1, 2), "erased": (5, 10)}  # (y, x)
    for name, expected in pixels.items():
        y, x = places[name]
        torch.testing.assert_close(out[0, :, y, x].cpu(), torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("device", [name for name in IMPLEMENTATIONS if name != "triton"], indirect=True)  # 700 tiles are slow to interpret
def test_mosaic_extents(device: torch.device) -> None:
    sizes = [(300, 500), (400, 450), (350, 380), (400, 500)]
    offsets = [(12, 100), (512, 0), (132, 400), (512, 400)]
    tiles = [Placement(i, hw, offset=offset) for i, (hw, offset) in enumerate(zip(sizes, offsets, strict=True))]
    plan = ComposePlan.from_placements([(800, 1024)], [tiles])
    out = compose_images([constant(h, w, i + 1, device) for i, (h, w) in enumerate(sizes)], plan, interp="nearest")
    assert out.double().sum().item() == 5_127_000
    for value, (y0, y1, x0, x1) in enumerate([(100, 399, 12, 511), (0, 399, 512, 961), (400, 749, 132, 511), (400, 799, 512, 1011)], 1):
        rows, cols = (out[0, 0] == value).nonzero().cpu().unbind(1)
        assert (rows.min(), rows.max(), cols.min(), cols.max()) == (y0, y1, x0, x1)


def test_pixels_are_normalised_before_they_are_weighted(device: torch.device) -> None:
    plan = ComposePlan.from_placements([(4, 4)], [[Placement(0, (4, 4), weight=0.5)]])
    out = compose_images([constant(4, 4, 200, device)], plan, out_hw=(4, 4), mean=(120,) * 3, std=(58,) * 3)
    torch.testing.assert_close(out.cpu(), torch.full((1, 3, 4, 4), 0.6896552))


@pytest.mark.parametrize(("values", "expected"), [((255, 0), 128), ((1, 2), 2), ((0, 1), 0)])
def test_bytes_round_half_to_even(values: tuple[int, int], expected: int, device: torch.device) -> None:
    plan = ComposePlan.from_placements([(2, 2)], [[Placement(0, (2, 2), weight=0.5), Placement(1, (2, 2), weight=0.5)]])
    out = compose_images([constant(2, 2, v, device) for v in values], plan, out_hw=(2, 2), out_dtype=torch.uint8)
    assert out.dtype == torch.uint8
    assert (out == expected).all()


def test_flip_and_resize_of_a_small_image(device: torch.device) -> None:
    image = torch.arange(10, dtype=torch.uint8, device=device).view(1, 2, 5).expand(3, 2, 5)
    placement = Placement.scaled(0, (2, 5), 0.6, flip=FLIP_X)
    plan = ComposePlan.from_placements([placement.out_hw], [[placement]])
    assert compose_images([image], plan, out_hw=(1, 3), interp="nearest")[0, 0].tolist() == [[3, 1, 0]]
    upside_down = ComposePlan.from_placements([(2, 5)], [[Placement(0, (2, 5), flip=FLIP_X | FLIP_Y)]])
    assert compose_images([image], upside_down, out_hw=(2, 5))[0, 0].tolist() == image[0].flip(0, 1).tolist()


def slow_mix(images: list[Tensor], placements: list[Placement], canvas: tuple[int, int], padded: tuple[int, int]) -> Tensor:
    """Normalise, interpolate by the scale, flip, erase, add, pad: one operation after the other."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    out = torch.zeros(3, *padded)
    for p in placements:
        tile = (images[p.src].float() - mean) / std
        tile = interpolate(tile[None], scale_factor=p.box_scale[0])[0] if p.inv != (1.0, 1.0) else tile
        tile = (tile.flip(2) if p.flip else tile).clone()
        for x0, y0, x1, y1 in p.erase:
            tile[:, y0:y1, x0:x1] = 0
        (x, y), (h, w) = p.offset, p.out_hw
        out[:, y : y + h, x : x + w] += p.weight * tile
    return out


@pytest.mark.parametrize("seed", range(4))
def test_mixup_equals_the_slow_way_bit_for_bit(seed: int, device: torch.device) -> None:
    rng = random.Random(seed)
    dst_hw, src_hw = [(rng.randint(20, 60), rng.randint(20, 60)) for _ in range(2)]
    scale = min(64 / src_hw[0], 64 / src_hw[1])
    dst = Placement(0, dst_hw, weight=0.5, erase=[(3, 4, 9, 11)])
    src = Placement.scaled(1, src_hw, scale, flip=FLIP_X, weight=0.5, erase=[(1, 1, 20, 9), (5, 5, 12, 30)])
    canvas = (max(dst_hw[0], src.out_hw[0]), max(dst_hw[1], src.out_hw[1]))
    moved = []
    for p in (dst, src):
        offset = (rng.randint(0, canvas[1] - p.out_hw[1]), rng.randint(0, canvas[0] - p.out_hw[0]))
        moved.append(Placement(**{**vars(p), "offset": offset}))
    images = [noise(rng, *dst_hw), noise(rng, *src_hw)]
    plan = ComposePlan.from_placements([canvas], [moved])
    out = compose_images([i.to(device) for i in images], plan, interp="nearest", mean=IMAGENET_MEAN, std=IMAGENET_STD)
    assert torch.equal(out[0].cpu(), slow_mix(images, moved, canvas, plan.padded_hw()))


# Any mix


@pytest.mark.parametrize("seed", range(12))
def test_random_mixes_equal_the_oracle(seed: int, device: torch.device, request: pytest.FixtureRequest) -> None:
    rng = random.Random(seed)
    source_dtype = [torch.uint8, torch.float32, torch.float16, torch.bfloat16][seed % 4]
    out_dtype = [torch.float32, torch.bfloat16, torch.float16, torch.uint8][seed // 3]
    sizes = [(rng.randint(1, 40), rng.randint(1, 40)) for _ in range(3)]
    images = [noise(rng, *hw, dtype=source_dtype) for hw in sizes]
    options: dict[str, Any] = {
        "interp": ["nearest", "bilinear", "bilinear_aa"][seed % 3],
        "fill": rng.choice(["mean", 114, (1, 2, 3)]),
        "pad_value": rng.choice([0.0, 0.5, 7.0]),
        "out_dtype": out_dtype,
        "channels_last": rng.random() < 0.5,
        "swap_rb": rng.random() < 0.5,
    }
    if out_dtype != torch.uint8:
        options |= {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    interpreted = "triton" in request.node.name
    relative = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-7 if interpreted else 2**-8}  # the interpreter truncates
    for blend in ("sum", "over"):
        plan = random_plan(rng, sizes)
        out = compose_images([i.to(device) for i in images], plan, blend=blend, **options)
        exact = oracle(images, plan, blend=blend, **options)
        error = (out.cpu().double() - exact.double()).abs()
        if out_dtype == torch.uint8:
            assert error.max() < 0.501
        else:
            assert (error / exact.double().abs().clamp(min=1)).max() <= relative[out_dtype]
        assert out.dtype == out_dtype
        assert out.is_contiguous(memory_format=torch.channels_last if options["channels_last"] else torch.contiguous_format)
        again = compose_images([i.to(device) for i in images], plan, blend=blend, **options)
        assert torch.equal(out, again)


@pytest.mark.parametrize("interp", ["nearest", "bilinear", "bilinear_aa"])
def test_dense_blocks_equal_a_list(interp: Any, device: torch.device) -> None:
    rng = random.Random(3)
    sizes = [(20, 31), (17, 40), (33, 25), (8, 9)]
    images = [noise(rng, *hw) for hw in sizes]
    plan = random_plan(rng, sizes)
    blocks = [torch.full((2, 3, 20, 40), 255, dtype=torch.uint8), torch.full((2, 3, 40, 30), 255, dtype=torch.uint8)]
    for i, image in enumerate(images):
        blocks[i // 2][i % 2, :, : image.shape[1], : image.shape[2]] = image
    listed = compose_images([i.to(device) for i in images], plan, interp=interp)
    dense = compose_images([b.to(device) for b in blocks], plan, sizes=sizes, interp=interp)
    assert torch.equal(listed, dense)
    on_device = torch.tensor(sizes, device=device)
    assert torch.equal(listed, compose_images([b.to(device) for b in blocks], plan.to(device), sizes=on_device, interp=interp))


@pytest.mark.parametrize("interp", ["nearest", "bilinear"])
def test_strides_do_not_matter(interp: Any, device: torch.device) -> None:
    rng = random.Random(5)
    sizes = [(30, 22), (18, 27)]
    images = [noise(rng, *hw).to(device) for hw in sizes]
    plan = random_plan(rng, sizes)
    plain = compose_images(images, plan, interp=interp)
    interleaved = [i.permute(1, 2, 0).contiguous() for i in images]
    assert torch.equal(plain, compose_images(interleaved, plan, interp=interp))
    assert torch.equal(plain, compose_images([i.permute(2, 0, 1) for i in interleaved], plan, interp=interp))
    embedded = [torch.zeros(3, h + 9, 2 * w + 5, dtype=torch.uint8, device=device)[:, 4 : 4 + h, 3 : 3 + 2 * w : 2] for h, w in sizes]
    for view, image in zip(embedded, images, strict=True):
        view.copy_(image)
    assert torch.equal(plain, compose_images(embedded, plan, interp=interp))


def test_nan_stays_with_its_pixels(device: torch.device) -> None:
    image = torch.ones(3, 6, 6, device=device)
    image[1, 2, 3] = torch.nan
    plan = ComposePlan.from_placements([(6, 6)], [[Placement(0, (6, 6))]])
    for interp in ("nearest", "bilinear"):
        out = compose_images([image], plan, out_hw=(6, 6), interp=interp)
        assert out.isnan().nonzero().tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("batch", [0, 2])
def test_nothing_on_the_canvas(batch: int, device: torch.device) -> None:
    plan = ComposePlan.from_placements([(5, 7)] * batch, [[]] * batch)
    out = compose_images([constant(2, 2, 9, device)], plan, out_hw=(8, 8), fill=7, pad_value=-1)
    assert out.shape == (batch, 3, 8, 8)
    if batch:
        mask = valid_mask(torch.from_numpy(plan.canvas), (8, 8))
        assert torch.equal(out.cpu(), torch.where(mask[:, None], 7.0, -1.0).expand_as(out))


def test_unused_and_invisible_placements_paint_nothing(device: torch.device) -> None:
    placements = [Placement(-1, (4, 4)), Placement(0, (4, 4), offset=(50, 0)), Placement(0, (4, 4), rect=(2, 2, 2, 4))]
    plan = ComposePlan.from_placements([(4, 4)], [placements])
    assert (compose_images([constant(4, 4, 9, device)], plan, out_hw=(4, 4)) == 0).all()


def test_one_pixel(device: torch.device) -> None:
    for interp in ("nearest", "bilinear", "bilinear_aa"):
        for out_hw in ((1, 1), (3, 5)):
            plan = ComposePlan.from_placements([out_hw], [[Placement.resized(0, (1, 1), out_hw)]])
            assert (compose_images([constant(1, 1, 9, device)], plan, out_hw=out_hw, interp=interp) == 9).all()


def test_every_pixel_is_written(device: torch.device, fill_uninitialised: None) -> None:
    rng = random.Random(8)
    plan = random_plan(rng, [(20, 20)])
    for options in ({}, {"channels_last": True}, {"out_dtype": torch.bfloat16}):
        assert not compose_images([noise(rng, 20, 20).to(device)], plan, pad_value=3, **options).isnan().any()


def test_large_canvases_cross_the_row_blocks_of_threads() -> None:
    rng = random.Random(9)
    images = [noise(rng, 120, 160) for _ in range(2)]
    plan = ComposePlan.from_placements([(150, 130), (70, 200)], [[Placement.scaled(i, (120, 160), 1.2, flip=i)] for i in range(2)])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = compose_images(images, plan)
        torch.set_num_threads(3)
        assert torch.equal(single, compose_images(images, plan))
    finally:
        torch.set_num_threads(threads)


# The ring cache


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_cache_returns_what_was_written(dtype: torch.dtype, device: torch.device) -> None:
    rng = random.Random(2)
    sizes = [(7, 11), (20, 5), (1, 1)]
    images = [noise(rng, *hw, dtype=dtype).to(device) for hw in sizes]
    ring = torch.full((4, 3 * 120), 77, dtype=dtype, device=device)
    cache_write(ring, images, [2, 0, 3])
    for image, hw, slot in zip(images, sizes, (2, 0, 3), strict=True):
        assert torch.equal(cache_view(ring, slot, hw), image)
        assert (ring[slot, image.numel() :] == 77).all()
    assert (ring[1] == 77).all()
    cache_write(ring, [i.permute(1, 2, 0) for i in images], [1, 2, 3])
    assert torch.equal(cache_view(ring, 1, sizes[0]), images[0])


def test_composing_from_the_cache_equals_composing_from_the_images(device: torch.device) -> None:
    rng = random.Random(4)
    sizes = [(21, 30), (16, 16)]
    images = [noise(rng, *hw).to(device) for hw in sizes]
    ring = torch.zeros(3, 3 * 700, dtype=torch.uint8, device=device)
    cache_write(ring, images, [2, 1])
    plan = random_plan(rng, sizes)
    views = [cache_view(ring, slot, hw) for slot, hw in zip((2, 1), sizes, strict=True)]
    assert torch.equal(compose_images(views, plan), compose_images(images, plan))
