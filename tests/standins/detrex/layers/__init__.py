from .multi_scale_deform_attn import MultiScaleDeformableAttention, multi_scale_deformable_attn_pytorch

__all__ = ["MultiScaleDeformableAttention", "multi_scale_deformable_attn_pytorch"]
