// Which problems sum the gradient of value of deformable attention in tiles (csrc/ms_deform_attn_tiles.h), and how.
#pragma once

#include "cuda/ms_deform_attn.cuh"

namespace ssod::deform {

// Whether tiles can be summed: a query per token, 16-byte rows, at least one, of a type that is summed in float32, all
// of it at addresses that suit them, and sizes that 32 bits hold.
bool tiles_fit(const Arguments& a, const Tensor& grad_output);

// Whether they should be: enough blocks to fill the device, else what they save is less than another launch costs.
bool tiles_pay(const Arguments& a);

// Adds the gradient of value to grad_value, float32 [B, S, M, C], for arguments that fit.
void sum_in_tiles(const Arguments& a, const Tensor& grad_output, const std::optional<Tensor>& lse, float* grad_value,
                  cudaStream_t stream);

}  // namespace ssod::deform
