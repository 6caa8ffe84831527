// Attention over a tree, forward and backward, a tile of queries and a tile of keys at a time, without masks or merges
// (tiles.py plans). kernels.py calls this; attention.py in torch is what runs where it cannot, and what tests hold it to.
//
// Products of a tile are of float32 (`Floats`) or of float16 numbers with float32 totals (`Halves`); all else is float32.
// No sum depends on which thread is first, only on how many there are, so results are repeatable to the bit.
// Does not know: torch, autograd, models.

#include "vectors.h"

constexpr int QUERIES = LUTHIER_QUERIES, KEYS = LUTHIER_KEYS;  // of a tile: tiles.py's, a multiple of two vectors for KEYS

// ---- products of small matrices ----------------------------------------------------------------------------------

// A kind of products: c [rows, width] (+)= scale * a [rows, inner] b [inner, width], where a's element (r, k) is at
// r * a_row + k * a_step and width is a multiple of STEP. Its factors are kept as `left` and `right`; before they are,
// numbers are brought below a room by a power of two.
struct Floats {
    using left = float;
    using right = float;
    static constexpr bool halves = false;
    static constexpr int STEP = W, ACROSS = W == 8 ? 2 : 4, DOWN = 6;  // DOWN x ACROSS sums fill the registers

    static void keep_left(left* at, vec value) { store(at, value); }
    static void keep_right(right* at, vec value) { store(at, value); }

    template <int down, int across>
    static inline void block(int inner, const left* a, size a_row, size a_step, const right* b, size b_row, float,
                             float* c, size c_row, bool add) {
        vec sums[down][across];
        for (int r = 0; r < down; r++)
            for (int v = 0; v < across; v++) sums[r][v] = add ? load(c + r * c_row + v * W) : vec{};
        for (int k = 0; k < inner; k++) {
            vec inputs[across];
            for (int v = 0; v < across; v++) inputs[v] = load(b + k * b_row + v * W);
            for (int r = 0; r < down; r++) {
                const vec factor = all(a[r * a_row + k * a_step]);
                for (int v = 0; v < across; v++) sums[r][v] += factor * inputs[v];
            }
        }
        for (int r = 0; r < down; r++)
            for (int v = 0; v < across; v++) store(c + r * c_row + v * W, sums[r][v]);
    }
};

#if defined(__AVX512FP16__)
struct Halves {
    using left = uint32_t;  // a half, twice
    using right = half;
    static constexpr bool halves = true;
    static constexpr int STEP = LANES, ACROSS = 2, DOWN = 12;
    static constexpr int SUMMED = CHUNK / 2;  // scores stand in an exponent, so their sums are kept shorter

    static void keep_left(left* at, vec value) { *(bits*)at = twice(value); }
    static void keep_right(right* at, vec value) { *(half_vec*)at = halved(value); }

    template <int down, int across>
    static inline void block(int inner, const left* a, size a_row, size a_step, const right* b, size b_row, float scale,
                             float* c, size c_row, bool add) {
        for (int begin = 0; begin < inner; begin += SUMMED, add = true) {
            const int end = std::min(inner, begin + SUMMED);
            half_lanes sums[down][across];
            for (int r = 0; r < down; r++)
                for (int v = 0; v < across; v++) sums[r][v] = half_lanes{};
            for (int k = begin; k < end; k++) {
                half_lanes inputs[across];
                for (int v = 0; v < across; v++) inputs[v] = *(const half_lanes*)(b + k * b_row + v * LANES);
#pragma GCC unroll 12
                for (int r = 0; r < down; r++) {
                    const half_lanes factor = (half_lanes)(bits{} + a[r * a_row + k * a_step]);
                    for (int v = 0; v < across; v++) sums[r][v] += factor * inputs[v];
                }
            }
            for (int r = 0; r < down; r++)
                for (int v = 0; v < across; v++)
                    for (int part = 0; part < 2; part++) {
                        float* into = c + r * c_row + v * LANES + part * W;
                        const vec total = part_of(sums[r][v], part) * scale;
                        store(into, add ? load(into) + total : total);
                    }
        }
    }
};
#endif

