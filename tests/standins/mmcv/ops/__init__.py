import importlib

from .multi_scale_deform_attn import MultiScaleDeformableAttention

_ext = importlib.import_module("mmcv._ext")
for _name in ("nms", "roi_align_forward"):
    assert hasattr(_ext, _name), f"{_name} miss in module _ext"

__all__ = ["MultiScaleDeformableAttention"]
