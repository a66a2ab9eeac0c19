#pragma once

#include <cstdint>
#include <vector>

#include "simd.h"

namespace dinofast {

struct Numbers { const void* data; Dtype dtype; };  // contiguous, in any of the three formats
struct Copy { void* data; Dtype dtype; };           // what fp32 numbers are rounded into; data may be null

struct AdamwTensor {  // one parameter and what belongs to it, `size` numbers each
    float* param;
    Numbers grad;
    float *exp_avg, *exp_avg_sq, *teacher;  // teacher may be null
    Copy param_copy, teacher_copy;
    float* step;                            // one number
    int64_t size;
    float coefficient;
};

struct AdamwOptions { double lr, weight_decay, beta1, beta2, eps, momentum; };

struct EmaTensor { float* teacher; Numbers student; Copy copy; int64_t size; };

struct GradTensor { Numbers grad; int64_t size; };

// See adamw_ema.cpp.
void adamw_ema(const std::vector<AdamwTensor>& tensors, const AdamwOptions& options, int n_threads);
void ema(const std::vector<EmaTensor>& tensors, double momentum, int n_threads);
void grad_norms(const std::vector<GradTensor>& tensors, float* norms, int n_threads);

}  // namespace dinofast
