// dino_loss (arXiv 2104.14294, equation 2 with multi-crop) over materialised logits, with the gradient for an upstream of 1.
//
//     q[t, b, :] = softmax((teacher[t, b, :] - center) / teacher_temp)                                      t = 0, 1
//     loss       = 1 / (B P) sum_b sum_v [n_v log sum_k e^(d / student_temp) - <Q_v, d> / student_temp],   P = 2 (V - 1)
//                  d = student[v, b, :] - max_k,   Q_v = sum of q[t, b, :] over t != v,   n_v = the number of such t
//     grad       = scale (n_v softmax(student / student_temp) - Q_v)
//
// Both terms of the bracket are positive: nothing cancels, however large the logits. A row's sums are fp32 over a block and
// fp64 over the blocks. Bytes: student and teacher once from memory, the teacher once more for its column sums (from L3 where
// it fits), the gradient once. A thread works on one image and keeps three rows of K floats in L2, two of the teacher and one
// of the student. The order of every sum is fixed by the shapes alone: the number of threads changes no bit.

#include "dino_loss.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace dinofast {
namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr int64_t kBlock = 4096;    // columns of a row whose fp32 sums go into fp64 together
constexpr int64_t kColumns = 1024;  // columns whose sums over all teacher rows stay in L1

struct TeacherRow { double sum, entropy; };

// e[k] = exp((x - center - max) / temp) of one row, its sum, and the entropy of the normalised row.
template <class T>
DINOFAST_INLINE TeacherRow teacher_row_of(const T* x, const float* center, int64_t n, double temp, float* e) {
    int32_t highest = std::numeric_limits<int32_t>::min();
#pragma omp simd reduction(max : highest)
    for (int64_t k = 0; k < n; ++k) highest = std::max(highest, ordered(widen(x[k]) - center[k]));
    const float top = from_ordered(highest);
    const float factor = float(kLog2E / temp);
    double sum = 0, dot = 0;
    for (int64_t k0 = 0; k0 < n; k0 += kBlock) {
        const int64_t stop = std::min(n, k0 + kBlock);
        float block_sum = 0, block_dot = 0;
#pragma omp simd reduction(+ : block_sum, block_dot)
        for (int64_t k = k0; k < stop; ++k) {
            float d = widen(x[k]) - center[k] - top;
            float weight = exp2_scaled(d, factor);
            e[k] = weight;
            block_sum += weight;
            block_dot += weight * (d < -std::numeric_limits<float>::max() ? 0.0f : d);  // a logit of -inf has no weight
        }
        sum += block_sum, dot += block_dot;
    }
    return {sum, std::log(sum) - dot / (sum * temp)};
}

struct Target { const float* q; double weight; int count; };  // Q_v = weight q, made of `count` teacher rows

// The bracket of one row; its gradient where wanted. e is scratch (K,).
template <class T>
DINOFAST_INLINE double student_row_of(const T* x, Target target, int64_t n, double temp, float* e, T* grad, double grad_scale) {
    int32_t highest = std::numeric_limits<int32_t>::min();
#pragma omp simd reduction(max : highest)
    for (int64_t k = 0; k < n; ++k) highest = std::max(highest, ordered(widen(x[k])));
    const float top = from_ordered(highest);
    const float* q = target.q;
    const float factor = float(kLog2E / temp);
    double sum = 0, dot = 0;
    for (int64_t k0 = 0; k0 < n; k0 += kBlock) {
        const int64_t stop = std::min(n, k0 + kBlock);
        float block_sum = 0, block_dot = 0;
#pragma omp simd reduction(+ : block_sum, block_dot)
        for (int64_t k = k0; k < stop; ++k) {
            float d = widen(x[k]) - top;
            float weight = exp2_scaled(d, factor);
            e[k] = weight;
            block_sum += weight;
            block_dot += q[k] * d;
        }
        sum += block_sum, dot += block_dot;
    }
    if (grad) {
        const float own = float(grad_scale * target.count / sum), pull = float(grad_scale * target.weight);
#pragma omp simd
        for (int64_t k = 0; k < n; ++k) grad[k] = narrow<T>(own * e[k] - pull * q[k]);
    }
    return target.count * std::log(sum) - target.weight * dot / temp;
}

// sums[k] += x[k]
template <class T>
DINOFAST_INLINE void add_row_of(const T* x, int64_t n, double* sums) {
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) sums[k] += widen(x[k]);
}

