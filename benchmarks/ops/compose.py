"""Mosaic and mixup from uint8 images to normalised canvases, against OpenCV pipelines, a torch loop and kornia."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from harness import OURS, Call, Case, rotate
from ssod_fast.ops.compose import cache_write, compose_boxes, compose_images
from ssod_fast.ops.compose_plan import FLIP_X, ComposePlan, Placement
from ssod_fast.structures import PaddedTargets, Target

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
CANVAS = (800, 1333)
SOURCE = (480, 640)
OPENCV, PLANES = "OpenCV resize-paste-normalise", "OpenCV, normalised plane by plane"
LISTED, LOOP, KORNIA = "ours, list of images", "torch loop", "kornia RandomMosaic"
LOOP_MODES: dict[str, dict[str, Any]] = {
    "nearest": {"mode": "nearest"},
    "bilinear": {"mode": "bilinear"},
    "bilinear_aa": {"mode": "bilinear", "antialias": True},
}
Images = list[Tensor]  # [3, h, w] uint8


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """One canvas on the CPU, as a loader or a small machine sees it; eight on the GPU, as a step of training does."""
    gpu = device.type == "cuda"
    targets = {} if gpu else {OPENCV: 4.0, LOOP: 5.0}
    yield mix_case("mosaic bilinear", mosaic(), 4, SOURCE, "bilinear", device, dense=gpu, targets=targets)
    yield mix_case("mixup bilinear", mixup(), 2, CANVAS, "bilinear", device, dense=gpu, targets=targets)
    if quick:
        return
    for interp in ("nearest", "bilinear_aa"):
        yield mix_case(f"mosaic {interp}", mosaic(), 4, SOURCE, interp, device, dense=gpu)
        yield mix_case(f"mixup {interp}", mixup(), 2, CANVAS, interp, device, dense=gpu)
    yield mix_case("mosaic bilinear", mosaic(), 4, SOURCE, "bilinear", device, dense=gpu, out_dtype=torch.bfloat16)
    yield mix_case("mosaic bilinear", mosaic(), 4, CANVAS, "bilinear", device, dense=gpu)
    yield boxes_case(device)
    yield cache_case(device)


def mosaic() -> list[Placement]:
    """Four tiles that fill the canvas; every canvas of the batch has its own four sources."""
    middle_y, middle_x = CANVAS[0] // 2, CANVAS[1] // 2
    cells = [(y0, x0, y1, x1) for y0, y1 in ((0, middle_y), (middle_y, CANVAS[0])) for x0, x1 in ((0, middle_x), (middle_x, CANVAS[1]))]
    return [Placement(i, (y1 - y0, x1 - x0), offset=(x0, y0)) for i, (y0, x0, y1, x1) in enumerate(cells)]


def mixup() -> list[Placement]:
    """An image at its own size and one that is shrunk, flipped and placed off the corner, half each."""
    small = (int(CANVAS[0] * 0.9), int(CANVAS[1] * 0.9))
    return [Placement(0, CANVAS, weight=0.5), Placement(1, small, offset=(60, 40), weight=0.5, flip=FLIP_X)]


def mix_case(
    mode: str,
    tiles: Sequence[Placement],
    sources: int,
    source_hw: tuple[int, int],
    interp: str,
    device: torch.device,
    *,
    dense: bool,
    out_dtype: torch.dtype = torch.float32,
    targets: dict[str, float] | None = None,
) -> Case:
    """One kind of mix; the peers do the same work on the same images, as far as they can. `dense`: eight canvases from dense blocks."""
    batch = 8 if dense else 1
    placed = [Placement.resized(t.src, source_hw, t.out_hw, offset=t.offset, weight=t.weight, flip=t.flip) for t in tiles]
    rows = [[Placement(**{**vars(p), "src": p.src + sources * b}) for p in placed] for b in range(batch)]
    plan = ComposePlan.from_placements([CANVAS] * batch, rows)
    inputs = [(random_images(batch * sources, source_hw, seed, device),) for seed in range(3)]

    def ours(images: Images) -> Tensor:
        return compose_images(images, plan, out_hw=CANVAS, interp=interp, mean=MEAN, std=STD, out_dtype=out_dtype)  # type: ignore[arg-type]

    loop = torch_loop(rows, interp, out_dtype, device)
    providers: dict[str, Call] = {OURS: rotate(ours, inputs)}
    if dense:
        providers = {OURS: dense_call(plan, inputs, interp, out_dtype), LISTED: rotate(ours, inputs)}
    providers[LOOP] = rotate(loop, inputs)
    if not dense and interp != "bilinear_aa" and out_dtype == torch.float32:
        providers |= opencv_providers(rows[0], interp, inputs)
    if mode.startswith("mosaic"):
        providers |= kornia_providers(batch, device)
    read = batch * sources * 3 * source_hw[0] * source_hw[1]
    written = batch * 3 * CANVAS[0] * CANVAS[1] * torch.empty(0, dtype=out_dtype).element_size()
    return Case(
        op="compose",
        name=f"{batch}x{CANVAS[0]}x{CANVAS[1]} from {sources}x{source_hw[0]}x{source_hw[1]}",
        mode=mode,
        dtype=f"uint8 to {str(out_dtype).removeprefix('torch.')}",
        inputs="uniform",
        bytes=read + written,
        providers=providers,
        check=lambda: check(providers, loop(*inputs[0]), interp),
        targets={name: ratio for name, ratio in (targets or {}).items() if name in providers},
        note="OpenCV rounds the resized bytes and normalises with its own functions, or with NumPy plane by plane; kornia mixes float "
        "images of one size without resizing, which is less work",
        eager_only=(LISTED, KORNIA),
    )


def dense_call(plan: ComposePlan, inputs: Sequence[tuple[Images]], interp: str, out_dtype: torch.dtype) -> Call:
    """Ours from a dense block and a plan that lie on the device: what a CUDA graph can hold."""
    device = inputs[0][0][0].device
    tables = plan.to(device)
    blocks = [(torch.stack(images), torch.tensor([image.shape[1:] for image in images]).to(device, torch.int32)) for (images,) in inputs]

    def run(block: Tensor, sizes: Tensor) -> Tensor:
        options: dict[str, Any] = {"out_hw": CANVAS, "interp": interp, "mean": MEAN, "std": STD, "out_dtype": out_dtype}
        return compose_images(block, tables, sizes=sizes, **options)

    return rotate(run, blocks)


def check(providers: dict[str, Call], loop: Tensor, interp: str) -> None:
    """All on their first input. Ours equals the torch loop, but for the few pixels where its nearest sampler of a given size rounds
    another way; the OpenCV pipelines come within the rounding of their bytes.
    """
    tolerance = 0.02 if loop.dtype == torch.bfloat16 else 1e-3  # coordinates near 1000 round at 6e-5 of a pixel
    allowed = 0.02 if interp == "nearest" else 0.0
    for name in {OURS, LISTED} & set(providers):
        wrong = ((providers[name]().float() - loop.float()).abs() > tolerance).float().mean().item()
        if wrong > allowed:
            raise AssertionError(f"{name}: {wrong:.2%} of the pixels differ from the torch loop by more than {tolerance}")
    for name in {OPENCV, PLANES} & set(providers):
        error = (providers[name]() - loop).abs().mean().item()
        if error > 0.02:
            raise AssertionError(f"{name}: differs from the torch loop by {error:.3g} on average")


def random_images(count: int, hw: tuple[int, int], seed: int, device: torch.device) -> Images:
    """uint8 noise: the worst case for caches and no better than a photo for anyone."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (3, *hw), dtype=torch.uint8, generator=generator).to(device) for _ in range(count)]


