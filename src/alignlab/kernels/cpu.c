/* Loops that PyTorch takes several passes over memory for, in one: float32, rows of contiguous numbers.
 *
 * Built by the package itself where there is a C compiler; every function has its PyTorch twin, which says the same up
 * to rounding. Rows are given as [first, last), so that several threads can share them.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

/* For loops of a few rounds, known when it is compiled, that are to be written out. */
#define EACH _Pragma("GCC unroll 8") for

static inline vec load(const float *from) { return *(const loose *)from; }
static inline void store(float *to, vec value) { *(loose *)to = value; }
static inline vec all(float value) { return value - (vec){0}; }

static inline float total(vec v) {
    typedef float half __attribute__((vector_size(2 * LANES)));
    typedef float quarter __attribute__((vector_size(LANES)));
    union { vec whole; half parts[2]; } a = {.whole = v};
    union { half whole; quarter parts[2]; } b = {.whole = a.parts[0] + a.parts[1]};
    quarter c = b.parts[0] + b.parts[1];
    return (c[0] + c[1]) + (c[2] + c[3]);
}

/* The first `count` numbers, and `fill` in the other lanes. */
static inline vec load_part(const float *from, long count, float fill) {
    float lanes[LANES];
    for (int i = 0; i < LANES; i++) lanes[i] = i < count ? from[i] : fill;
    return load(lanes);
}

static inline void store_part(float *to, vec value, long count) {
    float lanes[LANES];
    store(lanes, value);
    memcpy(to, lanes, 4 * count);
}

