// dino_loss (arXiv 2104.14294, equation 2 with multi-crop) over materialized logits, with the gradient for an upstream of 1.
//
//     q[t, b, :] = softmax((teacher[t, b, :] - center) / teacher_temp), or teacher[t, b, :] itself           t = 0 .. T-1
//     loss       = 1 / terms sum_b sum_v [mass_v log sum_k e^(d / student_temp) - <Q_v, d> / student_temp]
//                  d = student[v, b, :] - max_k,   Q_v = sum of q[t, b, :] over t != v, or over all t,   mass_v = sum_k Q_v
//     grad       = grad_scale (mass_v softmax(student / student_temp) - Q_v)
//
// Both terms of the bracket are positive: nothing cancels, however large the logits. A row is taken in blocks, each with its own
// maximum, so that it comes from memory once; sums are fp32 over a block and fp64 over the blocks. Bytes: student and teacher
// once from memory, the teacher once more for its column sums (from L3 where it fits), the gradient once. A thread works on one
// image and keeps T + 1 rows of K floats in L2, those of the teacher and one of the student; with T = 2, crop 0 meets only row
// 1 and crop 1 only row 0, so their sum takes the place of row 0 afterwards. The order of every sum is fixed by the shapes
// alone: the number of threads changes no bit.
//
// Two cores of an EPYC with AVX-512, B = 32, V = 10, K = 65,536, fp32, memory already there (2026-11-25): 10.4 ms with a pass for
// the maximum of a row of its own, 9.5 ms in blocks with the next one fetched ahead, 9.1 ms with stores past the cache, where a
// copy of the student's logits takes 5.5. Writing the gradient of a row between the blocks of the next one gained nothing, and
// leaving out the exponentials altogether only 0.8: what is left is memory.

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
constexpr int64_t kBlock = 1024;  // columns: of a row's blocks, and of the teacher's sums, which stay in L1

struct Block { double sum, dot; float top; };  // of a student's row; the sums are relative to the block's own maximum
struct TeacherRow { double sum, entropy; };

// e[k] = exp((x - center - max) / temp) of one row, the sums of its blocks, its sum, and the entropy of the normalized row.
template <class T>
DINOFAST_INLINE TeacherRow teacher_row_of(const T* x, const float* center, int64_t n, double temp, float* e, double* block_sums) {
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
        *block_sums++ = block_sum;
        sum += block_sum, dot += block_dot;
    }
    return {sum, std::log(sum) - dot / (sum * temp)};
}

// The same for a row of probabilities: e[k] = x[k]. Returns its sum.
template <class T>
DINOFAST_INLINE double probability_row_of(const T* x, int64_t n, float* e, double* block_sums) {
    double sum = 0;
    for (int64_t k0 = 0; k0 < n; k0 += kBlock) {
        const int64_t stop = std::min(n, k0 + kBlock);
        float block_sum = 0;
#pragma omp simd reduction(+ : block_sum)
        for (int64_t k = k0; k < stop; ++k) block_sum += e[k] = widen(x[k]);
        *block_sums++ = block_sum;
        sum += block_sum;
    }
    return sum;
}

struct Target {  // Q = weight q
    const float* q;
    const double* block_sums;  // of q
    double weight, mass;
};

// Of the gradient.
template <class T> struct Wide { using type = float; };
template <> struct Wide<BF16> { using type = BF16; };
template <class T> using Grad = typename Wide<T>::type;

