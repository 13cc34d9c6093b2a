"""Modules around the ops: what a model holds where it would hold parameters."""

from .ms_deform_attn import MultiScaleDeformableAttention

__all__ = ["MultiScaleDeformableAttention"]