/* e^x to 2 units in the last place: 2^n e^r with |r| <= ln 2 / 2, e^r by a polynomial. */
static inline vec exponential(vec x) {
    const ivec sign = (ivec)x & (ivec)all(-0.0f);
    const vec low = all(-87.0f), high = all(88.0f);
    ivec below = x < low, above = x > high;
    x = (vec)(((ivec)x & ~below & ~above) | ((ivec)low & below) | ((ivec)high & above));
    ivec n = __builtin_convertvector(x * 1.44269504088896341f + (vec)((ivec)all(0.5f) | sign), ivec);
    vec whole = __builtin_convertvector(n, vec);
    vec r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    vec y = all(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    return y * (vec)((n + 127) << 23);
}

/* The largest of some numbers. */
static inline float largest(const float *numbers, long count) {
    vec top = all(-INFINITY);
    long i = 0;
    for (; i + LANES <= count; i += LANES) {
        vec v = load(numbers + i);
        ivec larger = v > top;
        top = (vec)(((ivec)v & larger) | ((ivec)top & ~larger));
    }
    float found = -INFINITY;
    for (int k = 0; k < LANES; k++) found = top[k] > found ? top[k] : found;
    for (; i < count; i++) found = numbers[i] > found ? numbers[i] : found;
    return found;
}

/* cap * tanh(number / cap), in place. */
static void capped(float *numbers, long count, float cap) {
    for (long i = 0; i < count; i += LANES) {
        const long here = count - i;
        vec v = here < LANES ? load_part(numbers + i, here, 0.0f) : load(numbers + i);
        v = cap * (1.0f - 2.0f / (exponential(v * (2.0f / cap)) + 1.0f));
        if (here < LANES) store_part(numbers + i, v, here);
        else store(numbers + i, v);
    }
}

/* ---- norms ------------------------------------------------------------------------------------------------------ */

/* y = x * factor * (offset + weight) [+ residual], factor = 1 / sqrt(mean x^2 + eps); rows of `size`. */
void norm_forward(const float *x, const float *weight, const float *residual, float *y, float *factors, long first,
                  long last, long size, float eps, float offset) {
    for (long row = first; row < last; row++) {
        const float *in = x + row * size, *add = residual ? residual + row * size : 0;
        float *out = y + row * size;
        vec square = {0};
        long i = 0;
        for (; i + LANES <= size; i += LANES) { vec v = load(in + i); square += v * v; }
        float sum = total(square);
        for (; i < size; i++) sum += in[i] * in[i];
        const float factor = 1.0f / sqrtf(sum / size + eps);
        if (factors) factors[row] = factor;
        for (i = 0; i + LANES <= size; i += LANES) {
            vec v = load(in + i) * factor * (load(weight + i) + offset);
            store(out + i, add ? load(add + i) + v : v);
        }
        for (; i < size; i++) out[i] = (add ? add[i] : 0.0f) + in[i] * factor * (weight[i] + offset);
    }
}

/* The gradients by x and, unless null, by the weight: added up in double precision every 16 rows. */
void norm_backward(const float *grad, const float *x, const float *weight, const float *factors, float *grad_x,
                   double *grad_weight, long first, long last, long size, float offset) {
    float *sums = grad_weight ? calloc(size, sizeof(float)) : 0;
    for (long row = first; row < last; row++) {
        const float *g = grad + row * size, *in = x + row * size, factor = factors[row];
        float *out = grad_x + row * size;
        vec along = {0};
        long i = 0;
        for (; i + LANES <= size; i += LANES) along += load(g + i) * (load(weight + i) + offset) * load(in + i);
        float sum = total(along);
        for (; i < size; i++) sum += g[i] * (weight[i] + offset) * in[i];
        const float pull = sum * factor * factor / size;
        for (i = 0; i + LANES <= size; i += LANES) {
            vec v = load(in + i), down = load(g + i);
            if (sums) store(sums + i, load(sums + i) + down * v * factor);
            store(out + i, (down * (load(weight + i) + offset) - v * pull) * factor);
        }
        for (; i < size; i++) {
            if (sums) sums[i] += g[i] * in[i] * factor;
            out[i] = (g[i] * (weight[i] + offset) - in[i] * pull) * factor;
        }
        if (sums && ((row - first) % 16 == 15 || row + 1 == last))
            for (i = 0; i < size; i++) { grad_weight[i] += sums[i]; sums[i] = 0.0f; }
    }
    free(sums);
}

/* ---- gates ------------------------------------------------------------------------------------------------------ */

/* y = gate * s * up with s = 1 / (1 + e^-(a gate + b gate^3)): SiLU where a = 1 and b = 0, GELU by tanh otherwise. */
static inline vec sigmoid_of(vec gate, float a, float b) { return 1.0f / (1.0f + exponential(-(gate * (a + b * gate * gate)))); }

void gate_forward(const float *gate, const float *up, float *y, long first, long last, float a, float b) {
    for (long i = first; i < last; i += LANES) {
        const long count = last - i;
        if (count >= LANES) {
            vec g = load(gate + i);
            store(y + i, g * sigmoid_of(g, a, b) * load(up + i));
        } else {
            vec g = load_part(gate + i, count, 0.0f);
            store_part(y + i, g * sigmoid_of(g, a, b) * load_part(up + i, count, 0.0f), count);
        }
    }
}

void gate_backward(const float *grad, const float *gate, const float *up, float *grad_gate, float *grad_up, long first,
                   long last, float a, float b) {
    for (long i = first; i < last; i += LANES) {
        const long count = last - i;
        const int part = count < LANES;
        vec d = part ? load_part(grad + i, count, 0.0f) : load(grad + i);
        vec g = part ? load_part(gate + i, count, 0.0f) : load(gate + i);
        vec u = part ? load_part(up + i, count, 0.0f) : load(up + i);
        vec s = sigmoid_of(g, a, b);
        vec by_gate = d * u * (s + g * s * (1.0f - s) * (a + 3.0f * b * g * g)), by_up = d * g * s;
        if (part) { store_part(grad_gate + i, by_gate, count); store_part(grad_up + i, by_up, count); }
        else { store(grad_gate + i, by_gate); store(grad_up + i, by_up); }
    }
}

/* ---- rotary embeddings ------------------------------------------------------------------------------------------ */

/* y_j = x_j cos_j + sign x_(j + size/2) sin_j: x (rows, heads, size), cos and sin (rows, size). */
void rotate(const float *x, const float *cos, const float *sin, float *y, long first, long last, long heads, long size,
            float sign) {
    const long half = size / 2;
    for (long row = first; row < last; row++)
        for (long head = 0; head < heads; head++) {
            const float *in = x + (row * heads + head) * size, *c = cos + row * size, *s = sin + row * size;
            float *out = y + (row * heads + head) * size;
            for (long side = 0; side < 2; side++) {
                const long at = side * half, other = half - at;
                long i = 0;
                for (; i + LANES <= half; i += LANES)
                    store(out + at + i, load(in + at + i) * load(c + at + i)
                          + load(in + other + i) * load(s + at + i) * sign);
                for (; i < half; i++) out[at + i] = in[at + i] * c[at + i] + sign * in[other + i] * s[at + i];
            }
        }
}

/* ---- products of a few rows ------------------------------------------------------------------------------------- */

#define AT_ONCE 4 /* rows of the weight that share what is loaded of x */

/* While some rows of the weight are used, the next ones are asked for in the order in which they lie. */
#define PRODUCT(ROWS)                                                                                                   \
    static inline void product_##ROWS(const float *x, const float *weight, float *y, long at, long inner, long outer) { \
        const float *used = weight + at * inner;                                                                        \
        vec sums[AT_ONCE][ROWS];                                                                                        \
        EACH (int o = 0; o < AT_ONCE; o++)                                                                              \
            EACH (int r = 0; r < ROWS; r++) sums[o][r] = (vec){0};                                                      \
        for (long i = 0; i + LANES <= inner; i += LANES) {                                                              \
            vec w[AT_ONCE];                                                                                             \
            EACH (int o = 0; o < AT_ONCE; o++) {                                                                        \
                w[o] = load(used + o * inner + i);                                                                      \
                __builtin_prefetch(used + AT_ONCE * (inner + i) + o * LANES);                                           \
            }                                                                                                           \
            EACH (int r = 0; r < ROWS; r++) {                                                                           \
                vec given = load(x + r * inner + i);                                                                    \
                EACH (int o = 0; o < AT_ONCE; o++) sums[o][r] += w[o] * given;                                          \
            }                                                                                                           \
        }                                                                                                               \
        EACH (int o = 0; o < AT_ONCE; o++)                                                                              \
            EACH (int r = 0; r < ROWS; r++) {                                                                           \
                float sum = total(sums[o][r]);                                                                          \
                for (long i = inner - inner % LANES; i < inner; i++) sum += used[o * inner + i] * x[r * inner + i];     \
                y[r * outer + at + o] = sum;                                                                            \
            }                                                                                                           \
    }
