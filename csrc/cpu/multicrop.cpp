// The augmentation of DINO (arXiv 2104.14294, section 3.2) on one decoded image: every crop of a plan, bit for bit as PIL makes
// it (dinofast/data/backend_pil.py). Each step rounds to 8 bits where PIL does, by the arithmetic that PIL uses, so a crop does
// not tell which of the two has made it. No product is contracted with a sum here: PIL's are not.
//
//     box, bicubic with antialiasing, columns and then rows -> mirror -> brightness, contrast, saturation and hue as ordered
//     -> gray -> three box blurs in each direction -> solarize
//
// The image is turned once into planes of rows and of columns: a resize along one is a sum of whole ones of the other. Every crop
// is worked on in planes (3, size, size), which stay in L2. Vectors always run along contiguous numbers.

#include "multicrop.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "simd.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=off")
#elif defined(__clang__)
#pragma clang fp contract(off)
#endif

namespace dinofast {
namespace {

using Plane = std::vector<uint8_t>;

// ---------------------------------------------------------------------------------------------------------------- box and size

constexpr int kBits = 32 - 8 - 2;  // of a weight's fraction

// Weights that make one number of `size` ones out of some of n.
struct Resampling {
    std::vector<int32_t> weights;  // (size, taps)
    std::vector<int32_t> first, count;
    int64_t taps;
    bool same;  // as many as there were: PIL leaves them alone
};

double cubic(double x) {
    constexpr double a = -0.5;
    x = std::fabs(x);
    if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
    if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
    return 0;
}

Resampling resampling(int64_t n, int64_t size) {
    const double scale = double(n) / double(size), stretch = std::max(scale, 1.0), support = 2 * stretch;
    Resampling r;
    r.same = n == size;
    r.taps = int64_t(std::ceil(support)) * 2 + 1;
    r.weights.assign(size * r.taps, 0);
    r.first.resize(size), r.count.resize(size);
    std::vector<double> w(r.taps);
    for (int64_t i = 0; i < size; ++i) {
        const double center = (i + 0.5) * scale, inverse = 1 / stretch;
        const int64_t first = std::max<int64_t>(0, int64_t(center - support + 0.5));
        const int64_t count = std::min<int64_t>(n, int64_t(center + support + 0.5)) - first;
        double sum = 0;
        for (int64_t k = 0; k < count; ++k) sum += w[k] = cubic((k + first - center + 0.5) * inverse);
        for (int64_t k = 0; k < count; ++k) {
            const double weight = sum != 0 ? w[k] / sum : w[k];
            r.weights[i * r.taps + k] = int32_t((weight < 0 ? -0.5 : 0.5) + weight * (1 << kBits));
        }
        r.first[i] = int32_t(first), r.count[i] = int32_t(count);
    }
    return r;
}

DINOFAST_INLINE uint8_t rounded(int32_t sum) {
    const int32_t level = sum >> kBits;
    return uint8_t(level < 0 ? 0 : level > 255 ? 255 : level);
}

// sum of weights[k] rows[k stride + j] over TAPS rows k.
template <int TAPS>
DINOFAST_INLINE int32_t taps(const uint8_t* rows, int64_t stride, const int32_t* weights, int64_t j) {
    int32_t sum = 0;
#pragma GCC unroll 8
    for (int k = 0; k < TAPS; ++k) sum += weights[k] * int32_t(rows[k * stride + j]);
    return sum;
}

// out[j] = the sum over TAPS rows, and what was summed up before, rounded and clipped, for n numbers j.
template <int TAPS>
DINOFAST_INLINE void last_taps(const uint8_t* rows, int64_t stride, const int32_t* weights, int64_t n, const int32_t* before,
                               uint8_t* out) {
    constexpr int32_t half = 1 << (kBits - 1);
    int32_t w[TAPS];
    std::copy(weights, weights + TAPS, w);
    if (before) {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) out[j] = rounded(before[j] + taps<TAPS>(rows, stride, w, j));
    } else {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) out[j] = rounded(half + taps<TAPS>(rows, stride, w, j));
    }
}

