// Products of float32 matrices, computed on float16 numbers: twice as many fit a vector. Both matrices are scaled by
// powers of two, piece by piece, and rounded to 11 bits; sums of CHUNK products are float16, their totals float32. So a
// product is off by about half of what bfloat16 numbers with float32 sums would make it. kernels.py calls this.
//
// The order of loops is that of Goto and van de Geijn (2008, Anatomy of high-performance matrix multiplication). Every
// number of the result is summed by one thread in one order, so results are repeatable to the bit.
// Does not know: torch, what is multiplied.

#include "vectors.h"

#if defined(__AVX512FP16__)

constexpr int DOWN = 8, ACROSS = 3;                 // sums at once: DOWN x ACROSS vectors
constexpr int PANEL = ACROSS * LANES;               // columns
constexpr int DEEP = 640, TALL = 192, WIDE = 3072;  // most of the inner size, rows and columns that are held at once
constexpr float ROOM_LEFT = 32, ROOM_RIGHT = 16;    // numbers are scaled to below it, CHUNK products to below 2^15

// Memory of a thread's own that is there the next time.
class Kept {
    void* at = nullptr;
    size_t bytes = 0;

  public:
    ~Kept() { std::free(at); }
    void* get(size_t wanted) {
        if (wanted > bytes) {
            std::free(at);
            at = std::aligned_alloc(64, bytes = (wanted + 63) / 64 * 64);
        }
        return at;
    }
};

static inline vec some(const float* at, int count) {
    if (count >= W) return load(at);
    vec value{};
    for (int lane = 0; lane < count; lane++) value[lane] = at[lane];
    return value;
}
struct Matrix {  // one of the strides is 1
    const float* at;
    size row, column;
    const float* operator()(size r, size c) const { return at + r * row + c * column; }
};

// a [rows, deep] as [rows, DEEP], each number twice; what undoes its scale for each row.
static void take_left(Matrix a, int rows, int deep, uint32_t* into, float* back) {
    if (a.column == 1) {
        for (int r = 0; r < rows; r++, into += DEEP) {
            const float* from = a(r, 0);
            vec best{};
            float top = 0;
            int k = 0;
            for (; k + W <= deep; k += W) best = larger(best, magnitude(load(from + k)));
            for (top = largest(best); k < deep; k++) top = std::max(top, std::abs(from[k]));
            const Scale scale(top, ROOM_LEFT);
            back[r] = scale.back;
            for (k = 0; k + W <= deep; k += W) {
                *(bits*)(into + k) = twice(load(from + k) * scale.by);
            }
            for (; k < deep; k++) {
                const half value = half(from[k] * scale.by);
                uint16_t raw;
                std::memcpy(&raw, &value, 2);
                into[k] = raw * 65537u;
            }
        }
        return;
    }
    for (int r = 0; r < rows; r += W) {  // a vector of rows at a time
        const int count = std::min(W, rows - r);
        vec best{}, by{};
        for (int k = 0; k < deep; k++) best = larger(best, magnitude(some(a(r, k), count)));
        for (int lane = 0; lane < count; lane++) {
            const Scale scale(best[lane], ROOM_LEFT);
            by[lane] = scale.by;
            back[r + lane] = scale.back;
        }
        for (int k = 0; k < deep; k++) {
            const bits both = twice(some(a(r, k), count) * by);
            for (int lane = 0; lane < count; lane++) into[(r + lane) * DEEP + k] = both[lane];
        }
    }
}

// A square of numbers the other way round, in steps that exchange its quarters, and theirs.
static inline void turn(bits (&lines)[W]) {
    for (int far = W / 2; far; far /= 2)
        for (int i = 0; i < W; i++) {
            if (i & far) continue;
            bits first{}, second{};
            for (int lane = 0; lane < W; lane++) {
                first[lane] = lane & far ? W + lane - far : lane;
                second[lane] = lane & far ? W + lane : lane + far;
            }
            const bits a = lines[i], b = lines[i + far];
            lines[i] = __builtin_shuffle(a, b, first);
            lines[i + far] = __builtin_shuffle(a, b, second);
        }
}

// b [deep, columns] as [deep, across * LANES], zeros to the right of it; what undoes its scale.
static float take_right(Matrix b, int deep, int columns, int across, half* into) {
    const int wide = across * LANES;
    vec best{};
    float top = 0;
    const int lines = b.column == 1 ? deep : columns, line = b.column == 1 ? columns : deep;
    const size step = b.column == 1 ? b.row : b.column;
    for (int i = 0; i < lines; i++) {
        const float* from = b.at + i * step;
        int j = 0;
        for (; j + W <= line; j += W) best = larger(best, magnitude(load(from + j)));
        for (; j < line; j++) top = std::max(top, std::abs(from[j]));
    }
    const Scale scale(std::max(top, largest(best)), ROOM_RIGHT);
    if (b.column == 1) {
        for (int k = 0; k < deep; k++, into += wide) {
            const float* from = b(k, 0);
            int n = 0;
            for (; n + W <= columns; n += W) *(half_vec*)(into + n) = halved(load(from + n) * scale.by);
            for (; n < columns; n++) into[n] = half(from[n] * scale.by);
            for (; n < wide; n++) into[n] = 0;
        }
        return scale.back;
    }
    for (int n = 0; n < wide; n += LANES) {  // LANES columns at a time, in pairs: as many numbers of 32 bits as a vector has
        const int count = std::max(0, std::min(LANES, columns - n));
        for (int k = 0; k < deep; k += W) {
            bits lines_of[W];
            for (int pair = 0; pair < W; pair++) {
                const bits low = 2 * pair < count ? once(some(b(k, n + 2 * pair), deep - k) * scale.by) : bits{};
                const bits high = 2 * pair + 1 < count ? once(some(b(k, n + 2 * pair + 1), deep - k) * scale.by) : bits{};
                lines_of[pair] = low | high << 16;
            }
            turn(lines_of);
            for (int i = 0; i < std::min(W, deep - k); i++) *(bits*)(into + (k + i) * wide + n) = lines_of[i];
        }
    }
    return scale.back;
}