PRODUCT(1) PRODUCT(2) PRODUCT(3) PRODUCT(4) PRODUCT(5) PRODUCT(6)

/* y (rows, outer) = x (rows, inner) @ weight (outer, inner)^T, reading the weight once; for its rows [first, last),
 * both multiples of AT_ONCE. */
void product(const float *x, const float *weight, float *y, long first, long last, long rows, long inner, long outer) {
    for (long at = first; at < last; at += AT_ONCE)
        for (long r = 0; r < rows;) {
            const float *some = x + r * inner;
            float *out = y + r * outer;
            const long left = rows - r, take = left > 6 && left < 12 ? (left + 1) / 2 : left < 6 ? left : 6;
            switch (take) {
            case 1: product_1(some, weight, out, at, inner, outer); break;
            case 2: product_2(some, weight, out, at, inner, outer); break;
            case 3: product_3(some, weight, out, at, inner, outer); break;
            case 4: product_4(some, weight, out, at, inner, outer); break;
            case 5: product_5(some, weight, out, at, inner, outer); break;
            default: product_6(some, weight, out, at, inner, outer); break;
            }
            r += take;
        }
}

/* ---- attention of one token a row ------------------------------------------------------------------------------- */

/* The totals of four vectors. */
typedef float quad __attribute__((vector_size(16)));
static inline quad totals(const vec v[4]) {
    typedef float half __attribute__((vector_size(2 * LANES)));
    typedef int32_t order __attribute__((vector_size(16)));
    quad q[4];
    for (int i = 0; i < 4; i++) {
        union { vec whole; half parts[2]; } a = {.whole = v[i]};
        union { half whole; quad parts[2]; } b = {.whole = a.parts[0] + a.parts[1]};
        q[i] = b.parts[0] + b.parts[1];
    }
    const order even = {0, 4, 2, 6}, odd = {1, 5, 3, 7}, low = {0, 1, 4, 5}, high = {2, 3, 6, 7};
    quad first = __builtin_shuffle(q[0], q[1], even) + __builtin_shuffle(q[0], q[1], odd);
    quad second = __builtin_shuffle(q[2], q[3], even) + __builtin_shuffle(q[2], q[3], odd);
    return __builtin_shuffle(first, second, low) + __builtin_shuffle(first, second, high);
}

