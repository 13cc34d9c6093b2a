"""Where things are: cells of feature maps, boxes and their logits, and the sine embedding of both.

Everything here is float32 or wider, whatever the network computes in: a coordinate in bfloat16 is a pixel off in a wide image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssod_fast.structures import upload

# Of the sine embedding of boxes; that of feature maps is an option of the network.
BOX_TEMPERATURE = 10000.0
_EPS = 1e-5
# Where `inverse_sigmoid` ends on both sides.
LOGIT_LIMIT = -math.log(_EPS)


def wide(x: Tensor) -> Tensor:
    """`x` as float32, or as float64 where it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def inverse_sigmoid(x: Tensor) -> Tensor:
    """Logits of coordinates; those beyond 1e-5 from 0 and 1 are pulled in, as in Deformable DETR."""
    x = wide(x).clamp(0, 1)
    return torch.log(x.clamp(min=_EPS) / (1 - x).clamp(min=_EPS))


def clamp_logits(x: Tensor) -> Tensor:
    """The inverse sigmoid of the sigmoid of `x`: from where a layer moves a reference box."""
    return x.clamp(-LOGIT_LIMIT, LOGIT_LIMIT)


def sine_embedding(x: Tensor, features: int, temperature: float) -> Tensor:
    """Sines and cosines of coordinates in wavelengths from 1 to `temperature` (Vaswani et al., arXiv 1706.03762).

    Args:
        x: [...], 0..1.
        features: even.
        temperature: longest wavelength, in units of the range of `x`.

    Returns:
        [..., features]: sine and cosine alternate, the shortest wavelength first.
    """
    x = wide(x)
    steps = torch.arange(features // 2, device=x.device, dtype=x.dtype) * (-2 / features)
    angles = (x * (2 * math.pi))[..., None] * temperature**steps
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)


def box_embedding(boxes: Tensor, width: int, order: Sequence[int] = (0, 1, 2, 3)) -> Tensor:
    """Sine embedding of boxes.

    Args:
        boxes: [B, Q, 4] cxcywh in 0..1.
        width: channels of the network.
        order: of the coordinates in the embedding. DAB-DETR puts y first.

    Returns:
        [B, Q, 2 * width], a quarter for each coordinate.
    """
    parts = [sine_embedding(boxes[..., i], width // 2, BOX_TEMPERATURE) for i in order]
    return torch.cat(parts, -1)


@dataclass(frozen=True)
class Extents:
    """How much of each level is image, known on the host.

    Attributes:
        cells: per image and level the (rows, columns) that are image.
        shapes: (rows, columns) of each level.
    """

    cells: list[list[tuple[int, int]]]
    shapes: list[tuple[int, int]]

    @classmethod
    def of(cls, sizes: Sequence[tuple[int, int]], padded: tuple[int, int], shapes: Sequence[tuple[int, int]]) -> Extents:
        """A cell belongs to the image if the pixel at its upper left corner does.

        Args:
            sizes: (h, w) of each image in pixels.
            padded: (H, W) of the batch.
            shapes: (rows, columns) of each level.
        """
        levels = [(int(h), int(w)) for h, w in shapes]
        height, width = padded
        # Ceiling of the share, in integers.
        cells = [[(-(-h * rows // height), -(-w * columns // width)) for rows, columns in levels] for h, w in sizes]
        return cls(cells, levels)

    @property
    def full(self) -> bool:
        """Whether every image fills every level."""
        return all(image == self.shapes for image in self.cells)

    @property
    def distinct(self) -> list[list[tuple[int, int]]]:
        """`cells`, reduced to one image if all are alike."""
        return self.cells[:1] if all(image == self.cells[0] for image in self.cells) else self.cells

    def padding(self, device: torch.device) -> list[Tensor]:
        """Bool [B, h, w] of each level, True outside of the image."""
        counts = upload(torch.tensor(self.cells), device)  # [B, L, 2]
        masks = []
        for level, (height, width) in enumerate(self.shapes):
            rows = torch.arange(height, device=device) >= counts[:, level, :1]  # [B, h]
            columns = torch.arange(width, device=device) >= counts[:, level, 1:]  # [B, w]
            masks.append(rows[:, :, None] | columns[:, None, :])
        return masks

    def valid_ratios(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """[B, L, 2], share of the columns and of the rows of each level that are image."""
        ratios = [[(c / w, r / h) for (r, c), (h, w) in zip(image, self.shapes, strict=True)] for image in self.cells]
        return upload(torch.tensor(ratios, dtype=dtype), device)

    def map_positions(self, width: int, temperature: float, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """Sine embedding of the cells of each level, y before x.

        Returns:
            [B, h * w, width] of each level, or [1, h * w, width] where that is the same for all images.
        """
        counts = upload(torch.tensor(self.distinct, dtype=dtype), device)  # [B or 1, L, 2]
        return [_level_positions(counts[:, level], shape, width // 2, temperature) for level, shape in enumerate(self.shapes)]


def _level_positions(counts: Tensor, shape: tuple[int, int], features: int, temperature: float) -> Tensor:
    """[B, h * w, 2 * features]; a row embeds its y once, a column its x."""
    embedded = []
    for axis, size in enumerate(shape):
        centres = torch.arange(size, device=counts.device, dtype=counts.dtype) + 0.5
        embedded.append(sine_embedding(centres / counts[:, axis : axis + 1], features, temperature))
    y, x = embedded
    height, width = shape
    both = torch.cat((y[:, :, None].expand(-1, -1, width, -1), x[:, None].expand(-1, height, -1, -1)), -1)
    return both.flatten(1, 2)


def token_centres(shapes: Sequence[tuple[int, int]], valid_ratios: Tensor | None, like: Tensor) -> Tensor:
    """Centres of all cells in units of the image they lie in.

    Args:
        shapes: (rows, columns) of each level.
        valid_ratios: [B, L, 2], or None where images fill the batch.
        like: tells device and dtype.

    Returns:
        [B, S, 2] (x, y), or [1, S, 2] without ratios.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    centres = []
    for level, (height, width) in enumerate(shapes):
        y = (torch.arange(height, device=like.device, dtype=dtype) + 0.5) / height
        x = (torch.arange(width, device=like.device, dtype=dtype) + 0.5) / width
        grid = torch.stack((x[None].expand(height, -1), y[:, None].expand(-1, width)), -1).view(1, -1, 2)
        centres.append(grid if valid_ratios is None else grid / valid_ratios[:, level, None])
    return torch.cat(centres, 1)