// c [DOWN, across * LANES] = from (or nothing) + a b, of matrices as they were taken.
template <int across>
static void tile(int deep, const uint32_t* a, const half* b, const float* back, float undo, const float* from,
                 size from_row, float* c, size c_row) {
    constexpr int wide = across * LANES;
    for (int begin = 0; begin < deep; begin += CHUNK) {
        const int end = std::min(deep, begin + CHUNK);
        half_lanes sums[DOWN][across];
        for (int r = 0; r < DOWN; r++)
            for (int v = 0; v < across; v++) sums[r][v] = half_lanes{};
        for (int k = begin; k < end; k++) {
            half_lanes inputs[across];
            for (int v = 0; v < across; v++) inputs[v] = *(const half_lanes*)(b + k * wide + v * LANES);
#pragma GCC unroll 8
            for (int r = 0; r < DOWN; r++) {
                const half_lanes factor = (half_lanes)(bits{} + a[r * DEEP + k]);
                for (int v = 0; v < across; v++) sums[r][v] += factor * inputs[v];
            }
        }
        for (int r = 0; r < DOWN; r++) {
            const float scale = back[r] * undo;
            for (int v = 0; v < across; v++) {
                for (int p = 0; p < 2; p++) {
                    const int at = v * LANES + p * W;
                    const vec part = part_of(sums[r][v], p) * scale;
                    store(c + r * c_row + at, from ? load(from + r * from_row + at) + part : part);
                }
            }
        }
        from = c;
        from_row = c_row;
    }
}

static void any_tile(int across, int deep, const uint32_t* a, const half* b, const float* back, float undo,
                     const float* from, size from_row, float* c, size c_row) {
    switch (across) {
        case 1: return tile<1>(deep, a, b, back, undo, from, from_row, c, c_row);
        case 2: return tile<2>(deep, a, b, back, undo, from, from_row, c, c_row);
        case 3: return tile<3>(deep, a, b, back, undo, from, from_row, c, c_row);
    }
}

static inline size parts(size whole, size most) { return (whole + most - 1) / most; }
static inline size even(size whole, size pieces, size of) { return parts(parts(whole, pieces), of) * of; }

// c [M, N] = plus (or nothing) + a [M, K] b [K, N]. The rows of c and plus are contiguous; plus may be c.
extern "C" void product_of_halves(size M, size N, size K, Matrix a, Matrix b, const float* plus, size plus_row, float* c,
                               size c_row, int threads) {
    const size blocks = parts(M, TALL * threads) * threads, tall = std::min<size>(TALL, even(M, blocks, DOWN));
    const size deep = even(K, parts(K, DEEP), CHUNK), wide = even(N, parts(N, WIDE), PANEL);
    const size rows = parts(M, tall), groups = rows < threads ? threads : 1;
    static thread_local Kept kept_right, kept_undo;
    half* right = (half*)kept_right.get(wide * deep * sizeof(half));
    float* undo = (float*)kept_undo.get(parts(wide, PANEL) * sizeof(float));
#pragma omp parallel num_threads(threads)
    {
        static thread_local Kept kept_left;
        uint32_t* left = (uint32_t*)kept_left.get((TALL * DEEP + TALL + DOWN * PANEL) * 4);
        float *back = (float*)(left + TALL * DEEP), *aside = back + TALL;
        for (size n = 0; n < N; n += wide)
            for (size k = 0; k < K; k += deep) {
                const int depth = (int)std::min(deep, K - k);
                const size width = std::min(wide, N - n), panels = parts(width, PANEL);
                const float* from = k ? c : plus;
                const size from_row = k ? c_row : plus_row;
#pragma omp for schedule(dynamic)
                for (size p = 0; p < panels; p++) {
                    const int columns = (int)std::min<size>(PANEL, width - p * PANEL);
                    undo[p] = take_right({b(k, n + p * PANEL), b.row, b.column}, depth, columns,
                                         (int)parts(columns, LANES), right + p * PANEL * deep);
                }
#pragma omp for schedule(dynamic)
                for (size task = 0; task < rows * groups; task++) {
                    const size m = task / groups * tall, group = task % groups;
                    const int height = (int)std::min(tall, M - m);
                    take_left({a(m, k), a.row, a.column}, height, depth, left, back);
                    for (size p = panels * group / groups; p < panels * (group + 1) / groups; p++) {
                        const size column = n + p * PANEL;
                        const int columns = (int)std::min<size>(PANEL, width - p * PANEL), across = (int)parts(columns, LANES);
                        for (int r = 0; r < height; r += DOWN) {
                            const int count = std::min(DOWN, height - r);
                            const float* before = from ? from + (m + r) * from_row + column : nullptr;
                            float* into = c + (m + r) * c_row + column;
                            const uint32_t* l = left + r * DEEP;
                            const half* of = right + p * PANEL * deep;
                            if (count == DOWN && columns == across * LANES) {
                                any_tile(across, depth, l, of, back + r, undo[p], before, from_row, into, c_row);
                                continue;
                            }
                            any_tile(across, depth, l, of, back + r, undo[p], nullptr, 0, aside, PANEL);
                            for (int i = 0; i < count; i++)
                                for (int j = 0; j < columns; j++)
                                    into[i * c_row + j] = aside[i * PANEL + j] + (before ? before[i * from_row + j] : 0);
                        }
                    }
                }
            }
    }
}

#endif
