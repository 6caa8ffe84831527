// What torch's CPU kernels leave undone: tree attention without masks or merges, and each of a layer's passes between
// its matrix products as one pass over memory. native.py compiles this on the machine it runs on, kernels.py calls it; the
// same in torch (attention.py, pointwise.py, loss.py) is what runs where it cannot, and what the tests hold it to.
//
// All arithmetic is float32, on vectors of W numbers that the compiler maps to the processor's. No sum depends on which
// thread is first, only on how many there are, so results are repeatable to the bit.
// Does not know: torch, autograd, models.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
constexpr int W = 16, ACROSS = 4;
#elif defined(__AVX__)
constexpr int W = 8, ACROSS = 2;
#else
constexpr int W = 4, ACROSS = 4;
#endif
constexpr int DOWN = 6;  // DOWN x ACROSS sums, ACROSS inputs and one factor fill the processor's registers
constexpr int QUERIES = LUTHIER_QUERIES, KEYS = LUTHIER_KEYS;  // of a tile: tiles.py's, a multiple of W for KEYS

using size = int64_t;
typedef float vec __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(W * 4), may_alias));
typedef uint32_t bits __attribute__((vector_size(W * 4), may_alias));
typedef uint16_t halves __attribute__((vector_size(W * 2), aligned(2), may_alias));
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

// ---- products of small matrices ----------------------------------------------------------------------------------

// c [down, across * W] (+)= a [down, inner] b [inner, across * W]; a's element (r, k) is at r * a_row + k * a_step.
template <int down, int across>
static inline void block(int inner, const float* a, size a_row, size a_step, const float* b, size b_row, float* c,
                         size c_row, bool add) {
    vec sums[down][across];
    for (int r = 0; r < down; r++)
        for (int v = 0; v < across; v++) sums[r][v] = add ? load(c + r * c_row + v * W) : vec{};
    for (int k = 0; k < inner; k++) {
        vec inputs[across];
        for (int v = 0; v < across; v++) inputs[v] = load(b + k * b_row + v * W);
        for (int r = 0; r < down; r++) {
            vec factor = all(a[r * a_row + k * a_step]);
            for (int v = 0; v < across; v++) sums[r][v] += factor * inputs[v];
        }
    }
    for (int r = 0; r < down; r++)
        for (int v = 0; v < across; v++) store(c + r * c_row + v * W, sums[r][v]);
}

template <int across>
static void columns(int rows, int inner, const float* a, size a_row, size a_step, const float* b, size b_row, float* c,
                    size c_row, bool add) {
    for (; rows >= DOWN; rows -= DOWN, a += DOWN * a_row, c += DOWN * c_row)
        block<DOWN, across>(inner, a, a_row, a_step, b, b_row, c, c_row, add);
    switch (rows) {
        case 1: return block<1, across>(inner, a, a_row, a_step, b, b_row, c, c_row, add);
        case 2: return block<2, across>(inner, a, a_row, a_step, b, b_row, c, c_row, add);
        case 3: return block<3, across>(inner, a, a_row, a_step, b, b_row, c, c_row, add);
        case 4: return block<4, across>(inner, a, a_row, a_step, b, b_row, c, c_row, add);
        case 5: return block<5, across>(inner, a, a_row, a_step, b, b_row, c, c_row, add);
    }
}

// c [rows, width] (+)= a [rows, inner] b [inner, width], as `block`; width is a multiple of W.
static void product(int rows, int inner, int width, const float* a, size a_row, size a_step, const float* b, size b_row,
                    float* c, size c_row, bool add) {
    int left = width / W;
    for (; left >= ACROSS; left -= ACROSS, b += ACROSS * W, c += ACROSS * W)
        columns<ACROSS>(rows, inner, a, a_row, a_step, b, b_row, c, c_row, add);
    if (ACROSS > 3 && left == 3) columns<3>(rows, inner, a, a_row, a_step, b, b_row, c, c_row, add);
    if (ACROSS > 2 && left == 2) columns<2>(rows, inner, a, a_row, a_step, b, b_row, c, c_row, add);
    if (left == 1) columns<1>(rows, inner, a, a_row, a_step, b, b_row, c, c_row, add);
}