// out[j] = sum of weights[k] rows[k stride + j] over `count` rows k, rounded and clipped, for n numbers j; sums (n,) is scratch.
DINOFAST_CLONES void weighted_sum(const uint8_t* rows, int64_t stride, const int32_t* weights, int64_t count, int64_t n,
                                  int32_t* sums, uint8_t* out) {
    const int32_t* before = nullptr;
    for (; count > 8; count -= 8, rows += 8 * stride, weights += 8) {
        if (!before) std::fill(sums, sums + n, 1 << (kBits - 1));
        before = sums;
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) sums[j] += taps<8>(rows, stride, weights, j);
    }
    switch (count) {
        case 1: last_taps<1>(rows, stride, weights, n, before, out); break;
        case 2: last_taps<2>(rows, stride, weights, n, before, out); break;
        case 3: last_taps<3>(rows, stride, weights, n, before, out); break;
        case 4: last_taps<4>(rows, stride, weights, n, before, out); break;
        case 5: last_taps<5>(rows, stride, weights, n, before, out); break;
        case 6: last_taps<6>(rows, stride, weights, n, before, out); break;
        case 7: last_taps<7>(rows, stride, weights, n, before, out); break;
        case 8: last_taps<8>(rows, stride, weights, n, before, out);
    }
}

// to[x, y] = from[y, x] for a square of 16.
DINOFAST_INLINE void transpose_square(const uint8_t* from, int64_t from_stride, uint8_t* to, int64_t to_stride) {
#if defined(__SSE2__)
    __m128i a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * from_stride));
    for (int step = 0; step < 4; ++step) {  // rows 0 and 8 are dealt out like cards, 1 and 9, ...: four times is the transpose
        for (int i = 0; i < 8; ++i) b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]), b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
        std::memcpy(a, b, sizeof a);
    }
    for (int i = 0; i < 16; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * to_stride), a[i]);
#else
    for (int x = 0; x < 16; ++x)
        for (int y = 0; y < 16; ++y) to[x * to_stride + y] = from[y * from_stride + x];
#endif
}

// to[x, y] = from[y, x] for h rows of w.
void transpose(const uint8_t* from, int64_t from_stride, int64_t h, int64_t w, uint8_t* to, int64_t to_stride) {
    constexpr int64_t side = 16;
    for (int64_t y0 = 0; y0 < h; y0 += side)
        for (int64_t x0 = 0; x0 < w; x0 += side)
            if (y0 + side <= h && x0 + side <= w)
                transpose_square(from + y0 * from_stride + x0, from_stride, to + x0 * to_stride + y0, to_stride);
            else
                for (int64_t x = x0; x < std::min(w, x0 + side); ++x)
                    for (int64_t y = y0; y < std::min(h, y0 + side); ++y) to[x * to_stride + y] = from[y * from_stride + x];
}

// (n, bytes), of which the first three are the colors, to planes (3, n).
template <int BYTES>
DINOFAST_INLINE void split(const uint8_t* pixels, int64_t n, uint8_t* planes) {
    uint8_t *r = planes, *g = r + n, *b = g + n;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) r[i] = pixels[BYTES * i], g[i] = pixels[BYTES * i + 1], b[i] = pixels[BYTES * i + 2];
}

DINOFAST_CLONES void split(const uint8_t* pixels, int64_t bytes, int64_t n, uint8_t* planes) {
    if (bytes == 4) split<4>(pixels, n, planes);
    else split<3>(pixels, n, planes);
}

struct Scratch {
    Plane first, turned, second;
};

constexpr int64_t kVector = 64;  // numbers that are worked on together: a rest of fewer costs as much as many vectors

int64_t whole_vectors(int64_t n) { return (n + kVector - 1) / kVector * kVector; }

// Line i of `size` is the weighted sum of lines of `length` numbers, each `stride` after the one before; out (size, out_stride).
// Where out has room, what lies behind a line is worked on too: of `lines`, kVector numbers more than there are must be readable.
void resize_lines(const uint8_t* lines, int64_t stride, int64_t length, const Resampling& r, bool mirrored, uint8_t* out,
                  int64_t out_stride) {
    const int64_t size = int64_t(r.first.size());
    if (out_stride >= whole_vectors(length)) length = whole_vectors(length);
    std::vector<int32_t> sums(length);
    for (int64_t i = 0; i < size; ++i) {
        uint8_t* line = out + (mirrored ? size - 1 - i : i) * out_stride;
        if (r.same)
            std::copy(lines + i * stride, lines + i * stride + length, line);
        else
            weighted_sum(lines + r.first[i] * stride, stride, &r.weights[i * r.taps], r.count[i], length, sums.data(),
                         line);
    }
}