template <class Kind, int across>
static void columns(int rows, int inner, const typename Kind::left* a, size a_row, size a_step,
                    const typename Kind::right* b, size b_row, float scale, float* c, size c_row, bool add) {
    constexpr int down = Kind::DOWN, half = down / 2;
    for (; rows >= down; rows -= down, a += down * a_row, c += down * c_row)
        Kind::template block<down, across>(inner, a, a_row, a_step, b, b_row, scale, c, c_row, add);
    for (; rows >= half; rows -= half, a += half * a_row, c += half * c_row)
        Kind::template block<half, across>(inner, a, a_row, a_step, b, b_row, scale, c, c_row, add);
    for (; rows >= 2; rows -= 2, a += 2 * a_row, c += 2 * c_row)
        Kind::template block<2, across>(inner, a, a_row, a_step, b, b_row, scale, c, c_row, add);
    if (rows) Kind::template block<1, across>(inner, a, a_row, a_step, b, b_row, scale, c, c_row, add);
}

template <class Kind>
static void product(int rows, int inner, int width, const typename Kind::left* a, size a_row, size a_step,
                    const typename Kind::right* b, size b_row, float scale, float* c, size c_row, bool add) {
    constexpr int most = Kind::ACROSS * Kind::STEP;
    for (; width >= most; width -= most, b += most, c += most)
        columns<Kind, Kind::ACROSS>(rows, inner, a, a_row, a_step, b, b_row, scale, c, c_row, add);
    for (; width; width -= Kind::STEP, b += Kind::STEP, c += Kind::STEP)
        columns<Kind, 1>(rows, inner, a, a_row, a_step, b, b_row, scale, c, c_row, add);
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
    int32_t threads, halves;

    size tile_of(size key_head, size tile) const { return key_head * key_tiles + tile; }
    size key_head(size head) const { return head / (heads / key_heads); }
};

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

// All tiles of keys or of values, as products take them: `turned` [D, KEYS], zeros to the right of the last, and `rows`
// [KEYS, D], or where each would begin in memory. `back` undoes the scale of each.
template <class Kind>
struct Side {
    typename Kind::right *turned, *rows;
    float* back;
    size panel;

    // In memory for all key heads and tiles; moves `room` to behind it.
    Side(const Plan& plan, float*& room) : panel(plan.width * KEYS) {
        const size count = plan.key_heads * plan.key_tiles;
        turned = (typename Kind::right*)room;
        rows = turned + panel * count;
        back = room + panel * count;
        room = back + (count + W - 1) / W * W;
    }

    void fill(const Plan& plan, Heads from, float most) {
#pragma omp parallel for collapse(2) schedule(static) num_threads(plan.threads)
        for (size h = 0; h < plan.key_heads; h++)
            for (size t = 0; t < plan.key_tiles; t++) {
                const KeyTile& keys = plan.keys[t];
                const int width = (int)plan.width;
                typename Kind::right* into = turned + plan.tile_of(h, t) * panel;
                float by = 1;
                back[plan.tile_of(h, t)] = 1;
                if constexpr (Kind::halves) {
                    vec best{};
                    for (int j = 0; j < keys.count; j++)
                        for (int d = 0; d < width; d += W) best = larger(best, magnitude(load(from(h, keys.start + j) + d)));
                    const Scale scale(largest(best), most);
                    by = scale.by;
                    back[plan.tile_of(h, t)] = scale.back;
                }
                for (int d = 0; d < width; d++) std::fill(into + d * KEYS + keys.count, into + (d + 1) * KEYS, 0);
                for (int j = 0; j < keys.count; j++) {
                    const float* row = from(h, keys.start + j);
                    for (int d = 0; d < width; d++) into[d * KEYS + j] = row[d] * by;
                    if constexpr (Kind::halves) {
                        typename Kind::right* line = rows + plan.tile_of(h, t) * panel + j * width;
                        for (int d = 0; d < width; d += W) Kind::keep_right(line + d, load(row + d) * by);
                    }
                }
            }
    }