// ---- attention ---------------------------------------------------------------------------------------------------

// Heads [T, H, D] in memory of their own strides (in numbers); the last dimension is contiguous.
struct Heads {
    float* at;
    size token, head;
    float* operator()(size h, size t) const { return at + h * head + t * token; }
};
struct QueryTile {
    int32_t start, count, position, first, last;  // [first, last) of the visits are its own
};
struct KeyTile {
    int32_t start, count, position;
};
struct Visit {
    int32_t tile, own;  // own: of the same segment, so causal
};
struct Plan {
    const QueryTile* queries;
    const KeyTile* keys;
    const Visit* visits;
    size query_tiles, key_tiles, query_tokens, key_tokens, heads, key_heads, width, window;  // window 0: none
    float scale;
    int32_t threads;

    size panel() const { return width * KEYS; }
    float* panel_of(float* panels, size key_head, size tile) const {
        return panels + (key_head * key_tiles + tile) * panel();
    }
    size key_head(size head) const { return head / (heads / key_heads); }
};

// Numbers that begin at a cache line: vectors that cross two take twice the time.
class Scratch {
    float* at;

  public:
    explicit Scratch(size count) : at((float*)std::aligned_alloc(64, (count * 4 + 63) / 64 * 64)) {}
    Scratch(const Scratch&) = delete;
    ~Scratch() { std::free(at); }
    operator float*() const { return at; }
};

static inline int padded(int count) { return (count + W - 1) / W * W; }

// How many of a tile's keys the last of the queries sees, if nothing but order hides them.
static inline int reach(const QueryTile& queries, const KeyTile& keys, bool own) {
    return own ? std::min(keys.count, queries.position + queries.count - keys.position) : keys.count;
}

// Scores of what is not seen, and of the padding, to -inf.
static void hide(const Plan& plan, const QueryTile& queries, const KeyTile& keys, bool own, int width, float* scores) {
    const int first = queries.position - keys.position, last = first + queries.count - 1;  // ahead of the first key
    if ((own ? first + 1 : keys.count) >= width && (!plan.window || last < plan.window)) return;
    for (int r = 0; r < queries.count; r++, scores += KEYS) {
        int ahead = queries.position + r - keys.position;
        int end = own ? std::min(keys.count, ahead + 1) : keys.count;
        int begin = plan.window ? (int)std::min<size>(width, std::max<size>(0, ahead - plan.window + 1)) : 0;
        std::fill(scores, scores + begin, NEVER);
        std::fill(scores + std::max(end, 0), scores + width, NEVER);
    }
}

// Scores [queries, KEYS] of a visit, from scaled queries and the panels of keys; how many of the tile's keys are seen.
static inline int score(const Plan& plan, const QueryTile& queries, const Visit& visit, size key_head, const float* asked,
                        float* panels, float* scores) {
    const KeyTile& keys = plan.keys[visit.tile];
    const int width = (int)plan.width, seen = reach(queries, keys, visit.own), wide = padded(seen);
    product(queries.count, width, wide, asked, width, 1, plan.panel_of(panels, key_head, visit.tile), KEYS, scores, KEYS,
            false);
    hide(plan, queries, keys, visit.own, wide, scores);
    return seen;
}

// Keys (or values) of each tile as [D, KEYS], zeros after the last.
static void turn(const Plan& plan, Heads from, float* panels) {
#pragma omp parallel for collapse(2) schedule(static) num_threads(plan.threads)
    for (size h = 0; h < plan.key_heads; h++)
        for (size t = 0; t < plan.key_tiles; t++) {
            const KeyTile& keys = plan.keys[t];
            float* into = plan.panel_of(panels, h, t);
            for (int d = 0; d < plan.width; d++)
                std::fill(into + d * KEYS + keys.count, into + d * KEYS + padded(keys.count), 0.0f);
            for (int j = 0; j < keys.count; j++) {
                const float* row = from(h, keys.start + j);
                for (int d = 0; d < plan.width; d++) into[d * KEYS + j] = row[d];
            }
        }
}