def torch_loop(
    rows: Sequence[Sequence[Placement]], interp: str, out_dtype: torch.dtype, device: torch.device
) -> Callable[[Images], Tensor]:
    """Resize, flip, normalise and add one image after the other."""
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (MEAN, STD))

    def run(images: Images) -> Tensor:
        out = torch.zeros(len(rows), 3, *CANVAS, device=device)
        for canvas, row in zip(out, rows, strict=True):
            for p in row:
                tile = interpolate(images[p.src].float()[None], p.out_hw, **LOOP_MODES[interp])[0]
                tile = (tile.flip(2) if p.flip else tile).sub_(mean).div_(std)
                (x, y), (h, w) = p.offset, p.out_hw
                canvas[:, y : y + h, x : x + w] += p.weight * tile
        return out.to(out_dtype)

    return run


def opencv_providers(row: Sequence[Placement], interp: str, inputs: Sequence[tuple[Images]]) -> dict[str, Call]:
    """Resize, flip, paste or blend, and normalise to planar floats: what a CPU loader does.

    The first provider normalises whole pixels with OpenCV's functions, as mmcv does; the second each plane with NumPy.
    """
    if importlib.util.find_spec("cv2") is None:
        return {}
    cv2 = importlib.import_module("cv2")
    flag = cv2.INTER_LINEAR if interp == "bilinear" else cv2.INTER_NEAREST
    mean, scale = np.asarray([MEAN]), 1 / np.asarray([STD])  # float64 [1, 3]: OpenCV takes them as one pixel

    def tile_of(image: Any, p: Placement) -> Any:
        tile = image if image.shape[:2] == p.out_hw else cv2.resize(image, p.out_hw[::-1], interpolation=flag)
        return cv2.flip(tile, 1) if p.flip else tile

    def paste(images: list[Any]) -> Any:
        canvas = np.empty((*CANVAS, 3), np.uint8)
        for p in row:
            (x, y), (h, w) = p.offset, p.out_hw
            canvas[y : y + h, x : x + w] = tile_of(images[p.src], p)
        return canvas

    def blend(images: list[Any]) -> Any:
        canvas = np.zeros((*CANVAS, 3), np.float32)
        for p in row:
            (x, y), (h, w) = p.offset, p.out_hw
            part, tile = canvas[y : y + h, x : x + w], tile_of(images[p.src], p).astype(np.float32)
            cv2.scaleAdd(cv2.subtract(tile, mean, tile), p.weight, part, part)
        return canvas

    whole = all(p.weight == 1.0 for p in row)

    def run(images: list[Any]) -> Tensor:
        cv2.setNumThreads(torch.get_num_threads())
        canvas = paste(images).astype(np.float32) if whole else blend(images)
        if whole:
            cv2.subtract(canvas, mean, canvas)
        cv2.multiply(canvas, scale, canvas)
        return torch.from_numpy(np.ascontiguousarray(canvas.transpose(2, 0, 1)))

    def run_by_plane(images: list[Any]) -> Tensor:
        cv2.setNumThreads(torch.get_num_threads())
        canvas, planes = paste(images), np.empty((3, *CANVAS), np.float32)
        for c in range(3):
            np.subtract(canvas[..., c], np.float32(MEAN[c]), out=planes[c])
            planes[c] /= np.float32(STD[c])
        return torch.from_numpy(planes)

    arrays = [([image.permute(1, 2, 0).contiguous().numpy() for image in images],) for (images,) in inputs]
    pipelines = {OPENCV: run} | ({PLANES: run_by_plane} if whole else {})
    return {name: rotate(pipeline, arrays) for name, pipeline in pipelines.items()}


