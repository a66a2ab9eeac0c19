// What the CPU kernels share: one source for three x86 instruction sets, the three float formats, 2^x, large pages.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

// The loader picks AVX-512, AVX2 or SSE2 code when the module is loaded. Other compilers and machines get their baseline.
#if defined(__x86_64__) && defined(__linux__) && ((!defined(__clang__) && __GNUC__ >= 12) || __clang_major__ >= 19)
#define DINOFAST_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DINOFAST_CLONES
#endif
#define DINOFAST_INLINE inline __attribute__((always_inline))

namespace dinofast {

enum class Dtype { f32, bf16, f16 };

struct BF16 { uint16_t bits; };
struct FP16 { uint16_t bits; };

template <class To, class From>
DINOFAST_INLINE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "sizes differ");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

DINOFAST_INLINE float widen(float x) { return x; }

DINOFAST_INLINE float widen(BF16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

DINOFAST_INLINE float widen(FP16 x) {  // in integers: compilers do not vectorize _Float16 below AVX512-FP16
    uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
    uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);  // rebias the exponent; exact for subnormals
    return bit_cast<float>((magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite) | uint32_t(x.bits & 0x8000) << 16);
}

// To the nearest, ties to even; NaN stays NaN.
template <class T> T narrow(float x);

template <> DINOFAST_INLINE float narrow<float>(float x) { return x; }

template <> DINOFAST_INLINE BF16 narrow<BF16>(float x) {
    uint32_t u = bit_cast<uint32_t>(x);
    return {uint16_t(x != x ? 0x7fc0u : (u + 0x7fff + (u >> 16 & 1)) >> 16)};
}

template <> DINOFAST_INLINE FP16 narrow<FP16>(float x) {
    uint32_t u = bit_cast<uint32_t>(x), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
    uint32_t normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;  // 0.5 has the spacing 2^-24
    uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? 0x7c00u : half;
    return {uint16_t(sign | (magnitude > 0x7f800000u ? 0x7e00u : half))};
}

// Floats as integers of the same order: a maximum of integers is vectorized by every compiler, one of floats is not (NaN).
DINOFAST_INLINE int32_t ordered(float x) {
    int32_t i = bit_cast<int32_t>(x);
    return i ^ (i >> 31 & 0x7fffffff);
}

DINOFAST_INLINE float from_ordered(int32_t i) { return bit_cast<float>(i ^ (i >> 31 & 0x7fffffff)); }

// 2^(d factor) for d factor <= 0, the product unrounded, within 1.1 units in the last place (given FMA; 1e-6 on x86 before
// 2013). Exactly 0 below 2^-100, which keeps products with a softmax's normalizer out of the slow subnormal range. NaN stays.
DINOFAST_INLINE float exp2_scaled(float d, float factor) {
    constexpr float round = 0x1.8p23f;  // adding it rounds to an integer, left in the low bits
    float t = d * factor + round, n = t - round;
    float f = d * factor - n;  // in [-1/2, 1/2]
    float p = 1.5345812e-4f;   // 2^f by a minimax polynomial, error 2e-9
    p = p * f + 1.3399931e-3f;
    p = p * f + 9.618489e-3f;
    p = p * f + 5.5503286e-2f;
    p = p * f + 2.4022646e-1f;
    p = p * f + 6.931472e-1f;
    p = p * f + 1.0f;
    float scale = bit_cast<float>((bit_cast<uint32_t>(t) << 23) + 0x3f800000u);  // 2^n
    return t < round - 100.0f ? 0.0f : p * scale;
}

constexpr size_t kLarge = size_t(1) << 25;  // bytes: a result that no cache keeps, and for which malloc asks the system each time

// Asks for the memory from `begin` to `end` before it is needed.
template <class T>
DINOFAST_INLINE void fetch(const T* begin, const T* end) {
    for (; begin < end; begin += 64 / sizeof(T)) __builtin_prefetch(begin, 0, 2);
}

// Copies n numbers past the cache, which then need not be read before they are written; n and both places in multiples of 16 bytes.
template <class T>
DINOFAST_INLINE void stream(T* to, const T* from, int64_t n) {
#if defined(__SSE2__)
    const auto* source = reinterpret_cast<const __m128i*>(from);
    auto* target = reinterpret_cast<__m128i*>(to);
    for (int64_t i = 0; i < n * int64_t(sizeof(T)) / 16; ++i) _mm_stream_si128(target + i, source[i]);
#else
    std::memcpy(to, from, size_t(n) * sizeof(T));
#endif
}

// After the last of them, before another thread looks.
DINOFAST_INLINE void stream_end() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

// Asks for 2 MiB pages in memory not yet touched. A fresh 84 MB tensor costs 18 ms of page faults on an EPYC (2 cores,
// 2026-11-23), 3 ms with large pages; the kernel itself takes 9 ms.
inline void huge_pages(void* data, size_t bytes) {
#if defined(__linux__)
    constexpr uintptr_t page = 1 << 21;
    const uintptr_t first = reinterpret_cast<uintptr_t>(data);
    const uintptr_t begin = (first + page - 1) & -page, end = (first + bytes) & -page;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

}  // namespace dinofast