// The bracket of one row; its gradient where wanted, past the cache if `streamed`. e and blocks are scratch.
template <class T>
DINOFAST_INLINE double student_row_of(const T* x, const Target& target, int64_t n, double temp, float* e, Block* blocks,
                                      Grad<T>* grad, double grad_scale, bool streamed) {
    const float* q = target.q;
    const float factor = float(kLog2E / temp);
    const int64_t n_blocks = (n + kBlock - 1) / kBlock;
    float top = -std::numeric_limits<float>::infinity();
    for (int64_t i = 0; i < n_blocks; ++i) {
        const int64_t begin = i * kBlock, stop = std::min(n, begin + kBlock);
        int32_t highest = std::numeric_limits<int32_t>::min();
#pragma omp simd reduction(max : highest)
        for (int64_t k = begin; k < stop; ++k) highest = std::max(highest, ordered(widen(x[k])));
        const float block_top = from_ordered(highest);
        fetch(x + stop, x + std::min(n, stop + kBlock));
        float sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
        for (int64_t k = begin; k < stop; ++k) {
            float d = widen(x[k]) - block_top;
            float weight = exp2_scaled(d, factor);
            e[k] = weight;
            sum += weight;
            dot += q[k] * d;
        }
        blocks[i] = {sum, dot, block_top};
        top = std::max(top, block_top);
    }
    double sum = 0, dot = 0;
    for (int64_t i = 0; i < n_blocks; ++i) {
        const double below = double(blocks[i].top) - top;
        dot += blocks[i].dot + target.block_sums[i] * below;
        sum += blocks[i].sum * std::exp2(below * factor);
    }
    if (grad) {
        alignas(64) Grad<T> ready[kBlock];
        const float pull = float(grad_scale * target.weight);
        for (int64_t i = 0; i < n_blocks; ++i) {
            const int64_t begin = i * kBlock, size = std::min(n - begin, kBlock);
            const float own = float(grad_scale * target.mass / sum * std::exp2((double(blocks[i].top) - top) * factor));
            Grad<T>* out = streamed ? ready : grad + begin;
#pragma omp simd
            for (int64_t k = 0; k < size; ++k) out[k] = narrow<Grad<T>>(own * e[begin + k] - pull * q[begin + k]);
            if (streamed) stream(grad + begin, ready, size);
        }
        if (streamed) stream_end();
    }
    return target.mass * std::log(sum) - target.weight * dot / temp;
}

// sums[k] += x[k]
template <class T>
DINOFAST_INLINE void add_row_of(const T* x, int64_t n, double* sums) {
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) sums[k] += widen(x[k]);
}

// target_clones does not take templates.
#define DINOFAST_ROWS(T)                                                                                                      \
    DINOFAST_CLONES TeacherRow teacher_row(const T* x, const float* center, int64_t n, double temp, float* e, double* sums) { \
        return teacher_row_of(x, center, n, temp, e, sums);                                                                   \
    }                                                                                                                         \
    DINOFAST_CLONES double probability_row(const T* x, int64_t n, float* e, double* sums) {                                   \
        return probability_row_of(x, n, e, sums);                                                                             \
    }                                                                                                                         \
    DINOFAST_CLONES double student_row(const T* x, const Target& target, int64_t n, double temp, float* e, Block* blocks,     \
                                       Grad<T>* grad, double grad_scale, bool streamed) {                                     \
        return student_row_of(x, target, n, temp, e, blocks, grad, grad_scale, streamed);                                     \
    }                                                                                                                         \
    DINOFAST_CLONES void add_row(const T* x, int64_t n, double* sums) { add_row_of(x, n, sums); }
DINOFAST_ROWS(float)
DINOFAST_ROWS(BF16)
DINOFAST_ROWS(FP16)
#undef DINOFAST_ROWS

// out = a weight_a + b weight_b; out may be a
DINOFAST_CLONES void mix_rows(float* out, const float* a, float weight_a, const float* b, float weight_b, int64_t n) {
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) out[k] = a[k] * weight_a + b[k] * weight_b;
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

// The teacher's rows of one image, and what is made of them for each crop.
class Targets {
  public:
    Targets(int64_t teachers, int64_t n, bool diagonal)
        : n_(n), n_blocks_((n + kBlock - 1) / kBlock), diagonal_(diagonal), rows_(teachers),
          memory_(new float[(teachers + (teachers > 2 && !diagonal)) * n]),
          sums_(new double[(teachers + (teachers > 2 && !diagonal)) * n_blocks_]) {}

    // Takes in the rows of image b; returns the sum of their entropies.
    double read(const Logits& teacher, int64_t b, const float* center, double temp) {
        double entropy = 0;
        for (size_t t = 0; t < rows_.size(); ++t) {
            if (center) {
                const auto row = with_row(teacher, t, b, [&](auto* x) { return teacher_row(x, center, n_, temp, q(t), sums(t)); });
                rows_[t] = {q(t), sums(t), 1 / row.sum, 1};
                entropy += row.entropy;
            } else {
                rows_[t] = {q(t), sums(t), 1, with_row(teacher, t, b, [&](auto* x) {
                    return probability_row(x, n_, q(t), sums(t));
                })};
            }
        }
        all_ = {};
        return entropy;
    }