// out and lse [H, T] (log-sum-exp of the scores); panels: room for keys turned, [key heads, tiles, D, KEYS].
extern "C" void attention(const Plan* given, Heads query, Heads key, Heads value, Heads out, float* lse, float* panels) {
    const Plan& plan = *given;
    const int width = (int)plan.width;
    turn(plan, key, panels);
#pragma omp parallel num_threads(plan.threads)
    {
        const Scratch scores(QUERIES * KEYS), asked(QUERIES * width), mixed(QUERIES * width);
        float top[QUERIES];
        vec total[QUERIES];
#pragma omp for schedule(dynamic)
        for (size task = 0; task < plan.heads * plan.query_tiles; task++) {
            const size head = task / plan.query_tiles, key_head = plan.key_head(head);
            const QueryTile& queries = plan.queries[plan.query_tiles - 1 - task % plan.query_tiles];  // longest first
            for (int r = 0; r < queries.count; r++) {
                const float* from = query(head, queries.start + r);
                for (int d = 0; d < width; d += W) {
                    store(asked + r * width + d, load(from + d) * plan.scale);
                    store(mixed + r * width + d, vec{});
                }
                top[r] = NEVER;
                total[r] = vec{};
            }
            for (int at = queries.first; at < queries.last; at++) {
                const Visit& visit = plan.visits[at];
                const KeyTile& keys = plan.keys[visit.tile];
                const int seen = score(plan, queries, visit, key_head, asked, panels, scores), wide = padded(seen);
                for (int r = 0; r < queries.count; r++) {
                    float *row = scores + r * KEYS, *sums = mixed + r * width;
                    vec best = load(row);
                    for (int j = W; j < wide; j += W) best = larger(best, load(row + j));
                    if (any_above(best, top[r])) {
                        const float now = largest(best), less = std::exp(top[r] - now);
                        total[r] *= less;
                        for (int d = 0; d < width; d += W) store(sums + d, load(sums + d) * less);
                        top[r] = now;
                    }
                    if (top[r] == NEVER) {  // a window hides all so far
                        std::fill(row, row + wide, 0.0f);
                        continue;
                    }
                    for (int j = 0; j < wide; j += W) {
                        const vec share = exponential(load(row + j) - top[r]);
                        store(row + j, share);
                        total[r] += share;
                    }
                }
                product(queries.count, seen, width, scores, KEYS, 1, value(key_head, keys.start), value.token,
                        mixed, width, true);
            }
            for (int r = 0; r < queries.count; r++) {
                const float whole = sum(total[r]), share = 1 / whole;
                float* into = out(head, queries.start + r);
                for (int d = 0; d < width; d += W) store(into + d, load(mixed + r * width + d) * share);
                lse[head * plan.query_tokens + queries.start + r] = top[r] + std::log(whole);
            }
        }
    }
}

