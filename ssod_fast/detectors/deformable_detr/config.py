"""Options of the Deformable DETR family."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

Selection = Literal["none", "two_stage", "mixed"]


@dataclass(frozen=True)
class DETRConfig:
    """Deformable DETR (Zhu et al., arXiv 2010.04159) and, with the options below, DINO (Zhang et al., arXiv 2203.03605).

    Defaults are those of Deformable DETR without refinement; :func:`dino` and :func:`deformable_detr` give the usual combinations.
    """

    # Without background.
    num_classes: int = 80
    # Queries that are matched with objects. Deformable DETR 300, DINO 900.
    queries: int = 300
    # Channels of tokens and queries.
    width: int = 256
    heads: int = 8
    encoder_layers: int = 6
    decoder_layers: int = 6
    # Hidden units of the feed-forward blocks. Deformable DETR 1024, DINO 2048.
    ffn: int = 1024
    # Levels of the pyramid: the backbone's strides 8, 16, 32, then further ones by strided convolutions.
    levels: int = 4
    # Samples per head and level of deformable attention.
    points: int = 4
    # Deformable DETR was trained with 0.1, DINO with 0.
    dropout: float = 0.0

    # Where queries come from. "none": learned. "two_stage": content, position and box from the encoder's best proposals (Deformable DETR).
    # "mixed": boxes from the best proposals, learned content (DINO).
    selection: Selection = "none"
    # Each decoder layer corrects the boxes of the one before. Needed by both kinds of selection.
    box_refine: bool = False
    # The prediction of a layer also trains the layer before it (DINO).
    look_forward_twice: bool = False
    # Queries get their position embedding from the current box in every layer, and layer outputs are normalised before heads read them
    # (DAB-DETR, DINO); otherwise position embeddings stay the same through all layers.
    box_positions: bool = False
    # Every layer has class and box heads of its own, as in Deformable DETR with refinement and in DINO. False: one of each for all layers.
    own_heads: bool = False
    # Groups of the norm behind the projections of the backbone's maps. None: 8 channels each, which are the published 32 at width 256.
    norm_groups: int | None = None

    # Denoising queries per step, positive ones and negative ones together twice as many (DINO 100); 0: none.
    denoising: int = 0
    # Share of noisy labels; half of them change.
    label_noise: float = 0.5
    # Size of the noise on box corners, in half sides. DINO 1.0, Semi-DETR 0.4.
    box_noise: float = 1.0

    # Temperature of the sine embedding of positions. Deformable DETR 10000, DINO 20.
    temperature: float = 10000.0

    def __post_init__(self) -> None:
        for name in ("num_classes", "queries", "width", "heads", "encoder_layers", "decoder_layers", "ffn", "levels", "points"):
            _check_int(self, name, 1)
        _check_int(self, "denoising", 0)
        for name in ("dropout", "label_noise", "box_noise", "temperature"):
            _check_number(self, name, 1.0 if name in ("dropout", "label_noise") else None)
        if self.temperature == 0:
            raise ValueError("temperature must be above 0, got 0")
        for name in ("box_refine", "look_forward_twice", "box_positions", "own_heads"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.selection not in ("none", "two_stage", "mixed"):
            raise ValueError(f'selection must be "none", "two_stage" or "mixed", got {self.selection!r}')
        if self.width % (2 * self.heads) or self.width % 4:
            raise ValueError(f"width must be a multiple of 4 and of twice the heads, got {self.width} and {self.heads} heads")
        if self.selection != "none" and not self.box_refine:
            raise ValueError(f"box_refine must be True for selection {self.selection!r}: its queries start from boxes")
        for name in ("look_forward_twice", "box_positions"):
            if getattr(self, name) and not self.box_refine:
                raise ValueError(f"box_refine must be True for {name}")
        if self.selection == "mixed" and not self.box_positions:
            raise ValueError('box_positions must be True for selection "mixed": its content is learned and its boxes are not')
        if self.norm_groups is not None:
            _check_int(self, "norm_groups", 1)
            if self.width % self.norm_groups:
                raise ValueError(f"norm_groups must divide the width {self.width}, got {self.norm_groups}")


def _check_number(config: DETRConfig, name: str, most: float | None) -> None:
    value = getattr(config, name)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (0 <= value < float("inf") if most is None else 0 <= value <= most):
        raise ValueError(f"{name} must {'be finite and not negative' if most is None else f'lie in [0, {most:g}]'}, got {value}")


def _check_int(config: DETRConfig, name: str, least: int) -> None:
    value = getattr(config, name)
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def deformable_detr(num_classes: int = 80, **changes: Any) -> DETRConfig:
    """Deformable DETR with iterative refinement and two stages, the strongest form of the paper.

    Args:
        num_classes: without background.
        changes: other fields of :class:`DETRConfig`.
    """
    base = DETRConfig(num_classes, selection="two_stage", box_refine=True, own_heads=True)
    return dataclasses.replace(base, **changes)


def dino(num_classes: int = 80, **changes: Any) -> DETRConfig:
    """DINO with four levels, as published.

    Args:
        num_classes: without background.
        changes: other fields of :class:`DETRConfig`.
    """
    base = DETRConfig(
        num_classes,
        queries=900,
        ffn=2048,
        selection="mixed",
        box_refine=True,
        look_forward_twice=True,
        box_positions=True,
        own_heads=True,
        denoising=100,
        temperature=20.0,
    )
    return dataclasses.replace(base, **changes)