/* `queries` of one row that share their keys and values (count, size); `queries` is a constant where this is used. */
static inline __attribute__((always_inline)) void attend(const float *query, const float *keys, const float *values,
                                                         const uint8_t *mask, float *y, float *logits, long count,
                                                         long size, float scaling, float cap, const int queries) {
    const long padded = (count + LANES - 1) / LANES * LANES;
    for (long i = 0; i < count; i += 4) {
        vec sums[4][4];
        const float *rows[4]; /* the last key again where there are fewer than four: what comes of it is masked below */
        EACH (int k = 0; k < 4; k++) rows[k] = keys + (i + k < count ? i + k : count - 1) * size;
        EACH (int q = 0; q < queries; q++)
            EACH (int k = 0; k < 4; k++) sums[q][k] = (vec){0};
        long d = 0;
        for (; d + LANES <= size; d += LANES)
            EACH (int k = 0; k < 4; k++) {
                vec key = load(rows[k] + d);
                EACH (int q = 0; q < queries; q++) sums[q][k] += load(query + q * size + d) * key;
            }
        EACH (int q = 0; q < queries; q++) {
            quad found = totals(sums[q]);
            memcpy(logits + q * padded + i, &found, sizeof found);
            for (long e = d; e < size; e++)
                for (int k = 0; k < 4; k++) logits[q * padded + i + k] += query[q * size + e] * rows[k][e];
        }
    }
    for (int q = 0; q < queries; q++) {
        float *own = logits + q * padded;
        for (long i = count; i < padded; i++) own[i] = -INFINITY;
        for (long i = 0; i < padded; i += LANES) store(own + i, load(own + i) * scaling);
        if (cap > 0.0f) capped(own, count, cap);
        if (mask)
            for (long i = 0; i < count; i++)
                if (!mask[i]) own[i] = -INFINITY;
        const float top = largest(own, count);
        vec mass = {0};
        for (long i = 0; i < padded; i += LANES) {
            vec logit = load(own + i);
            vec weight = (vec)((ivec)exponential(logit - top) & (logit > -INFINITY));
            store(own + i, weight);
            mass += weight;
        }
        const float scale = 1.0f / total(mass);
        for (long i = 0; i < padded; i += LANES) store(own + i, load(own + i) * scale);
    }
    long d = 0;
    for (; d + LANES <= size; d += LANES) {
        vec sums[4];
        EACH (int q = 0; q < queries; q++) sums[q] = (vec){0};
        for (long i = 0; i < count; i++) {
            vec value = load(values + i * size + d);
            EACH (int q = 0; q < queries; q++) sums[q] += logits[q * padded + i] * value;
        }
        EACH (int q = 0; q < queries; q++) store(y + q * size + d, sums[q]);
    }
    for (; d < size; d++)
        EACH (int q = 0; q < queries; q++) {
            float sum = 0.0f;
            for (long i = 0; i < count; i++) sum += logits[q * padded + i] * values[i * size + d];
            y[q * size + d] = sum;
        }
}

/* query (rows, key_heads, shared, size), keys and values (rows, key_heads, count, size) with the given strides between
 * rows and heads, mask (rows, count) bytes with a stride between rows or null, y like query. cap 0 = none. */
void attention(const float *query, const float *keys, const float *values, const uint8_t *mask, float *y, long first,
               long last, long key_heads, long shared, long count, long size, long row_stride, long head_stride,
               long mask_stride, float scaling, float cap) {
    float *logits = malloc(4 * (count + LANES) * sizeof(float));
    for (long row = first; row < last; row++)
        for (long head = 0; head < key_heads; head++) {
            const float *k = keys + row * row_stride + head * head_stride;
            const float *v = values + row * row_stride + head * head_stride;
            const uint8_t *seen = mask ? mask + row * mask_stride : 0;
            for (long q = 0; q < shared;) {
                const long at = ((row * key_heads + head) * shared + q) * size, left = shared - q;
                const float *asked = query + at;
                if (left >= 4) attend(asked, k, v, seen, y + at, logits, count, size, scaling, cap, 4), q += 4;
                else if (left == 3) attend(asked, k, v, seen, y + at, logits, count, size, scaling, cap, 3), q += 3;
                else if (left == 2) attend(asked, k, v, seen, y + at, logits, count, size, scaling, cap, 2), q += 2;
                else attend(asked, k, v, seen, y + at, logits, count, size, scaling, cap, 1), q += 1;
            }
        }
    free(logits);
}

/* ---- drawing tokens --------------------------------------------------------------------------------------------- */

#define BLOCK 256 /* tokens that are summed together before the search looks into them */

/* The sum of e^(logit - top) over some tokens. */
static inline double mass_of(const float *logits, long count, float top) {
    vec sum = {0};
    long i = 0;
    for (; i + LANES <= count; i += LANES) sum += exponential(load(logits + i) - top);
    if (i < count) {
        vec rest = exponential(load_part(logits + i, count - i, -INFINITY) - top);
        for (long k = count - i; k < LANES; k++) rest[k] = 0.0f;
        sum += rest;
    }
    double total = 0.0;
    for (int k = 0; k < LANES; k++) total += sum[k];
    return total;
}