// What PIL does first matters, as it rounds in between: since version 13 rows, where that saves most.
bool rows_first(int64_t h, int64_t w, int64_t size) { return h - size > 2 * std::max<int64_t>(0, w - size); }

// The box of one channel, (size, size), mirrored or not. `rows` (height, width) if rows come first, else `columns` (width, height).
void cut(const uint8_t* rows, const uint8_t* columns, int64_t height, int64_t width, const View& view, const Resampling& across,
         const Resampling& down, uint8_t* out, Scratch& scratch) {
    const int64_t y = view.box[0], x = view.box[1], h = view.box[2], w = view.box[3], size = view.size;
    const bool by_rows = rows_first(h, w, size);
    const int64_t length = by_rows ? w : h, first_stride = whole_vectors(length), room = whole_vectors(size);
    scratch.first.resize(size * first_stride), scratch.turned.resize(length * size + kVector);
    if (by_rows) {
        scratch.second.resize(size * room);
        resize_lines(rows + y * width + x, width, w, down, false, scratch.first.data(), first_stride);
        transpose(scratch.first.data(), first_stride, size, w, scratch.turned.data(), size);
        resize_lines(scratch.turned.data(), size, size, across, view.flip, scratch.second.data(), room);
        transpose(scratch.second.data(), room, size, size, out, size);
    } else {
        resize_lines(columns + x * height + y, height, h, across, view.flip, scratch.first.data(), first_stride);
        transpose(scratch.first.data(), first_stride, size, h, scratch.turned.data(), size);
        resize_lines(scratch.turned.data(), size, size, down, false, out, size);
    }
}

// ------------------------------------------------------------------------------------------------------------------- color

DINOFAST_INLINE uint8_t luma(int32_t r, int32_t g, int32_t b) { return uint8_t((r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16); }

// base + factor (x - base), cut off below the point; PIL's `blend`.
DINOFAST_INLINE uint8_t blend(int32_t base, int32_t x, float factor) {
    const float mixed = float(base) + factor * float(x - base);
    return uint8_t(int32_t(std::min(std::max(mixed, 0.0f), 255.0f)));
}

DINOFAST_CLONES void brightness(uint8_t* x, int64_t n, float factor) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) x[i] = blend(0, x[i], factor);
}

DINOFAST_CLONES void contrast(uint8_t* r, uint8_t* g, uint8_t* b, int64_t n, float factor) {
    int64_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += luma(r[i], g[i], b[i]);
    const int32_t mean = int32_t(double(sum) / double(n) + 0.5);
    for (uint8_t* x : {r, g, b}) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) x[i] = blend(mean, x[i], factor);
    }
}

DINOFAST_CLONES void saturation(uint8_t* r, uint8_t* g, uint8_t* b, int64_t n, float factor) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const int32_t gray = luma(r[i], g[i], b[i]);
        r[i] = blend(gray, r[i], factor), g[i] = blend(gray, g[i], factor), b[i] = blend(gray, b[i], factor);
    }
}

DINOFAST_CLONES void gray(uint8_t* r, uint8_t* g, uint8_t* b, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) r[i] = g[i] = b[i] = luma(r[i], g[i], b[i]);
}

