"""Mosaic, mixup, letterbox, rescaling, erasing and normalising of images in one pass, driven by a plan drawn on the host."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor

from ssod_fast.structures import PaddedTargets, upload

from ._registry import launcher, register
from ._sampling import axis_weights
from .compose_boxes import compose_boxes
from .compose_plan import FLIP_X, FLIP_Y, BoxRule, ComposePlan, PlaceF, PlaceI, PlanTables, host_plan

__all__ = ["cache_view", "cache_write", "compose", "compose_boxes", "compose_images", "valid_mask"]

Interp = Literal["nearest", "bilinear", "bilinear_aa"]
Blend = Literal["sum", "over"]
Sources = Tensor | Sequence[Tensor]
Sizes = Tensor | Sequence[Sequence[int]]

INTERP: dict[str, int] = {"nearest": 0, "bilinear": 1, "bilinear_aa": 2}
BLEND: dict[str, bool] = {"sum": False, "over": True}  # value of the schema's `over`
SOURCE_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)


def compose_images(
    sources: Sources,
    plan: ComposePlan | PlanTables,
    *,
    sizes: Sizes | None = None,
    out_hw: tuple[int, int] | None = None,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
    fill: float | Sequence[float] | Literal["mean"] = "mean",
    interp: Interp = "bilinear_aa",
    blend: Blend = "sum",
    out_dtype: torch.dtype = torch.float32,
    pad_value: float = 0.0,
    channels_last: bool = False,
    swap_rb: bool = False,
) -> Tensor:
    """Mixes source images into normalised canvases, writing every output pixel once.

    For a pixel of canvas b with the placements k that cover it, S_k the sampled source (the fill colour F where k is erased) and w_k the
    weight of k, blend "sum" gives P = sum_k w_k S_k + (1 - sum_k w_k) F and blend "over" the S_k of the highest k, F without any. The
    result is (P - mean) / std on the canvas and `pad_value` beyond it. The residual term makes partial cover exact: with fill "mean" a
    pixel that only one of two mixup images covers has half intensity in normalised units, as in MixPL (arXiv 2312.07006).

    On a GPU a plan, host `sizes` and the addresses of a list are uploaded through pinned memory that every call allocates. To avoid that,
    and in CUDA graphs, which cannot record it, pass dense blocks with `sizes` on the device and an uploaded plan.

    Args:
        sources: a list of [3, h, w] tensors of any strides, or all [h, w, 3]; or a dense block [N, 3, H, W], or a sequence of up to two
            of them, whose images are then numbered through. uint8, float16, bfloat16 or float32, in the unit of `mean`.
        plan: geometry of the mix; pass `plan.to(device)` to upload it once for several calls, and inside torch.compile.
        sizes: [N, 2] true (height, width) of the images in dense blocks; by default all of the block. Integers, host or device. On a
            device they are not read: they are clamped to the block, and where a plan reaches beyond them S_k repeats the border, or is 0
            where "bilinear_aa" shrinks and finds nothing under its triangle.
        out_hw: height and width of the result, by default the largest canvas rounded up to a multiple of 32.
        mean: per output channel, in source units (0..255 for uint8).
        std: like `mean`.
        fill: colour where nothing lies and where placements are erased: per output channel, one number, or "mean".
        interp: "nearest" with the given scale (as `F.interpolate(scale_factor=s)`), "bilinear" without corner alignment, or
            "bilinear_aa", antialiased where a source shrinks and "bilinear" elsewhere.
        blend: "sum" or "over".
        out_dtype: float32, bfloat16, float16, or uint8 (mean 0 and std 1 only; rounds half to even and clamps).
        pad_value: value beyond the canvas, in output units.
        channels_last: memory format of the result.
        swap_rb: reads the source channels in reverse order.

    Returns:
        [B, 3, *out_hw] of `out_dtype`.

    Raises:
        ValueError: for wrong shapes or options, and for a plan that does not fit, because it has more sources or was made for larger ones
            (checked outside of torch.compile, as far as the host knows the sizes); names the canvas and the placement.
        TypeError: for dtypes that do not mix or are not supported, and for what is no plan.
    """
    images, block_sizes = _check_sources(sources, sizes)
    host = host_plan(plan)
    out_hw = host.padded_hw() if out_hw is None else _two_integers("out_hw", out_hw)
    host.check_out_hw(out_hw)
    host.check_sources(_count(images))
    if not torch.compiler.is_compiling():  # a compiled graph would hold for this one plan
        host.check_sizes(_known_sizes(images, block_sizes))
    if _choice("blend", blend, BLEND) is False:
        host.check_weights()
    mean, std, fill = _check_colours(mean, std, fill, out_dtype)
    tables = _tables(plan, images)
    return _images(
        images,
        None if block_sizes is None else upload(block_sizes, tables.canvas.device),
        *(tables.canvas, tables.place_i, tables.place_f, tables.erase, tables.erase_canvas),
        *out_hw,
        *(mean, std, fill),
        _choice("interp", interp, INTERP),
        BLEND[blend],
        out_dtype,
        float(pad_value),
        channels_last,
        swap_rb,
    )


def compose(
    sources: Sources,
    targets: PaddedTargets,
    plan: ComposePlan | PlanTables,
    *,
    rule: BoxRule | None = None,
    nmax: int | None = None,
    **options: Any,
) -> tuple[Tensor, PaddedTargets]:
    """:func:`compose_images` and :func:`compose_boxes` with one plan and one upload of it.

    Args:
        sources: see :func:`compose_images`.
        targets: boxes of every source, in its own pixels; as many images as there are sources.
        plan: geometry of the mix.
        rule: which boxes survive, by default `BoxRule()`.
        nmax: rows per canvas of the new targets.
        options: the keywords of :func:`compose_images`.

    Returns:
        The images [B, 3, *out_hw] and their targets.
    """
    tables = plan if isinstance(plan, PlanTables) else host_plan(plan).to(targets.device)
    images = compose_images(sources, tables, **options)
    return images, compose_boxes(targets, tables, rule=rule, nmax=nmax, blend=options.get("blend", "sum"))


def valid_mask(canvas: Tensor, out_hw: tuple[int, int]) -> Tensor:
    """Bool [B, H, W], True on the canvas (transformers' `pixel_mask`); the original DETR's mask is its inverse.

    Args:
        canvas: [B, 2] height and width.
        out_hw: (H, W).
    """
    y = torch.arange(out_hw[0], device=canvas.device)[:, None]
    x = torch.arange(out_hw[1], device=canvas.device)
    return (y < canvas[:, 0, None, None]) & (x < canvas[:, 1, None, None])


def cache_write(ring: Tensor, images: Sequence[Tensor], slots: Sequence[int]) -> None:
    """Copies images into slots of a ring of packed images; :func:`cache_view` reads them.

    Args:
        ring: [R, capacity], one image per row, written in place.
        images: [3, h, w] of any strides (or all [h, w, 3]), dtype and device of the ring, 3 * h * w <= capacity. They must not be views
            of the slots that are written (clone them first): the copies run in no fixed order.
        slots: the rows to write, all different.

    Raises:
        ValueError: for a ring that is not 2-D and contiguous, an image that is not 3-D or does not fit, a slot outside the ring or given
            twice.
        TypeError: for another dtype than the ring's, or a slot that is no integer.
    """
    _check_ring(ring)
    if not all(isinstance(slot, Integral) for slot in slots):
        raise TypeError(f"slots must be integers, got {list(slots)}")
    if len(images) != len(slots):
        raise ValueError(f"slots must have one entry per image, got {len(slots)} for {len(images)} images")
    if len(set(slots)) != len(slots) or not all(0 <= slot < ring.shape[0] for slot in slots):
        raise ValueError(f"slots must be different numbers in [0, {ring.shape[0]}), got {list(slots)}")
    if not images:
        return
    chw, sizes = _check_sources(list(images), None)
    if sizes is not None:  # a dense block would pass for one image here
        raise ValueError(f"images must be [3, h, w] or [h, w, 3], got images[0] {list(images[0].shape)}")
    for i, image in enumerate(chw):
        if image.dtype != ring.dtype or image.device != ring.device:
            raise TypeError(f"images[{i}] must be {ring.dtype} on {ring.device} like the ring, got {image.dtype} on {image.device}")
        if image.numel() > ring.shape[1]:
            raise ValueError(f"images[{i}] has {image.numel()} values, but a slot of the ring holds {ring.shape[1]}")
    _write(ring, chw, list(slots))


def cache_view(ring: Tensor, slot: int, size: tuple[int, int]) -> Tensor:
    """The image of (height, width) `size` in a slot of the ring: [3, h, w], a view.

    Raises:
        ValueError: for a ring as :func:`cache_write` refuses it, a slot outside the ring, or a size that a slot cannot hold.
        TypeError: for a slot or a size that is not made of integers.
    """
    _check_ring(ring)
    height, width = _two_integers("size", size)
    if not isinstance(slot, Integral):
        raise TypeError(f"slot must be an integer, got {slot!r}")
    if not 0 <= slot < ring.shape[0]:
        raise ValueError(f"slot must lie in [0, {ring.shape[0]}), got {slot}")
    if height < 1 or width < 1 or 3 * height * width > ring.shape[1]:
        raise ValueError(f"size must be positive with 3 * h * w <= {ring.shape[1]}, what a slot of the ring holds, got {(height, width)}")
    return ring[slot, : 3 * height * width].view(3, height, width)


# Checks


def _choice(name: str, value: str, options: dict[str, Any]) -> Any:
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(options)}, got {value!r}")
    return options[value]


def _check_ring(ring: Tensor) -> None:
    if not isinstance(ring, Tensor):
        raise TypeError(f"ring must be a tensor, got {type(ring).__name__}")
    if ring.dim() != 2 or not ring.is_contiguous():
        raise ValueError(f"ring must be a contiguous [R, capacity] tensor, got {list(ring.shape)} with strides {ring.stride()}")


def _two_integers(name: str, value: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(value, tuple | list) or len(value) != 2 or not all(isinstance(side, Integral | torch.SymInt) for side in value):
        raise TypeError(f"{name} must be two integers (height, width), got {value!r}")
    return int(value[0]), int(value[1])


def _tables(plan: ComposePlan | PlanTables, images: list[Tensor]) -> PlanTables:
    """The plan on the sources' device."""
    if isinstance(plan, ComposePlan):
        return plan.to(images[0].device if images else "cpu")
    if images and plan.canvas.device != images[0].device:
        raise ValueError(f"plan must be on {images[0].device} like the sources, got {plan.canvas.device}")
    return plan


def _check_sources(sources: Sources, sizes: Sizes | None) -> tuple[list[Tensor], Tensor | None]:
    """The sources as channel-first tensors: a ragged list (no sizes) or one or two dense blocks with their sizes."""
    images = [sources] if isinstance(sources, Tensor) else list(sources)
    for i, image in enumerate(images):
        _check_source(i, image, images[0])
    if not images or images[0].dim() == 3:
        if sizes is not None:
            raise ValueError("sizes belong to dense blocks; a list of images carries its own")
        return _channel_first(images), None
    if len(images) > 2:
        raise ValueError(f"sources must be at most two dense blocks, got {len(images)}")
    return images, _check_sizes(images, sizes)


def _check_source(i: int, image: Tensor, first: Tensor) -> None:
    if not isinstance(image, Tensor):
        raise TypeError(f"sources[{i}] must be a tensor, got {type(image).__name__}")
    if image.dtype not in SOURCE_DTYPES:
        raise TypeError(f"sources[{i}] must be uint8, float16, bfloat16 or float32, got {image.dtype}")
    if image.dtype != first.dtype:
        raise TypeError(f"sources must have one dtype, got {first.dtype} and sources[{i}] {image.dtype}")
    if image.device != first.device:
        raise ValueError(f"sources must be on one device, got {first.device} and sources[{i}] on {image.device}")
    if image.requires_grad:
        raise ValueError(f"sources[{i}] requires grad, but images are data here: detach it")
    if image.dim() not in (3, 4) or image.dim() != first.dim():
        raise ValueError(f"sources must all be [3, h, w] or all dense [N, 3, H, W] blocks, got sources[{i}] {list(image.shape)}")
    if image.dim() == 4 and image.shape[1] != 3:
        raise ValueError(f"sources[{i}] must be [N, 3, H, W], got {list(image.shape)}")
    if image.numel() == 0 and 0 in image.shape[-3:]:
        raise ValueError(f"sources[{i}] must have pixels, got {list(image.shape)}")


def _channel_first(images: list[Tensor]) -> list[Tensor]:
    """Views [3, h, w] of images that all are [3, h, w] or all [h, w, 3]; where both would do, the first."""
    if all(image.shape[0] == 3 for image in images):
        return images
    if all(image.shape[2] == 3 for image in images):
        return [image.permute(2, 0, 1) for image in images]
    shapes = [list(image.shape) for image in images]
    raise ValueError(f"sources must have 3 channels in one layout, all [3, h, w] or all [h, w, 3], got {shapes}")


def _check_sizes(blocks: list[Tensor], sizes: Sizes | None) -> Tensor:
    """Int32 [N, 2] for dense blocks. Values are checked only on the host; kernels clamp them to the block."""
    full = torch.tensor([block.shape[-2:] for block in blocks for _ in range(block.shape[0])], dtype=torch.int32).view(-1, 2)
    if sizes is None:
        return full
    given = torch.as_tensor(sizes)
    if given.dtype.is_floating_point or given.dtype.is_complex or given.dtype == torch.bool:
        raise TypeError(f"sizes must be integers, got {given.dtype}")
    if given.shape != full.shape:
        raise ValueError(f"sizes must be [{full.shape[0]}, 2] (height, width), got {list(given.shape)}")
    given = given.to(torch.int32)
    if given.device.type == "cpu" and not torch.compiler.is_compiling() and bool(((given < 1) | (given > full)).any()):
        raise ValueError(f"sizes must lie between 1 and the block's own, got {given.tolist()}")
    return given.contiguous()


def _known_sizes(images: list[Tensor], block_sizes: Tensor | None) -> list[Any]:
    """(height, width) of every source as far as the host knows them: sizes on a device are not read, the block bounds them."""
    if block_sizes is None:
        return [image.shape[1:] for image in images]
    if type(block_sizes) is Tensor and block_sizes.device.type == "cpu":  # not a fake tensor
        return block_sizes.tolist()
    return [block.shape[-2:] for block in images for _ in range(block.shape[0])]


def _count(images: list[Tensor]) -> int:
    return sum(block.shape[0] for block in images) if images and images[0].dim() == 4 else len(images)


def _check_colours(
    mean: Sequence[float], std: Sequence[float], fill: float | Sequence[float] | str, out_dtype: torch.dtype
) -> tuple[list[float], list[float], list[float]]:
    mean, std = _three("mean", mean), _three("std", std)
    if isinstance(fill, str) and fill != "mean":
        raise ValueError(f"fill must be 'mean', a number or three numbers, got {fill!r}")
    if not all(value > 0 for value in std):
        raise ValueError(f"std must be positive, got {std}")
    if out_dtype == torch.uint8 and (mean != [0.0] * 3 or std != [1.0] * 3):
        raise ValueError(f"out_dtype uint8 needs mean 0 and std 1, got {mean} and {std}")
    if out_dtype not in SOURCE_DTYPES:
        raise TypeError(f"out_dtype must be float32, bfloat16, float16 or uint8, got {out_dtype}")
    return mean, std, mean if isinstance(fill, str) else _three("fill", fill)


def _three(name: str, value: float | Sequence[float]) -> list[float]:
    values = [float(value)] * 3 if isinstance(value, (int, float)) else [float(v) for v in value]
    if len(values) != 3 or not all(abs(v) < float("inf") for v in values):
        raise ValueError(f"{name} must be three finite numbers, got {value}")
    return values


# The dispatcher's side


def _images(*args: Any) -> Tensor:
    result: Tensor = torch.ops.ssod_fast.compose_images(*args)
    return result


def _write(ring: Tensor, images: list[Tensor], slots: list[int]) -> None:
    torch.ops.ssod_fast.cache_write(ring, images, slots)


def _images_reference(
    sources: list[Tensor],
    sizes: Tensor | None,
    canvas: Tensor,  # [B, 2]
    place_i: Tensor,  # [B, K, 11]
    place_f: Tensor,  # [B, K, 5]
    erase: Tensor,  # [B, K, E, 4]
    erase_canvas: Tensor,  # [B, Ec, 4]
    out_h: int,
    out_w: int,
    mean: list[float],
    std: list[float],
    fill: list[float],
    interp: int,
    over: bool,
    out_dtype: torch.dtype,
    pad_value: float,
    channels_last: bool,
    swap_rb: bool,
    compute: torch.dtype = torch.float32,
) -> Tensor:
    """The specification. Values in `compute`; index arithmetic stays in float32, whose rounding decides which pixel is read."""
    block, sizes = _as_block(sources, sizes, canvas.device)
    block = block.flip(1) if swap_rb else block
    shift, scale, colour = (upload(torch.tensor(v, dtype=compute), canvas.device).view(3, 1, 1) for v in (mean, std, fill))
    blank = (colour - shift) / scale  # [3, 1, 1], the normalised fill colour
    batch = canvas.shape[0]
    total = torch.zeros(batch, 3, out_h, out_w, dtype=compute, device=canvas.device)
    weight = torch.zeros(batch, 1, out_h, out_w, dtype=compute, device=canvas.device)
    for k in range(place_i.shape[1]):
        seen, erased = _cover(place_i[:, k], erase[:, k], out_h, out_w)  # [B, 1, H, W]
        sample = (_sample(block, sizes, place_i[:, k], place_f[:, k], out_h, out_w, interp, compute) - shift) / scale
        sample = torch.where(erased, blank, sample)
        w_k = place_f[:, k, PlaceF.WEIGHT, None, None, None].to(compute)
        total = torch.where(seen, sample if over else total + w_k * sample, total)
        weight = torch.where(seen, 1.0 if over else weight + w_k, weight)
    total = total + (1 - weight) * blank
    total = torch.where(_inside_any(erase_canvas, None, out_h, out_w)[:, None], blank, total)
    total = torch.where(valid_mask(canvas, (out_h, out_w))[:, None], total, pad_value)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return _round(total, out_dtype).contiguous(memory_format=layout)


def _as_block(sources: list[Tensor], sizes: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """All sources padded into one [S, 3, H, W] block, and their int32 [S, 2] sizes."""
    if not sources:
        sources, sizes = [torch.zeros(1, 3, 1, 1, device=device)], torch.ones(1, 2, dtype=torch.int32, device=device)
    if sizes is None:
        sizes = upload(torch.tensor([s.shape[-2:] for s in sources], dtype=torch.int32), device)
        sources = [s[None] for s in sources]
    height, width = max(s.shape[-2] for s in sources), max(s.shape[-1] for s in sources)
    padded = [torch.nn.functional.pad(s, (0, width - s.shape[-1], 0, height - s.shape[-2])) for s in sources]
    return torch.cat(padded), sizes


def _inside_any(rects: Tensor, count: Tensor | None, out_h: int, out_w: int) -> Tensor:
    """Bool [B, H, W]: pixels inside one of the first `count` (all by default) rectangles [B, E, 4]."""
    y = torch.arange(out_h, device=rects.device)[:, None]
    x = torch.arange(out_w, device=rects.device)
    inside = torch.zeros(rects.shape[0], out_h, out_w, dtype=torch.bool, device=rects.device)
    for e in range(rects.shape[1]):
        x0, y0, x1, y1 = (rects[:, e, i, None, None] for i in range(4))
        hit = (x >= x0) & (x < x1) & (y >= y0) & (y < y1)
        inside |= hit if count is None else hit & (e < count)[:, None, None]
    return inside


def _cover(place: Tensor, erase: Tensor, out_h: int, out_w: int) -> tuple[Tensor, Tensor]:
    """Bool [B, 1, H, W] twice: pixels that the placements show, and pixels that they erase."""
    seen = _inside_any(place[:, None, PlaceI.X0 : PlaceI.Y1 + 1], None, out_h, out_w)
    seen &= (place[:, PlaceI.SRC] >= 0)[:, None, None]
    offset = place[:, None, PlaceI.OFF_X : PlaceI.OFF_Y + 1]  # the patches move with their placement
    erased = _inside_any(erase + offset.repeat(1, 1, 2), place[:, PlaceI.N_ERASE], out_h, out_w)
    return seen[:, None], erased[:, None]


def _sample(
    block: Tensor, sizes: Tensor, place: Tensor, scales: Tensor, out_h: int, out_w: int, interp: int, compute: torch.dtype
) -> Tensor:
    """One placement per canvas, resampled to all of the output: [B, 3, H, W]. Only its visible rectangle means anything."""
    src = place[:, PlaceI.SRC].clamp(min=0).long()
    image, (height, width) = block[src].to(compute), sizes[src].unbind(1)
    height, width = height.clamp(1, image.shape[2]), width.clamp(1, image.shape[3])
    v = _local(out_h, place[:, PlaceI.OFF_Y], place[:, PlaceI.OUT_H], place[:, PlaceI.FLIP] & FLIP_Y)
    u = _local(out_w, place[:, PlaceI.OFF_X], place[:, PlaceI.OUT_W], place[:, PlaceI.FLIP] & FLIP_X)
    rows = axis_weights(v, scales[:, PlaceF.INV_Y], height, image.shape[2], interp).to(compute)
    cols = axis_weights(u, scales[:, PlaceF.INV_X], width, image.shape[3], interp).to(compute)
    finite = image.isfinite()
    with torch.autocast(image.device.type, enabled=False):
        sample = torch.einsum("byh,bchw,bxw->bcyx", rows, torch.where(finite, image, 0), cols)
        broken = torch.einsum("byh,bchw,bxw->bcyx", rows, (~finite).to(compute), cols)
    return torch.where(broken > 0, torch.nan, sample)  # a value that is not finite reaches the pixels that read it, no others


def _local(n: int, offset: Tensor, out_size: Tensor, flip: Tensor) -> Tensor:
    """Positions of n canvas pixels inside the resized source, the flip undone: int [B, n], clamped to it."""
    u = torch.arange(n, device=offset.device) - offset[:, None]
    last = (out_size - 1)[:, None]
    u = torch.where(flip[:, None] > 0, last - u, u)
    return torch.minimum(u, last).clamp(min=0)


def _round(values: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.uint8:
        return values.nan_to_num(0.0).round().clamp(0, 255).to(dtype)
    return values.to(dtype)


def _images_fake(sources: list[Tensor], sizes: Tensor | None, canvas: Tensor, place_i: Tensor, place_f: Tensor, *rest: Any) -> Tensor:
    _, _, out_h, out_w, _, _, _, _, _, out_dtype, _, channels_last, _ = rest
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((canvas.shape[0], 3, out_h, out_w), dtype=out_dtype, device=canvas.device, memory_format=layout)


def _cache_write_reference(ring: Tensor, images: list[Tensor], slots: list[int]) -> None:
    for image, slot in zip(images, slots, strict=True):
        cache_view(ring, slot, (image.shape[1], image.shape[2])).copy_(image)


def _cache_write_fake(ring: Tensor, images: list[Tensor], slots: list[int]) -> None:
    return None


register(
    "compose_images(Tensor[] sources, Tensor? sizes, Tensor canvas, Tensor place_i, Tensor place_f, Tensor erase, Tensor erase_canvas, "
    "SymInt out_h, SymInt out_w, float[] mean, float[] std, float[] fill, int interp, bool over, ScalarType out_dtype, float pad_value, "
    "bool channels_last, bool swap_rb) -> Tensor",
    reference=_images_reference,
    fake=_images_fake,
    triton=launcher("compose", "compose_images"),
)
register(
    "cache_write(Tensor(a!) ring, Tensor[] images, SymInt[] slots) -> ()",
    reference=_cache_write_reference,
    fake=_cache_write_fake,
    triton=launcher("compose", "cache_write"),
)