// Gradients from that of the output (Dao et al., 2022, FlashAttention, algorithm 4, queries outside). panels: room for
// keys and values turned; sums: for each thread's gradients of keys and values, [threads, 2, key heads, keys, D].
extern "C" void attention_backward(const Plan* given, Heads query, Heads key, Heads value, Heads output, Heads grad,
                                   const float* lse, Heads into_query, Heads into_key, Heads into_value, float* panels,
                                   float* sums) {
    const Plan& plan = *given;
    const int width = (int)plan.width;
    const size side = plan.key_heads * plan.key_tokens * plan.width;
    float* value_panels = panels + plan.key_heads * plan.key_tiles * plan.panel();
    turn(plan, key, panels);
    turn(plan, value, value_panels);
    std::vector<size> costs(plan.query_tiles);  // of one head's tiles, in pairs of a query and a key
    size cost = 0;
    for (size t = 0; t < plan.query_tiles; t++) {
        const QueryTile& queries = plan.queries[t];
        costs[t] = 0;
        for (int at = queries.first; at < queries.last; at++)
            costs[t] += queries.count * padded(reach(queries, plan.keys[plan.visits[at].tile], plan.visits[at].own));
        cost += costs[t];
    }
#pragma omp parallel for schedule(static, 1) num_threads(plan.threads)
    for (int thread = 0; thread < plan.threads; thread++) {
        float *into_keys = sums + 2 * side * thread, *into_values = into_keys + side;
        std::fill(into_keys, into_keys + 2 * side, 0.0f);
        const Scratch shares(QUERIES * KEYS), slopes(QUERIES * KEYS), asked(QUERIES * width), grads(QUERIES * width),
            back(QUERIES * width);
        float inner[QUERIES];
        const size from = cost * plan.heads * thread / plan.threads, to = cost * plan.heads * (thread + 1) / plan.threads;
        size done = 0;
        for (size task = 0; task < plan.heads * plan.query_tiles; task++) {
            const size head = task / plan.query_tiles, key_head = plan.key_head(head);
            const QueryTile& queries = plan.queries[task % plan.query_tiles];
            const size middle = done + costs[task % plan.query_tiles] / 2;
            done += costs[task % plan.query_tiles];
            if (middle < from || middle >= to) continue;
            for (int r = 0; r < queries.count; r++) {
                const size token = queries.start + r;
                const float *q = query(head, token), *g = grad(head, token), *o = output(head, token);
                vec dot{};
                for (int d = 0; d < width; d += W) {
                    store(asked + r * width + d, load(q + d) * plan.scale);
                    store(grads + r * width + d, load(g + d));
                    store(back + r * width + d, vec{});
                    dot += load(g + d) * load(o + d);
                }
                inner[r] = sum(dot);
            }
            for (int at = queries.first; at < queries.last; at++) {
                const Visit& visit = plan.visits[at];
                const KeyTile& keys = plan.keys[visit.tile];
                const int seen = score(plan, queries, visit, key_head, asked, panels, shares), wide = padded(seen);
                product(queries.count, width, wide, grads, width, 1,
                        plan.panel_of(value_panels, key_head, visit.tile), KEYS, slopes, KEYS, false);
                for (int r = 0; r < queries.count; r++) {
                    float *row = shares + r * KEYS, *slope = slopes + r * KEYS;
                    const float whole = lse[head * plan.query_tokens + queries.start + r];
                    for (int j = 0; j < wide; j += W) {
                        const vec share = exponential(load(row + j) - whole);
                        store(row + j, share);
                        store(slope + j, share * (load(slope + j) - inner[r]));
                    }
                }
                const size place = (key_head * plan.key_tokens + keys.start) * width;
                product(seen, queries.count, width, slopes, 1, KEYS, asked, width, into_keys + place, width,
                        true);
                product(seen, queries.count, width, shares, 1, KEYS, grads, width, into_values + place,
                        width, true);
                product(queries.count, seen, width, slopes, KEYS, 1, key(key_head, keys.start), key.token,
                        back, width, true);
            }
            for (int r = 0; r < queries.count; r++) {
                float* into = into_query(head, queries.start + r);
                for (int d = 0; d < width; d += W) store(into + d, load(back + r * width + d) * plan.scale);
            }
        }
    }
#pragma omp parallel for collapse(2) schedule(static) num_threads(plan.threads)
    for (size h = 0; h < plan.key_heads; h++)
        for (size t = 0; t < plan.key_tokens; t++)
            for (int d = 0; d < width; d += W) {
                vec keys{}, values{};
                for (int thread = 0; thread < plan.threads; thread++) {
                    const float* from = sums + 2 * side * thread + (h * plan.key_tokens + t) * width + d;
                    keys += load(from);
                    values += load(from + side);
                }
                store(into_key(h, t) + d, keys);
                store(into_value(h, t) + d, values);
            }
}

