// What the sources of our kernels share: vectors of as many float32 as the processor has, and float16 numbers where it
// multiplies them. Does not know: what is computed.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

using size = int64_t;
typedef float vec __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(W * 4), may_alias));
typedef uint32_t bits __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint16_t shorts __attribute__((vector_size(W * 2), aligned(2), may_alias));
constexpr float NEVER = -std::numeric_limits<float>::infinity();

static inline vec load(const float* at) { return *(const vec*)at; }
static inline void store(float* at, vec value) { *(vec*)at = value; }
static inline vec all(float value) { return value - vec{}; }
static inline vec larger(vec one, vec other) { return one > other ? one : other; }
static inline float sum(vec value) {
    float total = 0;
    for (int lane = 0; lane < W; lane++) total += value[lane];
    return total;
}
static inline float largest(vec value) {
    float top = value[0];
    for (int lane = 1; lane < W; lane++) top = std::max(top, value[lane]);
    return top;
}
static inline bool any_above(vec value, float limit) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)value, _mm512_set1_ps(limit), _CMP_GT_OQ);
#else
    return largest(value) > limit;
#endif
}
static inline vec magnitude(vec value) { return value < 0 ? -value : value; }

// e^x to about one unit in the last place, for x up to 88; 0 below -87; what is not a number stays none. Range reduction
// and polynomial after Cephes (Moshier), expf.
static inline vec exponential(vec x) {
    const vec magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits
    vec whole = x * 1.44269504088896341f + magic;
    ints power = (ints)whole << 23;
    whole -= magic;
    vec rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    vec value = all(1.9875691500e-4f);
    value = value * rest + 1.3981999507e-3f;
    value = value * rest + 8.3334519073e-3f;
    value = value * rest + 4.1665795894e-2f;
    value = value * rest + 1.6666665459e-1f;
    value = value * rest + 5.0000001201e-1f;
    value = value * rest * rest + rest + 1.0f;
    return x < -87.0f ? vec{} : (vec)((ints)value + power) + (x - x);
}

// Numbers that begin at a cache line: vectors that cross two take twice the time.
class Scratch {
    float* at;

  public:
    explicit Scratch(size count) : at((float*)std::aligned_alloc(64, (count * 4 + 63) / 64 * 64)) {}
    Scratch(const Scratch&) = delete;
    ~Scratch() { std::free(at); }
    operator float*() const { return at; }
};

#if defined(__AVX512FP16__)
typedef _Float16 half;
constexpr int LANES = 2 * W;
constexpr int CHUNK = 64;  // products that are summed in float16 before they are added to a float32
typedef half half_lanes __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
typedef half half_vec __attribute__((vector_size(W * 2), aligned(2), may_alias));

// Sixteen numbers as halves, in the lower 16 of their 32 bits, or in both parts: so a factor is read for a whole vector of
// halves as one float32 would be.
static inline bits once(vec value) {
    return __builtin_convertvector((shorts)__builtin_convertvector(value, half_vec), bits);
}
static inline bits twice(vec value) {
    const bits raw = once(value);
    return raw | raw << 16;
}
static inline half_vec halved(vec value) { return __builtin_convertvector(value, half_vec); }
static inline vec part_of(half_lanes value, int which) {  // the first or the second half of a vector
    const __m512i raw = (__m512i)value;
    return (vec)_mm512_cvtxph_ps((__m256h)(which ? _mm512_extracti64x4_epi64(raw, 1) : _mm512_castsi512_si256(raw)));
}

// A power of two that brings `top` to [room / 2, room), and what undoes it; 1 for what has no exponent. `room` is a
// power of two itself.
struct Scale {
    float by = 1, back = 1;
    Scale(float top, float room) {
        uint32_t raw, limit;
        std::memcpy(&raw, &top, 4);
        std::memcpy(&limit, &room, 4);
        const int exponent = raw >> 23 & 255;
        if (exponent == 0 || exponent == 255) return;
        const int power = std::min(int(limit >> 23 & 255) - 1 - exponent, 126);
        const uint32_t up = uint32_t(127 + power) << 23, down = uint32_t(127 - power) << 23;
        std::memcpy(&by, &up, 4);
        std::memcpy(&back, &down, 4);
    }
};
#endif
