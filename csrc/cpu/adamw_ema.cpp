// adamw_ema (arXiv 1711.05101, then the teacher's average of arXiv 2104.14294), and its two parts that are of use alone.
//
//     g = coefficient grad;  step += 1
//     m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
//     p = p - lr weight_decay p - lr / (1 - beta1^step) m / (sqrt(v / (1 - beta2^step)) + eps)
//     teacher = momentum teacher + (1 - momentum) p
//     param_copy, teacher_copy = p, teacher, rounded: only where p and teacher are the masters of 16-bit tensors
//
// Bytes an element: p, m, v, teacher read and written, grad read: 36 in fp32. The norms before it read grad: 4 more.
// A copy adds the bytes it has: a chunk is rounded while it is still in the cache.
// All tensors of a call are cut into chunks that threads take in turn, so that one huge tensor and many tiny ones balance alike.
// A norm is the sum of its chunks' fp64 sums in their order: the number of threads changes no bit.

#include "adamw_ema.h"

#include <algorithm>
#include <cmath>

namespace dinofast {
namespace {

constexpr int64_t kChunk = 1 << 15;  // elements

struct Mix { float keep, share; };  // of an average: keep old + share new

Mix mix(double keep) { return {float(keep), float(1 - keep)}; }

// From the nearer end, as torch.lerp: exact where nothing changes, and where all does.
DINOFAST_INLINE float average(float old, float now, Mix mix) {
    const float gap = now - old;
    return mix.share < 0.5f ? old + mix.share * gap : now - mix.keep * gap;
}

struct Factors {
    float coefficient, inv_root, eps, rate, decay;
    Mix first, second, teacher;
};

template <bool kTeacher, class T>
DINOFAST_INLINE void adamw_chunk_of(float* p, const T* grad, float* m, float* v, float* teacher, int64_t n, const Factors& f) {
    const Factors c = f;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const float g = c.coefficient * widen(grad[i]);
        const float mean = average(m[i], g, c.first);
        const float square = c.second.keep * v[i] + c.second.share * g * g;  // a difference would make NaN of an infinity
        const float moved = p[i] - c.decay * p[i] - c.rate * mean / (std::sqrt(square) * c.inv_root + c.eps);
        m[i] = mean, v[i] = square, p[i] = moved;
        if (kTeacher) teacher[i] = average(teacher[i], moved, c.teacher);
    }
}

template <class T>
DINOFAST_INLINE void ema_chunk_of(float* teacher, const T* student, int64_t n, Mix mix) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) teacher[i] = average(teacher[i], widen(student[i]), mix);
}

template <class T>
DINOFAST_INLINE void round_chunk_of(const float* x, T* copy, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) copy[i] = narrow<T>(x[i]);
}

template <class T>
DINOFAST_INLINE double square_sum_of(const T* x, int64_t n) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += double(widen(x[i])) * double(widen(x[i]));
    return sum;
}

// target_clones does not take templates.
#define DINOFAST_CHUNKS(T)                                                                                                    \
    DINOFAST_CLONES void adamw_chunk(float* p, const T* grad, float* m, float* v, int64_t n, const Factors& f) {              \
        adamw_chunk_of<false>(p, grad, m, v, nullptr, n, f);                                                                  \
    }                                                                                                                         \
    DINOFAST_CLONES void adamw_ema_chunk(float* p, const T* grad, float* m, float* v, float* teacher, int64_t n,              \
                                         const Factors& f) {                                                                  \
        adamw_chunk_of<true>(p, grad, m, v, teacher, n, f);                                                                   \
    }                                                                                                                         \
    DINOFAST_CLONES void ema_chunk(float* teacher, const T* student, int64_t n, Mix mix) {                                    \
        ema_chunk_of(teacher, student, n, mix);                                                                               \
    }                                                                                                                         \
    DINOFAST_CLONES double square_sum(const T* x, int64_t n) { return square_sum_of(x, n); }                                  \
    DINOFAST_CLONES void round_chunk(const float* x, T* copy, int64_t n) { round_chunk_of(x, copy, n); }
DINOFAST_CHUNKS(float)
DINOFAST_CHUNKS(BF16)
DINOFAST_CHUNKS(FP16)
#undef DINOFAST_CHUNKS