// Through PIL's 8-bit HSV, in which the hue is turned by `step` of 256. PIL computes partly in double; floats and integers stand
// where they give the same for every color and every step (tests/data/test_native.py tries all colors).
DINOFAST_CLONES void hue(uint8_t* r, uint8_t* g, uint8_t* b, int64_t n, int32_t step) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const int32_t R = r[i], G = g[i], B = b[i];
        const int32_t more = G > B ? G : B, less = G < B ? G : B, most = R > more ? R : more, least = R < less ? R : less;
        const int32_t range = most - least, beyond = most - (R + G + B - most - least);  // the middle one
        int32_t corner = G == least ? 5 : 3, sign = G == least ? -1 : 1;  // the hue is so many sixths, and a share of one more
        corner = G == most ? (B == least ? 1 : 3) : corner, sign = G == most ? (B == least ? 1 : -1) : sign;
        corner = R == most ? (B == least ? 1 : -1) : corner, sign = R == most ? (B == least ? -1 : 1) : sign;
        const float sixths = float(corner) + float(sign * beyond) / float(range > 1 ? range : 1), part = sixths / 6.0f;
        const float turn = sixths < 0 ? part + 1.0f : part;
        const int32_t above = int32_t(turn * 255.0f);  // the product may have been rounded up; these differences are exact
        const int32_t level = above - (turn * 256.0f - float(above) < turn ? 1 : 0);
        const int32_t h = (level + step) & 255, sixth = (h * 6 * 257 + 257) >> 16, rest = h * 6 - sixth * 255;  // of h * 6 / 255
        const int32_t s = int32_t(float(range * 255) / float(most > 1 ? most : 1));
        const int32_t p255 = most * (255 - s) + 128, p = (p255 + (p255 >> 8)) >> 8;
        const int32_t q = int32_t(float(most * (65025 - s * rest)) * (1 / 65025.0f) + 0.5f);
        const int32_t t = int32_t(float(most * (65025 - s * (255 - rest))) * (1 / 65025.0f) + 0.5f);
        const int32_t k = sixth == 6 ? 0 : sixth;
        const int32_t k0 = -(k == 0), k1 = -(k == 1), k2 = -(k == 2), k3 = -(k == 3), k4 = -(k == 4), k5 = -(k == 5);  // all bits
        r[i] = uint8_t((most & (k0 | k5)) | (q & k1) | (p & (k2 | k3)) | (t & k4));
        g[i] = uint8_t((most & (k1 | k2)) | (q & k3) | (p & (k4 | k5)) | (t & k0));
        b[i] = uint8_t((most & (k3 | k4)) | (q & k5) | (p & (k0 | k1)) | (t & k2));
    }
}

// -------------------------------------------------------------------------------------------------------------- blur, solarize

struct BoxBlur {
    int64_t radius;     // whole pixels on either side
    uint32_t near, far;  // weight of those, and of the two beyond them; 24 bits
};

BoxBlur box_blur(double sigma) {  // of three passes that together come near a Gaussian (Gwosdek et al., SSVM 2011)
    const float passes = 3, radius = float(sigma);
    const float sigma2 = radius * radius / passes;
    const float length = float(std::sqrt(12.0 * sigma2 + 1.0));
    const float whole = float(std::floor((length - 1.0) / 2.0));
    float rest = (2 * whole + 1) * (whole * (whole + 1) - 3 * sigma2);
    rest /= 6 * (sigma2 - (whole + 1) * (whole + 1));
    const float box = whole + rest;
    const int64_t r = int64_t(box);
    const uint32_t near = uint32_t(float(uint32_t(1) << 24) / (box * 2 + 1));
    return {r, near, ((uint32_t(1) << 24) - uint32_t(r * 2 + 1) * near) / 2};
}

// out[i] = sum over the pixels x[i + k step] of the box, each by its weight, for n numbers i. RADIUS -1 takes any.
template <int RADIUS>
DINOFAST_INLINE void box_pass(const uint8_t* x, int64_t n, int64_t step, const BoxBlur& blur, uint8_t* out) {
    const int64_t radius = RADIUS < 0 ? blur.radius : RADIUS, reach = (radius + 1) * step;
    const uint32_t near = blur.near, far = blur.far;
    constexpr int64_t block = 512;
    uint32_t sums[block];
    for (int64_t i0 = 0; i0 < n; i0 += block, x += block, out += block) {
        const int64_t m = std::min(block, n - i0);
        if (RADIUS < 0) {
            std::fill(sums, sums + m, 0);
            for (int64_t k = -radius; k <= radius; ++k)
#pragma omp simd
                for (int64_t i = 0; i < m; ++i) sums[i] += x[i + k * step];
        }
#pragma omp simd
        for (int64_t i = 0; i < m; ++i) {
            uint32_t sum = RADIUS < 0 ? sums[i] : x[i];
            if (RADIUS == 1) sum += uint32_t(x[i - step]) + x[i + step];
            out[i] = uint8_t((sum * near + (uint32_t(x[i - reach]) + x[i + reach]) * far + (1u << 23)) >> 24);
        }
    }
}

DINOFAST_CLONES void box_pass(const uint8_t* x, int64_t n, int64_t step, const BoxBlur& blur, uint8_t* out) {
    switch (blur.radius) {
        case 0: box_pass<0>(x, n, step, blur, out); break;
        case 1: box_pass<1>(x, n, step, blur, out); break;
        default: box_pass<-1>(x, n, step, blur, out);
    }
}