    // The first row of a tile, and how far the next one is.
    const typename Kind::right* row_of(const Plan& plan, Heads from, size key_head, size tile, size& step) const {
        if constexpr (Kind::halves) {
            step = plan.width;
            return rows + plan.tile_of(key_head, tile) * panel;
        } else {
            step = from.token;
            return from(key_head, plan.keys[tile].start);
        }
    }
};

// A tile's queries (times the scale of scores), or gradients of their outputs, as products take them, in one scale.
template <class Kind>
struct Asked {
    const Scratch memory, beside;
    typename Kind::left* left;
    typename Kind::right* right;
    float by = 1, back = 1;

    explicit Asked(size width) : memory(QUERIES * width), beside(Kind::halves ? QUERIES * width : 0) {
        left = (typename Kind::left*)(float*)memory;
        right = Kind::halves ? (typename Kind::right*)(float*)beside : (typename Kind::right*)left;
    }
    void fill(const Plan& plan, const QueryTile& queries, Heads from, size head, float times, float most) {
        const int width = (int)plan.width;
        if constexpr (Kind::halves) {
            vec best{};
            for (int r = 0; r < queries.count; r++)
                for (int d = 0; d < width; d += W) best = larger(best, magnitude(load(from(head, queries.start + r) + d)));
            const Scale scale(largest(best) * times, most);
            by = scale.by;
            back = scale.back;
        }
        for (int r = 0; r < queries.count; r++) {
            const float* row = from(head, queries.start + r);
            for (int d = 0; d < width; d += W) {
                const vec value = load(row + d) * (times * by);
                Kind::keep_left(left + r * width + d, value);
                if constexpr (Kind::halves) Kind::keep_right(right + r * width + d, value);
            }
        }
    }
};

// What numbers are brought below, so that no sum of halves comes near their largest, 65,504: scores and the slopes'
// products are below 64 * 2 * 16 and 64 * 1 * 16; a slope, share * (1 - share) of a difference of two of those, below
// 512, and 60 of them times a query below 61,440, 64 times a key below 32,768 as a query's shares add up to 1.
constexpr float QUERY = 2, KEY = 16, VALUE = 16, GRADIENT = 1;

static inline int padded(int count, int step) { return (count + step - 1) / step * step; }

// Scores [queries, KEYS] of a visit, in the scale of its tiles; how many of the tile's keys are seen.
template <class Kind>
static inline int score(const Plan& plan, const QueryTile& queries, const Visit& visit, size key_head,
                        const Asked<Kind>& asked, const Side<Kind>& side, float* scores) {
    const KeyTile& keys = plan.keys[visit.tile];
    const int width = (int)plan.width, seen = reach(queries, keys, visit.own), wide = padded(seen, Kind::STEP);
    product<Kind>(queries.count, width, wide, asked.left, width, 1, side.turned + plan.tile_of(key_head, visit.tile) * side.panel,
                  KEYS, 1, scores, KEYS, false);
    hide(plan, queries, keys, visit.own, wide, scores);
    return seen;
}

