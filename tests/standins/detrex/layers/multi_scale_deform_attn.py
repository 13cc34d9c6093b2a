from standin_attention import Projections, compose
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class MultiScaleDeformableAttnFunction(Function):
    @staticmethod
    def forward(ctx, value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights, im2col_step):
        ctx.step = im2col_step
        ctx.save_for_backward(value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights)
        inputs = value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights
        return _C.ms_deform_attn_forward(*inputs, im2col_step)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        grad_value, grad_loc, grad_attn = _C.ms_deform_attn_backward(*ctx.saved_tensors, grad_output, ctx.step)
        return grad_value, None, None, grad_loc, grad_attn, None


def multi_scale_deformable_attn_pytorch(value, value_spatial_shapes, sampling_locations, attention_weights):
    return compose(value, value_spatial_shapes, sampling_locations, attention_weights)


class MultiScaleDeformableAttention(Projections):
    def __init__(self, embed_dim=256, num_heads=8, num_levels=4, num_points=4, img2col_step=64, dropout=0.1, batch_first=False):
        super().__init__(embed_dim, num_heads, num_levels, num_points)
        self.im2col_step, self.batch_first = img2col_step, batch_first
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        query,
        key=None,
        value=None,
        identity=None,
        query_pos=None,
        key_padding_mask=None,
        reference_points=None,
        spatial_shapes=None,
        level_start_index=None,
        **kwargs,
    ):
        identity = query if identity is None else identity
        query = query if query_pos is None else query + query_pos
        if not self.batch_first:
            query, value = query.transpose(0, 1), value.transpose(0, 1)
        inputs = self.heads_of(value, key_padding_mask), spatial_shapes
        samples = self.sample(query, reference_points, spatial_shapes)
        if value.is_cuda:
            out = MultiScaleDeformableAttnFunction.apply(*inputs, level_start_index, *samples, self.im2col_step)
        else:
            out = multi_scale_deformable_attn_pytorch(*inputs, *samples)
        out = self.output_proj(out)
        return self.dropout(out if self.batch_first else out.transpose(0, 1)) + identity


class _Refusing(type):
    def __getattr__(cls, name):
        raise ImportError("Cannot import 'detrex._C'")


class _Dummy(metaclass=_Refusing):
    def __init__(self, *args, **kwargs):
        raise ImportError("Cannot import 'detrex._C'")


try:
    from detrex import _C
except ImportError:
    MultiScaleDeformableAttention = _Dummy
