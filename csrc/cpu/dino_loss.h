#pragma once

#include <cstdint>

#include "simd.h"

namespace dinofast {

struct Logits { // (outer, B, K), the last axis contiguous
    const void* data;
    Dtype dtype;
    int64_t outer_stride, image_stride;  // in elements
};

struct LossSizes { int64_t crops, teachers, images, prototypes; };  // V, T, B, K

struct LossOptions {
    double student_temp, teacher_temp;
    double terms;          // the loss is the sum over images and pairs divided by this
    bool diagonal;         // whether crop v meets teacher row t = v
    double grad_scale;     // gradient = grad_scale (mass softmax - Q)
    bool streamed;         // store the gradient past the cache, which is slower where it would have stayed there
};

struct LossSums { double loss, entropy; };

// See dino_loss.cpp. Without `center` (K,) the teacher's rows are probabilities, and entropy means nothing. `teacher_sum` (K,) and
// `grad` (V, B, K) may be null; grad is contiguous, bf16 for a bf16 student, else fp32: in fp16 it might underflow before a loss
// scale lifts it.
LossSums dino_loss(Logits student, Logits teacher, const float* center, LossSizes sizes, const LossOptions& options,
                   float* teacher_sum, void* grad, int n_threads);

}  // namespace dinofast
