#pragma once

#include <cstdint>

#include "simd.h"

namespace dinofast {

struct Logits { // (outer, B, K), the last axis contiguous
    const void* data;
    Dtype dtype;
    int64_t outer_stride, image_stride;  // in elements
};

struct LossSums { double loss, entropy; };

// See dino_loss.cpp. `grad` (V, B, K), contiguous and in the student's dtype, may be null.
LossSums dino_loss(Logits student, Logits teacher, const float* center, int64_t n_crops, int64_t n_images, int64_t n_prototypes,
                   double student_temp, double teacher_temp, float* teacher_sum, void* grad, double grad_scale, int n_threads);

}  // namespace dinofast