    // Of crop v, without memory if no row is for it. To be asked for in rising order: the sum of all rows, which is the target
    // of all crops from some one on, is made where row 0 was.
    Target of(size_t v) {
        const bool all = diagonal_ || v >= rows_.size();
        if (all && all_.q) return all_;
        Target target{};
        for (size_t t = 0; t < rows_.size(); ++t)
            if (all || t != v) target = target.q ? sum(target, rows_[t], all ? 0 : rows_.size()) : rows_[t];
        if (all) all_ = target;
        return target;
    }

  private:
    Target sum(const Target& a, const Target& b, size_t where) {
        mix_rows(q(where), a.q, float(a.weight), b.q, float(b.weight), n_);
        for (int64_t i = 0; i < n_blocks_; ++i) sums(where)[i] = a.block_sums[i] * a.weight + b.block_sums[i] * b.weight;
        return {q(where), sums(where), 1, a.mass + b.mass};
    }

    float* q(size_t t) { return memory_.get() + t * n_; }
    double* sums(size_t t) { return sums_.get() + t * n_blocks_; }

    int64_t n_, n_blocks_;
    bool diagonal_;
    std::vector<Target> rows_;
    std::unique_ptr<float[]> memory_;  // T rows of K, and one more for a sum of several while all are still needed
    std::unique_ptr<double[]> sums_;   // of their blocks
    Target all_{};
};

struct Scratch {  // of a thread; not cleared
    Targets targets;
    std::unique_ptr<float[]> e;
    std::unique_ptr<Block[]> blocks;

    Scratch(int64_t teachers, int64_t n, bool diagonal)
        : targets(teachers, n, diagonal), e(new float[n]), blocks(new Block[(n + kBlock - 1) / kBlock]) {}
};

}  // namespace

LossSums dino_loss(Logits student, Logits teacher, const float* center, LossSizes sizes, const LossOptions& options,
                   float* teacher_sum, void* grad, int n_threads) {
    const int64_t V = sizes.crops, T = sizes.teachers, B = sizes.images, K = sizes.prototypes;
    if ((V + T) * B * K < 1 << 15) n_threads = 1;  // starting threads takes longer
    const bool streamed = options.streamed && K % 8 == 0;

    std::vector<LossSums> image(B);
    std::vector<Scratch> scratch;  // here, where running out of memory can still be told
    scratch.reserve(n_threads);
    for (int i = 0; i < n_threads; ++i) scratch.emplace_back(T, K, options.diagonal);
#pragma omp parallel num_threads(n_threads)
    {
        if (teacher_sum) {
#pragma omp for schedule(static) nowait
            for (int64_t k0 = 0; k0 < K; k0 += kBlock) {  // first: the loop below finds the teacher in L3
                const int64_t size = std::min(K - k0, kBlock);
                double sums[kBlock] = {};
                for (int64_t row = 0; row < T * B; ++row)
                    with_row(teacher, row / B, row % B, [&](auto* x) { add_row(x + k0, size, sums); });
                std::copy(sums, sums + size, teacher_sum + k0);
            }
        }
#ifdef _OPENMP
        auto& [targets, e, blocks] = scratch[omp_get_thread_num()];
#else
        auto& [targets, e, blocks] = scratch[0];
#endif
#pragma omp for schedule(dynamic) nowait  // one barrier in all: each costs a time slice where cores are shared
        for (int64_t b = 0; b < B; ++b) {
            const double entropy = targets.read(teacher, b, center, options.teacher_temp);
            double loss = 0;
            for (int64_t v = 0; v < V; ++v) {
                const Target target = targets.of(v);
                loss += with_row(student, v, b, [&, &e = e, &blocks = blocks](auto* x) {
                    using Number = Grad<std::remove_const_t<std::remove_pointer_t<decltype(x)>>>;
                    Number* out = grad ? static_cast<Number*>(grad) + (v * B + b) * K : nullptr;
                    if (target.q)
                        return student_row(x, target, K, options.student_temp, e.get(), blocks.get(), out, options.grad_scale,
                                           streamed);
                    if (out) std::fill(out, out + K, Number{});
                    return 0.0;
                });
            }
            image[b] = {loss, entropy};
        }
    }
    LossSums total{0, 0};
    for (const LossSums& one : image) total.loss += one.loss, total.entropy += one.entropy;
    return {total.loss / options.terms, total.entropy / (double(T) * double(B))};
}

}  // namespace dinofast