/* For each row of logits (rows, count), divided by `temperature` after the cap (0 = none): the first token whose
 * cumulative probability exceeds the row's uniform number, and its log-probability. `logits` are written over. */
void draw(float *logits, const double *uniforms, int64_t *tokens, float *logprobs, long first, long last, long count,
          float temperature, float cap) {
    const long blocks = (count + BLOCK - 1) / BLOCK;
    double *masses = malloc(blocks * sizeof(double));
    for (long row = first; row < last; row++) {
        float *own = logits + row * count;
        if (cap > 0.0f) capped(own, count, cap);
        if (temperature != 1.0f)
            for (long i = 0; i < count; i++) own[i] /= temperature;
        const float top = largest(own, count);
        double total = 0.0;
        for (long b = 0; b < blocks; b++) {
            const long begin = b * BLOCK, size = count - begin < BLOCK ? count - begin : BLOCK;
            masses[b] = mass_of(own + begin, size, top);
            total += masses[b];
        }
        double left = uniforms[row] * total;
        long token = -1, likely = 0; /* rounding may carry the number past the end: then the last token with a weight */
        for (long b = 0; b < blocks && token < 0; b++) {
            if (left >= masses[b]) { left -= masses[b]; continue; }
            for (long i = b * BLOCK; i < count && i < (b + 1) * BLOCK; i++) {
                const double weight = expf(own[i] - top);
                if (weight > 0.0) likely = i;
                if (left < weight) { token = i; break; }
                left -= weight;
            }
            if (token < 0) token = likely;
        }
        if (token < 0)
            for (token = count - 1; token > 0 && !(expf(own[token] - top) > 0.0f); token--) {}
        tokens[row] = token;
        logprobs[row] = own[token] - top - (float)log(total);
    }
    free(masses);
}

/* ---- a whole decoding step of a small model --------------------------------------------------------------------- */

#define PANEL (2 * LANES) /* outputs of a product that are computed side by side */
#ifdef __AVX512F__
#define BLOCK_ROWS 8
#else
#define BLOCK_ROWS 2
#endif

/* y (rows, columns of y's `stride`) = x (rows, inner) @ panel (inner, PANEL) + bias (PANEL) or nothing; `rows` is a constant. */
static inline __attribute__((always_inline)) void panel(const float *x, const float *weight, const float *bias, float *y,
                                                        long inner, long stride, long columns, const int rows) {
    vec sums[BLOCK_ROWS][2];
    EACH (int r = 0; r < rows; r++) {
        sums[r][0] = bias ? load(bias) : (vec){0};
        sums[r][1] = bias ? load(bias + LANES) : (vec){0};
    }
    for (long i = 0; i < inner; i++) {
        vec left = load(weight + i * PANEL), right = load(weight + i * PANEL + LANES);
        EACH (int r = 0; r < rows; r++) {
            const float given = x[r * inner + i];
            sums[r][0] += given * left;
            sums[r][1] += given * right;
        }
    }
    EACH (int r = 0; r < rows; r++)
        for (int side = 0; side < 2; side++) {
            const long left = columns - side * LANES;
            if (left >= LANES) store(y + r * stride + side * LANES, sums[r][side]);
            else if (left > 0) store_part(y + r * stride + side * LANES, sums[r][side], left);
        }
}

/* y (rows, outer) = x (rows, inner) @ weight + bias; weight in panels (outer / PANEL, inner, PANEL), the last filled up. */
static void packed_product(const float *x, const float *weight, const float *bias, float *y, long rows, long inner,
                           long outer) {
    for (long at = 0; at < outer; at += PANEL, weight += inner * PANEL) {
        const float *added = bias ? bias + at : 0;
        long r = 0;
        for (; r + BLOCK_ROWS <= rows; r += BLOCK_ROWS)
            panel(x + r * inner, weight, added, y + r * outer + at, inner, outer, outer - at, BLOCK_ROWS);
        for (; r < rows; r++) panel(x + r * inner, weight, added, y + r * outer + at, inner, outer, outer - at, 1);
    }
}