template <class Kind>
static void forward(const Plan& plan, Heads query, Heads key, Heads value, Heads out, float* lse, float* room) {
    const int width = (int)plan.width;
    Side<Kind> keys_side(plan, room), values_side(plan, room);
    keys_side.fill(plan, key, KEY);
    if (Kind::halves) values_side.fill(plan, value, VALUE);
#pragma omp parallel num_threads(plan.threads)
    {
        const Scratch scores(QUERIES * KEYS), mixed(QUERIES * width);
        typename Kind::left* shares = (typename Kind::left*)(float*)scores;
        Asked<Kind> asked(width);
        float top[QUERIES];
        vec total[QUERIES];
#pragma omp for schedule(dynamic)
        for (size task = 0; task < plan.heads * plan.query_tiles; task++) {
            const size head = task / plan.query_tiles, key_head = plan.key_head(head);
            const QueryTile& queries = plan.queries[plan.query_tiles - 1 - task % plan.query_tiles];  // longest first
            asked.fill(plan, queries, query, head, plan.scale, QUERY);
            for (int r = 0; r < queries.count; r++) {
                for (int d = 0; d < width; d += W) store(mixed + r * width + d, vec{});
                top[r] = NEVER;
                total[r] = vec{};
            }
            for (int at = queries.first; at < queries.last; at++) {
                const Visit& visit = plan.visits[at];
                const int seen = score(plan, queries, visit, key_head, asked, keys_side, scores);
                const int wide = padded(seen, Kind::STEP);
                const float undo = asked.back * keys_side.back[plan.tile_of(key_head, visit.tile)];
                for (int r = 0; r < queries.count; r++) {
                    float *row = scores + r * KEYS, *sums = mixed + r * width;
                    vec best = load(row);
                    for (int j = W; j < wide; j += W) best = larger(best, load(row + j));
                    if (any_above(best * undo, top[r])) {
                        const float now = largest(best) * undo, less = std::exp(top[r] - now);
                        total[r] *= less;
                        for (int d = 0; d < width; d += W) store(sums + d, load(sums + d) * less);
                        top[r] = now;
                    }
                    if (top[r] == NEVER) {  // a window hides all so far
                        std::fill(row, row + wide, 0.0f);
                        continue;
                    }
                    for (int j = 0; j < wide; j += W) {
                        const vec share = exponential(load(row + j) * undo - top[r]);
                        Kind::keep_left(shares + r * KEYS + j, share);
                        total[r] += share;
                    }
                }
                size step;
                const auto* rows = values_side.row_of(plan, value, key_head, visit.tile, step);
                const float back = Kind::halves ? values_side.back[plan.tile_of(key_head, visit.tile)] : 1;
                product<Kind>(queries.count, seen, width, shares, KEYS, 1, rows, step, back, mixed, width, true);
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

template <class Kind>
static void backward(const Plan& plan, Heads query, Heads key, Heads value, Heads output, Heads grad, const float* lse,
                     Heads into_query, Heads into_key, Heads into_value, float* room, float* sums) {
    const int width = (int)plan.width;
    const size side = plan.key_heads * plan.key_tokens * plan.width;
    Side<Kind> keys_side(plan, room), values_side(plan, room);
    keys_side.fill(plan, key, KEY);
    values_side.fill(plan, value, VALUE);
    std::vector<size> costs(plan.query_tiles);  // of one head's tiles, in pairs of a query and a key
    size cost = 0;
    for (size t = 0; t < plan.query_tiles; t++) {
        const QueryTile& queries = plan.queries[t];
        costs[t] = 0;
        for (int at = queries.first; at < queries.last; at++)
            costs[t] += queries.count * padded(reach(queries, plan.keys[plan.visits[at].tile], plan.visits[at].own), Kind::STEP);
        cost += costs[t];
    }
#pragma omp parallel for schedule(static, 1) num_threads(plan.threads)
    for (int thread = 0; thread < plan.threads; thread++) {
        float *into_keys = sums + 2 * side * thread, *into_values = into_keys + side;
        std::fill(into_keys, into_keys + 2 * side, 0.0f);
        const Scratch scores(QUERIES * KEYS), products(QUERIES * KEYS), back(QUERIES * width);
        typename Kind::left *shares = (typename Kind::left*)(float*)scores, *slopes = (typename Kind::left*)(float*)products;
        Asked<Kind> asked(width), grads(width);
        float inner[QUERIES];
        const size from = cost * plan.heads * thread / plan.threads, to = cost * plan.heads * (thread + 1) / plan.threads;
        size done = 0;
        for (size task = 0; task < plan.heads * plan.query_tiles; task++) {
            const size head = task / plan.query_tiles, key_head = plan.key_head(head);
            const QueryTile& queries = plan.queries[task % plan.query_tiles];
            const size middle = done + costs[task % plan.query_tiles] / 2;
            done += costs[task % plan.query_tiles];
            if (middle < from || middle >= to) continue;
            asked.fill(plan, queries, query, head, plan.scale, QUERY);
            grads.fill(plan, queries, grad, head, 1, GRADIENT);
            for (int r = 0; r < queries.count; r++) {
                const float *g = grad(head, queries.start + r), *o = output(head, queries.start + r);
                vec dot{};
                for (int d = 0; d < width; d += W) {
                    store(back + r * width + d, vec{});
                    dot += load(g + d) * load(o + d);
                }
                inner[r] = sum(dot) * grads.by;
            }
            for (int at = queries.first; at < queries.last; at++) {
                const Visit& visit = plan.visits[at];
                const KeyTile& keys = plan.keys[visit.tile];
                const size tile = plan.tile_of(key_head, visit.tile);
                const int seen = score(plan, queries, visit, key_head, asked, keys_side, scores);
                const int wide = padded(seen, Kind::STEP);
                const float undo = asked.back * keys_side.back[tile], value_back = values_side.back[tile];
                product<Kind>(queries.count, width, wide, grads.left, width, 1, values_side.turned + tile * values_side.panel,
                              KEYS, 1, products, KEYS, false);
                for (int r = 0; r < queries.count; r++) {  // slopes stay in the scale of gradients and values
                    const float whole = lse[head * plan.query_tokens + queries.start + r], mean = inner[r] / value_back;
                    for (int j = r * KEYS; j < r * KEYS + wide; j += W) {
                        const vec share = exponential(load(scores + j) * undo - whole);
                        Kind::keep_left(shares + j, share);
                        Kind::keep_left(slopes + j, share * (load(products + j) - mean));
                    }
                }
                const size place = (key_head * plan.key_tokens + keys.start) * width;
                product<Kind>(seen, queries.count, width, slopes, 1, KEYS, asked.right, width,
                              grads.back * value_back * asked.back, into_keys + place, width, true);
                product<Kind>(seen, queries.count, width, shares, 1, KEYS, grads.right, width, grads.back,
                              into_values + place, width, true);
                size step;
                const auto* rows = keys_side.row_of(plan, key, key_head, visit.tile, step);
                product<Kind>(queries.count, seen, width, slopes, KEYS, 1, rows, step,
                              grads.back * value_back * keys_side.back[tile], back, width, true);
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

// out and lse [H, T] (log-sum-exp of the scores); room: numbers, for keys and values as products take them, twice
// [key heads, tiles, D * KEYS + 1], each rounded up to a cache line.
extern "C" void attention(const Plan* plan, Heads query, Heads key, Heads value, Heads out, float* lse, float* room) {
#if defined(__AVX512FP16__)
    if (plan->halves) return forward<Halves>(*plan, query, key, value, out, lse, room);
#endif
    forward<Floats>(*plan, query, key, value, out, lse, room);
}

// Gradients from that of the output (Dao et al., 2022, FlashAttention, algorithm 4, queries outside). room as above;
// sums: for each thread's gradients of keys and values, [threads, 2, key heads, keys, D].
extern "C" void attention_backward(const Plan* plan, Heads query, Heads key, Heads value, Heads output, Heads grad,
                                   const float* lse, Heads into_query, Heads into_key, Heads into_value, float* room,
                                   float* sums) {
#if defined(__AVX512FP16__)
    if (plan->halves)
        return backward<Halves>(*plan, query, key, value, output, grad, lse, into_query, into_key, into_value, room, sums);
#endif
    backward<Floats>(*plan, query, key, value, output, grad, lse, into_query, into_key, into_value, room, sums);
}
