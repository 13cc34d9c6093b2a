"""The form in which the Deformable DETR family calls its extension."""

import MultiScaleDeformableAttention as MSDA
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class MSDeformAttnFunction(Function):
    @staticmethod
    def forward(ctx, value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights, im2col_step):
        ctx.im2col_step = im2col_step
        inputs = value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights
        ctx.save_for_backward(*inputs)
        return MSDA.ms_deform_attn_forward(*inputs, ctx.im2col_step)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        grad_value, grad_sampling_loc, grad_attn_weight = MSDA.ms_deform_attn_backward(*ctx.saved_tensors, grad_output, ctx.im2col_step)
        return grad_value, None, None, grad_sampling_loc, grad_attn_weight, None