/* What a layer is made of, as Python lays it out: addresses and whole numbers of 64 bits. */
typedef struct {
    const float *norm_given, *to_heads, *heads_bias, *norm_query, *norm_key, *from_heads, *from_heads_bias, *norm_found;
    const float *norm_middle, *to_gate, *gate_bias, *from_gate, *from_gate_bias, *norm_made, *cos, *sin;
    float *keys, *values;
    int64_t capacity, column, first; /* of keys and values: columns there are, the one to write, the first one seen */
} Layer;

static void rotated(float *x, const float *cos, const float *sin, long size) {
    float turned[size];
    rotate(x, cos, sin, turned, 0, 1, 1, size, 1.0f);
    memcpy(x, turned, size * sizeof(float));
}

/* hidden (rows, size) of one token a row -> the decoder's states, in place; keys and values are written into the cache.
 * scratch: a row of it holds the widest of all products, and twice the widest of what goes into them.
 * mask (rows, all columns so far) bytes or null; numbers: scaling and cap of each layer. */
void decode_step(const Layer *layers, const float *numbers, const float *norm_last, float *hidden, float *scratch,
                 const int64_t *positions, const uint8_t *mask, long first, long last, long depth, long size, long heads,
                 long key_heads, long head, long inner, long seen, long mask_stride, float eps, float offset, float a,
                 float b) {
    const long rows = last - first, asked = heads * head, kept = key_heads * head, all = asked + 2 * kept;
    const long wide = all > 2 * inner ? all : 2 * inner, shared = heads / key_heads;
    const long narrow = size > asked ? (size > inner ? size : inner) : (asked > inner ? asked : inner);
    float *made = scratch + first * (wide + 2 * narrow), *given = made + rows * wide, *found = given + rows * narrow;
    float *x = hidden + first * size;
    for (long l = 0; l < depth; l++) {
        const Layer *layer = layers + l;
        norm_forward(x, layer->norm_given, 0, given, 0, 0, rows, size, eps, offset);
        packed_product(given, layer->to_heads, layer->heads_bias, made, rows, size, all);
        for (long r = 0; r < rows; r++) {
            float *query = made + r * all, *key = query + asked, *value = key + kept;
            const long row = first + r, column = layer->column, count = column + 1 - layer->first;
            if (layer->norm_query) {
                for (long h = 0; h < heads; h++)
                    norm_forward(query + h * head, layer->norm_query, 0, query + h * head, 0, 0, 1, head, eps, offset);
                for (long h = 0; h < key_heads; h++)
                    norm_forward(key + h * head, layer->norm_key, 0, key + h * head, 0, 0, 1, head, eps, offset);
            }
            if (layer->cos)
                for (long h = 0; h < heads + key_heads; h++) /* keys follow queries */
                    rotated(query + h * head, layer->cos + positions[row] * head, layer->sin + positions[row] * head, head);
            for (long h = 0; h < key_heads; h++) {
                const long at = ((row * key_heads + h) * layer->capacity + column) * head;
                memcpy(layer->keys + at, key + h * head, head * sizeof(float));
                memcpy(layer->values + at, value + h * head, head * sizeof(float));
            }
            const long from = (row * key_heads * layer->capacity + layer->first) * head;
            const uint8_t *seen_here = mask ? mask + row * mask_stride + seen - count : 0;
            attention(query, layer->keys + from, layer->values + from, seen_here, given + r * asked, 0, 1, key_heads,
                      shared, count, head, 0, layer->capacity * head, 0, numbers[2 * l], numbers[2 * l + 1]);
        }
        packed_product(given, layer->from_heads, layer->from_heads_bias, found, rows, asked, size);
        if (layer->norm_found) norm_forward(found, layer->norm_found, x, x, 0, 0, rows, size, eps, offset);
        else
            for (long i = 0; i < rows * size; i++) x[i] += found[i];
        norm_forward(x, layer->norm_middle, 0, given, 0, 0, rows, size, eps, offset);
        packed_product(given, layer->to_gate, layer->gate_bias, made, rows, size, 2 * inner);
        for (long r = 0; r < rows; r++)
            gate_forward(made + r * 2 * inner, made + r * 2 * inner + inner, given + r * inner, 0, inner, a, b);
        packed_product(given, layer->from_gate, layer->from_gate_bias, found, rows, inner, size);
        if (layer->norm_made) norm_forward(found, layer->norm_made, x, x, 0, 0, rows, size, eps, offset);
        else
            for (long i = 0; i < rows * size; i++) x[i] += found[i];
    }
    norm_forward(x, norm_last, 0, x, 0, 0, rows, size, eps, offset);
}
