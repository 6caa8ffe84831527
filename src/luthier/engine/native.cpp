// What lies between a layer's matrix products, each as one pass over memory: norms, rotation, gates, and the loss.
// native.py compiles this on the machine it runs on, kernels.py calls it; the same in torch (pointwise.py, loss.py) is
// what runs where it cannot, and what the tests hold it to. Arithmetic is float32, and each row's sums are one thread's.
// Does not know: torch, autograd, models.

#include "vectors.h"

// Rows [outer, inner, width] of float32, or of bfloat16 if `half`, strides in numbers.
struct Rows {
    void* at;
    size outer, inner;
    int32_t half, _;

    vec get(size i, size j, size d) const {
        const size place = i * outer + j * inner + d;
        if (!half) return load((const float*)at + place);
        return (vec)(__builtin_convertvector(*(const shorts*)((const uint16_t*)at + place), bits) << 16);
    }
    void put(size i, size j, size d, vec value) const {
        const size place = i * outer + j * inner + d;
        if (!half) return store((float*)at + place, value);
        const bits raw = (bits)value;  // rounded to the nearest, ties to even; what is not a number stays none
        const bits rounded = (raw + 0x7fff + ((raw >> 16) & 1)) >> 16;
        *(shorts*)((uint16_t*)at + place) = __builtin_convertvector(value == value ? rounded : (raw >> 16 | 64), shorts);
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
static void gate_forward(Shape shape, Rows gate, Rows up, Rows out, Rows kept_gate, Rows kept_up) {
#pragma omp parallel for schedule(static) num_threads(shape.threads)
    for (size i = 0; i < shape.outer; i++)
        for (size d = 0; d < shape.width; d += W) {
            const vec g = gate.get(i, 0, d), u = up.get(i, 0, d);
            vec acted, slope;
            activate<gelu>(g, acted, slope);
            out.put(i, 0, d, acted * u);
            if (!kept_gate.at) continue;
            kept_gate.put(i, 0, d, g);
            kept_up.put(i, 0, d, u);
        }
}
// Also copies of gate and up, rounded if they are bfloat16, unless their `at` is null.
extern "C" void gated(int gelu, Shape shape, Rows gate, Rows up, Rows out, Rows kept_gate, Rows kept_up) {
    gelu ? gate_forward<true>(shape, gate, up, out, kept_gate, kept_up)
         : gate_forward<false>(shape, gate, up, out, kept_gate, kept_up);
}

template <bool gelu>
static void gate_backward(Shape shape, Rows grad, Rows gate, Rows up, Rows into_gate, Rows into_up, Rows again) {
#pragma omp parallel for schedule(static) num_threads(shape.threads)
    for (size i = 0; i < shape.outer; i++)
        for (size d = 0; d < shape.width; d += W) {
            const vec g = grad.get(i, 0, d), u = up.get(i, 0, d);
            vec acted, slope;
            activate<gelu>(gate.get(i, 0, d), acted, slope);
            if (again.at) again.put(i, 0, d, acted * u);
            into_gate.put(i, 0, d, g * u * slope);
            into_up.put(i, 0, d, g * acted);
        }
}
// Gradients of gate and up, which may take their places; act(gate) * up `again`, if its `at` is not null.
extern "C" void gated_backward(int gelu, Shape shape, Rows grad, Rows gate, Rows up, Rows into_gate, Rows into_up,
                               Rows again) {
    gelu ? gate_backward<true>(shape, grad, gate, up, into_gate, into_up, again)
         : gate_backward<false>(shape, grad, gate, up, into_gate, into_up, again);
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