// ---- what lies between products ----------------------------------------------------------------------------------

// Rows [outer, inner, width] of float32, or of bfloat16 if `half`, strides in numbers.
struct Rows {
    void* at;
    size outer, inner;
    int32_t half, _;

    vec get(size i, size j, size d) const {
        const size place = i * outer + j * inner + d;
        if (!half) return load((const float*)at + place);
        return (vec)(__builtin_convertvector(*(const halves*)((const uint16_t*)at + place), bits) << 16);
    }
    void put(size i, size j, size d, vec value) const {
        const size place = i * outer + j * inner + d;
        if (!half) return store((float*)at + place, value);
        const bits raw = (bits)value;  // rounded to the nearest, ties to even; what is not a number stays none
        const bits rounded = (raw + 0x7fff + ((raw >> 16) & 1)) >> 16;
        *(halves*)((uint16_t*)at + place) = __builtin_convertvector(value == value ? rounded : (raw >> 16 | 64), halves);
    }
};
struct Shape {
    size outer, inner, width;
    int32_t threads, _;
};

// RMSNorm; `inverse` [outer, inner] are the inverse root mean squares, made here unless they are `known`.
extern "C" void norm(Shape shape, Rows rows, const float* weight, float epsilon, float* inverse, int known, Rows out) {
#pragma omp parallel for collapse(2) schedule(static) num_threads(shape.threads)
    for (size i = 0; i < shape.outer; i++)
        for (size j = 0; j < shape.inner; j++) {
            float& scale = inverse[i * shape.inner + j];
            if (!known) {
                vec squares{};
                for (size d = 0; d < shape.width; d += W) {
                    const vec x = rows.get(i, j, d);
                    squares += x * x;
                }
                scale = 1 / std::sqrt(sum(squares) / shape.width + epsilon);
            }
            for (size d = 0; d < shape.width; d += W)
                out.put(i, j, d, rows.get(i, j, d) * scale * load(weight + d));
        }
}

// weight_grad: each thread's share, [threads, width], or null. `plus.at` may be null.
extern "C" void norm_backward(Shape shape, Rows grad, Rows rows, const float* weight, const float* inverse, Rows plus,
                              Rows out, float* weight_grad) {
    const size count = shape.outer * shape.inner;
#pragma omp parallel for schedule(static, 1) num_threads(shape.threads)
    for (int thread = 0; thread < shape.threads; thread++) {
        float* own = weight_grad ? weight_grad + thread * shape.width : nullptr;
        if (own) std::fill(own, own + shape.width, 0.0f);
        for (size at = count * thread / shape.threads; at < count * (thread + 1) / shape.threads; at++) {
            const size i = at / shape.inner, j = at % shape.inner;
            const float scale = inverse[at];
            vec dots{};
            for (size d = 0; d < shape.width; d += W) dots += grad.get(i, j, d) * load(weight + d) * rows.get(i, j, d);
            const float share = -sum(dots) * scale * scale * scale / shape.width;
            for (size d = 0; d < shape.width; d += W) {
                const vec x = rows.get(i, j, d), g = grad.get(i, j, d);
                if (own) store(own + d, load(own + d) + g * x * scale);
                const vec into = x * share + g * load(weight + d) * scale;
                out.put(i, j, d, plus.at ? into + plus.get(i, j, d) : into);
            }
        }
    }
}

// Rotary embedding of heads, halves apart; cos and sin [outer, width / 2].
extern "C" void rotate(Shape shape, Rows heads, const float* cos, const float* sin, Rows out) {
    const size half = shape.width / 2;
#pragma omp parallel for schedule(static) num_threads(shape.threads)
    for (size i = 0; i < shape.outer; i++)
        for (size j = 0; j < shape.inner; j++)
            for (size d = 0; d < half; d += W) {
                const vec first = heads.get(i, j, d), second = heads.get(i, j, d + half);
                const vec c = load(cos + i * half + d), s = load(sin + i * half + d);
                out.put(i, j, d, first * c - second * s);
                out.put(i, j, d + half, second * c + first * s);
            }
}

