#pragma once

#include <cstdint>

namespace dinofast {

struct View {  // one crop as it was drawn: dinofast/data/augmentation.py, VIEW
    int32_t box[4];  // y, x, height, width in the image, pixels
    int32_t size;    // side of the crop, pixels
    uint8_t flip, jitter;  // and the other switches: not bool, which a byte of 2 would make undefined
    uint8_t order[4];  // of brightness 0, contrast 1, saturation 2, hue 3
    double factors[4];
    uint8_t gray;
    double blur_radius;  // 0: no blur
    uint8_t solarize;
};

// What becomes of a level: itself, or an entry of `norm_lut` (3, 256), which normalizes, in fp32 or rounded to bf16.
struct Levels {
    enum class Kind { u8, f32, bf16 } kind;
    const float* norm_lut;
};

// See multicrop.cpp. image (height, width, bytes), the first three of 3 or 4 bytes being the colors; n views, whose boxes lie in
// the image; crops[i] (3, size, size) out.
void multicrop(const uint8_t* image, int64_t height, int64_t width, int64_t bytes, const View* views, int64_t n,
               const Levels& levels, void* const* crops);

}  // namespace dinofast