def kornia_providers(batch: int, device: torch.device) -> dict[str, Call]:
    """Kornia mosaics a batch of equal float images; it neither resizes nor normalises."""
    if importlib.util.find_spec("kornia") is None:
        return {}
    augmentation = importlib.import_module("kornia.augmentation").RandomMosaic(output_size=CANVAS, p=1.0, cropping_mode="slice")
    images = torch.rand(max(batch, 4), 3, *CANVAS, device=device)
    return {KORNIA: lambda: augmentation(images)}


def boxes_case(device: torch.device) -> Case:
    """The boxes of eight mosaics with erasing."""
    erase = [(40 * i, 30 * i, 40 * i + 50, 30 * i + 40) for i in range(10)]
    tiles = [Placement.resized(t.src, SOURCE, t.out_hw, offset=t.offset, flip=FLIP_X, erase=erase) for t in mosaic()]
    tables = ComposePlan.from_placements([CANVAS] * 8, [tiles] * 8).to(device)
    generator = torch.Generator().manual_seed(0)
    corners = (torch.rand(4, 50, 2, 2, generator=generator) * torch.tensor([640.0, 480.0])).sort(2).values.flatten(2)
    targets = PaddedTargets.from_list([Target(boxes=boxes, labels=torch.arange(50)) for boxes in corners], device=device)
    return Case(
        op="compose",
        name="8 canvases, 4x50 boxes",
        mode="boxes",
        dtype="float32",
        inputs="uniform",
        bytes=8 * 200 * (16 + 8 + 4 + 4) * 2,
        providers={OURS: lambda: compose_boxes(targets, tables)},
        check=lambda: check_boxes(compose_boxes(targets, tables)),
    )


def check_boxes(result: PaddedTargets) -> None:
    inside = (result.boxes >= 0).all() & (result.boxes[..., 2] <= CANVAS[1]).all() & (result.boxes[..., 3] <= CANVAS[0]).all()
    if not bool(inside) or int(result.count.min()) == 0:
        raise AssertionError("boxes left the canvas or vanished")


def cache_case(device: torch.device) -> Case:
    """Eight images into the ring."""
    ring = torch.zeros(8, 3 * CANVAS[0] * CANVAS[1], dtype=torch.uint8, device=device)
    inputs = [(random_images(8, CANVAS, seed, device),) for seed in range(2)]

    def copies(images: Images) -> None:
        for slot, image in enumerate(images):
            ring[slot].copy_(image.reshape(-1))

    def check_ring() -> None:
        cache_write(ring, inputs[0][0], list(range(8)))
        if not torch.equal(ring[7].view(3, *CANVAS), inputs[0][0][7]):
            raise AssertionError("the ring does not hold what was written")

    return Case(
        op="compose",
        name=f"8x{CANVAS[0]}x{CANVAS[1]}",
        mode="cache write",
        dtype="uint8",
        inputs="uniform",
        bytes=2 * ring.numel(),
        providers={OURS: rotate(lambda images: cache_write(ring, images, list(range(8))), inputs), LOOP: rotate(copies, inputs)},
        check=check_ring,
        eager_only=(OURS,),  # it uploads the addresses of its images
    )