// SiLU, or GELU as tanh approximates it, and the slope there.
template <bool gelu>
static inline void activate(vec x, vec& acted, vec& slope) {
    const float root = 0.7978845608028654f, cube = 0.044715f;
    const vec y = gelu ? -2 * root * (x + cube * x * x * x) : -x;
    const vec share = 1 / (1 + exponential(y < 88.0f ? y : all(88.0f)));  // sigmoid; (1 + tanh) / 2
    acted = x * share;
    const vec inside = gelu ? 2 * root * (1 + 3 * cube * x * x) : all(1);
    slope = share + acted * (1 - share) * inside;
}

template <bool gelu>
static void gate_forward(Shape shape, Rows gate, Rows up, Rows out) {
#pragma omp parallel for schedule(static) num_threads(shape.threads)
    for (size i = 0; i < shape.outer; i++)
        for (size d = 0; d < shape.width; d += W) {
            vec acted, slope;
            activate<gelu>(gate.get(i, 0, d), acted, slope);
            out.put(i, 0, d, acted * up.get(i, 0, d));
        }
}
extern "C" void gated(int gelu, Shape shape, Rows gate, Rows up, Rows out) {
    gelu ? gate_forward<true>(shape, gate, up, out) : gate_forward<false>(shape, gate, up, out);
}

template <bool gelu>
static void gate_backward(Shape shape, Rows grad, Rows gate, Rows up, Rows again) {
#pragma omp parallel for schedule(static) num_threads(shape.threads)
    for (size i = 0; i < shape.outer; i++)
        for (size d = 0; d < shape.width; d += W) {
            const vec g = grad.get(i, 0, d), u = up.get(i, 0, d);
            vec acted, slope;
            activate<gelu>(gate.get(i, 0, d), acted, slope);
            if (again.at) again.put(i, 0, d, acted * u);
            gate.put(i, 0, d, g * u * slope);
            up.put(i, 0, d, g * acted);
        }
}
// Gradients in the places of gate and up; act(gate) * up `again`, if its `at` is not null.
extern "C" void gated_backward(int gelu, Shape shape, Rows grad, Rows gate, Rows up, Rows again) {
    gelu ? gate_backward<true>(shape, grad, gate, up, again) : gate_backward<false>(shape, grad, gate, up, again);
}

// Logits [outer, width] into the gradient of their weighted loss; losses [outer], and whether the target was the most
// likely (the first of such).
extern "C" void cross_entropy(Shape shape, float* logits, const int64_t* targets, const float* weights, float smoothing,
                              float* losses, uint8_t* right) {
#pragma omp parallel for schedule(static) num_threads(shape.threads)
    for (size i = 0; i < shape.outer; i++) {
        float* row = logits + i * shape.width;
        const float aimed = row[targets[i]], weight = weights[i], even = smoothing / shape.width;
        vec best = load(row), mean{}, total{};
        for (size d = 0; d < shape.width; d += W) {
            best = larger(best, load(row + d));
            if (smoothing) mean += load(row + d);
        }
        const float top = largest(best);
        right[i] = aimed == top && std::find(row, row + targets[i], top) == row + targets[i];
        for (size d = 0; d < shape.width; d += W) {
            const vec share = exponential(load(row + d) - top);
            store(row + d, share);
            total += share;
        }
        const float whole = sum(total), aim = (1 - smoothing) * aimed + even * sum(mean), scale = weight / whole;
        losses[i] = (std::log(whole) + top - aim) * weight;
        for (size d = 0; d < shape.width; d += W) store(row + d, load(row + d) * scale - weight * even);
        row[targets[i]] += weight * (smoothing - 1);
    }
}