// The plane stands in a frame that repeats its border, so that a pass runs over all rows at once, and what it makes of the frame
// is made anew.
void gaussian_blur(uint8_t* plane, int64_t size, double sigma, Scratch& scratch) {
    const BoxBlur blur = box_blur(sigma);
    const int64_t frame = blur.radius + 1, side = size + 2 * frame, begin = frame * side;  // of the rows of the plane
    scratch.first.resize(side * side + kVector), scratch.second.resize(side * side + kVector);
    uint8_t *x = scratch.first.data() + begin, *out = scratch.second.data() + begin;
    for (int64_t y = 0; y < size; ++y) std::memcpy(x + y * side + frame, plane + y * size, size_t(size));
    for (int pass = 0; pass < 3; ++pass, std::swap(x, out)) {
        for (uint8_t* row = x; row < x + size * side; row += side)
            for (int64_t k = 0; k < frame; ++k) row[k] = row[frame], row[side - 1 - k] = row[side - 1 - frame];
        box_pass(x, size * side, 1, blur, out);
    }
    for (int pass = 0; pass < 3; ++pass, std::swap(x, out)) {
        for (int64_t k = 1; k <= frame; ++k) {
            std::memcpy(x - k * side, x, size_t(side));
            std::memcpy(x + (size - 1 + k) * side, x + (size - 1) * side, size_t(side));
        }
        box_pass(x, size * side, side, blur, out);
    }
    for (int64_t y = 0; y < size; ++y) std::memcpy(plane + y * size, x + y * side + frame, size_t(size));
}

DINOFAST_CLONES void solarize(uint8_t* x, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) x[i] = x[i] < 128 ? x[i] : uint8_t(255 - x[i]);
}

// A crop (3, area) into its place.
void write(const uint8_t* crop, int64_t area, const Levels& levels, void* out) {
    if (levels.kind == Levels::Kind::u8) {
        std::memcpy(out, crop, size_t(3 * area));
        return;
    }
    for (int c = 0; c < 3; ++c) {
        const uint8_t* x = crop + c * area;
        const float* norm_lut = levels.norm_lut + c * 256;
        if (levels.kind == Levels::Kind::f32) {
            float* to = static_cast<float*>(out) + c * area;
            for (int64_t i = 0; i < area; ++i) to[i] = norm_lut[x[i]];
        } else {
            BF16 rounded[256], *to = static_cast<BF16*>(out) + c * area;
            for (int level = 0; level < 256; ++level) rounded[level] = narrow<BF16>(norm_lut[level]);
            for (int64_t i = 0; i < area; ++i) to[i] = rounded[x[i]];
        }
    }
}

}  // namespace

void multicrop(const uint8_t* image, int64_t height, int64_t width, int64_t bytes, const View* views, int64_t n,
               const Levels& levels, void* const* crops) {
    const int64_t pixels = height * width;
    Plane rows(3 * pixels + kVector), columns(3 * pixels + kVector), crop;
    Scratch scratch;
    split(image, bytes, pixels, rows.data());
    for (int c = 0; c < 3; ++c) transpose(rows.data() + c * pixels, width, height, width, columns.data() + c * pixels, height);
    for (int64_t i = 0; i < n; ++i) {
        const View& view = views[i];
        const int64_t size = view.size, area = size * size;
        crop.resize(3 * area);
        uint8_t *r = crop.data(), *g = r + area, *b = g + area;
        const Resampling across = resampling(view.box[3], size), down = resampling(view.box[2], size);
        for (int c = 0; c < 3; ++c)
            cut(rows.data() + c * pixels, columns.data() + c * pixels, height, width, view, across, down, r + c * area, scratch);
        for (int k = 0; view.jitter && k < 4; ++k) {
            const double factor = view.factors[view.order[k]];
            switch (view.order[k]) {
                case 0: brightness(r, 3 * area, float(factor)); break;
                case 1: contrast(r, g, b, area, float(factor)); break;
                case 2: saturation(r, g, b, area, float(factor)); break;
                default: hue(r, g, b, area, int32_t(factor * 255));
            }
        }
        if (view.gray) gray(r, g, b, area);
        for (uint8_t* plane : {r, g, b})
            if (view.blur_radius > 0) gaussian_blur(plane, size, view.blur_radius, scratch);
        if (view.solarize) solarize(r, 3 * area);
        write(crop.data(), area, levels, crops[i]);
    }
}

}  // namespace dinofast
