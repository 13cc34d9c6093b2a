"""The attention module of the Deformable DETR family, by its published surface."""

from standin_attention import Projections, compose


class MSDeformAttn(Projections):
    def __init__(self, d_model=256, n_levels=4, n_heads=8, n_points=4):
        super().__init__(d_model, n_heads, n_levels, n_points)
        self.d_model, self.n_levels, self.n_heads, self.n_points = d_model, n_levels, n_heads, n_points

    def forward(self, query, reference_points, input_flatten, input_spatial_shapes, input_level_start_index, input_padding_mask=None):
        value = self.heads_of(input_flatten, input_padding_mask)
        return self.output_proj(compose(value, input_spatial_shapes, *self.sample(query, reference_points, input_spatial_shapes)))
