// layer_norm.cu as it would be if someone had lost its barriers.

#include "types.cuh"

#define __syncthreads() static_cast<void>(0)
#define layer_norm_forward_f32 test_layer_norm_forward_without_barriers
#define layer_norm_forward_bf16 test_layer_norm_forward_without_barriers_bf16
#define layer_norm_forward_f16 test_layer_norm_forward_without_barriers_f16
#define layer_norm_backward_f32 test_layer_norm_backward_without_barriers
#define layer_norm_backward_bf16 test_layer_norm_backward_without_barriers_bf16
#define layer_norm_backward_f16 test_layer_norm_backward_without_barriers_f16
#define layer_norm_reduce test_layer_norm_reduce_without_barriers

#include "layer_norm.cu"