// Calls f with a number of that type.
template <class F>
auto with_type(Dtype dtype, F f) {
    switch (dtype) {
        case Dtype::bf16: return f(BF16{});
        case Dtype::f16: return f(FP16{});
        default: return f(float{});
    }
}

// Calls f with a pointer to number `at` in its own type.
template <class F>
auto with_numbers(const Numbers& x, int64_t at, F f) {
    return with_type(x.dtype, [&](auto type) { return f(static_cast<const decltype(type)*>(x.data) + at); });
}

struct Chunk { size_t tensor; int64_t begin, size; };

void round_into(const Copy& copy, const float* x, const Chunk& chunk) {
    if (copy.data == nullptr) return;
    with_type(copy.dtype, [&](auto type) {
        round_chunk(x + chunk.begin, static_cast<decltype(type)*>(copy.data) + chunk.begin, chunk.size);
    });
}

template <class T>
std::vector<Chunk> chunks_of(const std::vector<T>& tensors) {
    std::vector<Chunk> chunks;
    for (size_t i = 0; i < tensors.size(); ++i)
        for (int64_t begin = 0; begin < tensors[i].size; begin += kChunk)
            chunks.push_back({i, begin, std::min(kChunk, tensors[i].size - begin)});
    return chunks;
}

// work(number of the chunk, chunk) for all, over the threads.
template <class F>
void for_each_chunk(const std::vector<Chunk>& chunks, int n_threads, F work) {
    int64_t total = 0;
    for (const Chunk& chunk : chunks) total += chunk.size;
    if (total < 1 << 15) n_threads = 1;  // starting threads takes longer
#pragma omp parallel for schedule(dynamic) num_threads(n_threads)
    for (size_t i = 0; i < chunks.size(); ++i) work(i, chunks[i]);
}

}  // namespace

void adamw_ema(const std::vector<AdamwTensor>& tensors, const AdamwOptions& o, int n_threads) {
    std::vector<Factors> factors;
    for (const AdamwTensor& t : tensors) {
        const double step = double(*t.step += 1.0f);
        factors.push_back({t.coefficient, float(1 / std::sqrt(1 - std::pow(o.beta2, step))), float(o.eps),
                           float(o.lr / (1 - std::pow(o.beta1, step))), float(o.lr * o.weight_decay),
                           mix(o.beta1), mix(o.beta2), mix(o.momentum)});
    }
    for_each_chunk(chunks_of(tensors), n_threads, [&](size_t, const Chunk& chunk) {
        const AdamwTensor& t = tensors[chunk.tensor];
        float *p = t.param + chunk.begin, *m = t.exp_avg + chunk.begin, *v = t.exp_avg_sq + chunk.begin;
        with_numbers(t.grad, chunk.begin, [&](auto* grad) {
            if (t.teacher)
                adamw_ema_chunk(p, grad, m, v, t.teacher + chunk.begin, chunk.size, factors[chunk.tensor]);
            else
                adamw_chunk(p, grad, m, v, chunk.size, factors[chunk.tensor]);
        });
        round_into(t.param_copy, t.param, chunk);
        round_into(t.teacher_copy, t.teacher, chunk);
    });
}

void ema(const std::vector<EmaTensor>& tensors, double momentum, int n_threads) {
    for_each_chunk(chunks_of(tensors), n_threads, [&](size_t, const Chunk& chunk) {
        const EmaTensor& t = tensors[chunk.tensor];
        with_numbers(t.student, chunk.begin,
                     [&](auto* student) { ema_chunk(t.teacher + chunk.begin, student, chunk.size, mix(momentum)); });
        round_into(t.copy, t.teacher, chunk);
    });
}

void grad_norms(const std::vector<GradTensor>& tensors, float* norms, int n_threads) {
    const std::vector<Chunk> chunks = chunks_of(tensors);
    std::vector<double> chunk_sums(chunks.size()), sums(tensors.size());
    for_each_chunk(chunks, n_threads, [&](size_t i, const Chunk& chunk) {
        chunk_sums[i] = with_numbers(tensors[chunk.tensor].grad, chunk.begin, [&](auto* x) { return square_sum(x, chunk.size); });
    });
    for (size_t i = 0; i < chunks.size(); ++i) sums[chunks[i].tensor] += chunk_sums[i];
    for (size_t i = 0; i < tensors.size(); ++i) norms[i] = float(std::sqrt(sums[i]));
}

}  // namespace dinofast