// target_clones does not take templates.
#define DINOFAST_ROWS(T)                                                                                                      \
    DINOFAST_CLONES TeacherRow teacher_row(const T* x, const float* center, int64_t n, double temp, float* e) {               \
        return teacher_row_of(x, center, n, temp, e);                                                                         \
    }                                                                                                                         \
    DINOFAST_CLONES double student_row(const T* x, Target target, int64_t n, double temp, float* e, T* grad,                  \
                                       double grad_scale) {                                                                   \
        return student_row_of(x, target, n, temp, e, grad, grad_scale);                                                       \
    }                                                                                                                         \
    DINOFAST_CLONES void add_row(const T* x, int64_t n, double* sums) { add_row_of(x, n, sums); }
DINOFAST_ROWS(float)
DINOFAST_ROWS(BF16)
DINOFAST_ROWS(FP16)
#undef DINOFAST_ROWS

// a = inv_a a + inv_b b
DINOFAST_CLONES void add_normalised(float* a, const float* b, int64_t n, float inv_a, float inv_b) {
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) a[k] = a[k] * inv_a + b[k] * inv_b;
}

// Calls f with a pointer to the row of `logits` at (outer, image), in the logits' own type.
template <class F>
auto with_row(const Logits& logits, int64_t outer, int64_t image, F f) {
    const int64_t at = outer * logits.outer_stride + image * logits.image_stride;
    switch (logits.dtype) {
        case Dtype::bf16: return f(static_cast<const BF16*>(logits.data) + at);
        case Dtype::f16: return f(static_cast<const FP16*>(logits.data) + at);
        default: return f(static_cast<const float*>(logits.data) + at);
    }
}

}  // namespace

LossSums dino_loss(Logits student, Logits teacher, const float* center, int64_t n_crops, int64_t n_images, int64_t n_prototypes,
                   double student_temp, double teacher_temp, float* teacher_sum, void* grad, double grad_scale, int n_threads) {
    const int64_t V = n_crops, B = n_images, K = n_prototypes;
    if (grad) huge_pages(grad, size_t(V) * B * K * (student.dtype == Dtype::f32 ? 4 : 2));
    if ((V + 2) * B * K < 1 << 15) n_threads = 1;  // starting threads takes longer

    std::unique_ptr<float[]> scratch(new float[size_t(n_threads) * 3 * K]);
    std::vector<LossSums> image(B);
#pragma omp parallel num_threads(n_threads)
    {
#pragma omp for schedule(static) nowait
        for (int64_t k0 = 0; k0 < K; k0 += kColumns) {  // first, so that the loop below finds the teacher in L3
            const int64_t size = std::min(K - k0, kColumns);
            double sums[kColumns] = {};
            for (int64_t row = 0; row < 2 * B; ++row)
                with_row(teacher, row / B, row % B, [&](auto* x) { add_row(x + k0, size, sums); });
            std::copy(sums, sums + size, teacher_sum + k0);
        }

#ifdef _OPENMP
        float* q0 = scratch.get() + size_t(omp_get_thread_num()) * 3 * K;
#else
        float* q0 = scratch.get();
#endif
        float *q1 = q0 + K, *e = q1 + K;
#pragma omp for schedule(dynamic) nowait  // one barrier in all: each costs a time slice where cores are shared
        for (int64_t b = 0; b < B; ++b) {
            const auto t0 = with_row(teacher, 0, b, [&](auto* x) { return teacher_row(x, center, K, teacher_temp, q0); });
            const auto t1 = with_row(teacher, 1, b, [&](auto* x) { return teacher_row(x, center, K, teacher_temp, q1); });
            double loss = 0;
            for (int64_t v = 0; v < V; ++v) {
                if (v == 2) add_normalised(q0, q1, K, float(1 / t0.sum), float(1 / t1.sum));
                const Target target =
                    v == 0 ? Target{q1, 1 / t1.sum, 1} : v == 1 ? Target{q0, 1 / t0.sum, 1} : Target{q0, 1, 2};
                loss += with_row(student, v, b, [&](auto* x) {
                    using T = std::remove_const_t<std::remove_pointer_t<decltype(x)>>;
                    T* out = grad ? static_cast<T*>(grad) + (v * B + b) * K : nullptr;
                    return student_row(x, target, K, student_temp, e, out, grad_scale);
                });
            }
            image[b] = {loss, t0.entropy + t1.entropy};
        }
    }
    LossSums total{0, 0};
    for (const LossSums& one : image) total.loss += one.loss, total.entropy += one.entropy;
    return {total.loss / (double(B) * 2 * double(V - 1)), total.entropy / (2 * double(B))};
}

}  // namespace dinofast
