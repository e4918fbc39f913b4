/* One token for each of a few rows on a CPU: the products of nanochat/kernels/decode.py.

   Writing one token reads every weight once, so it should cost no more than reading the memory. A matrix is multiplied
   with all rows while a few of its rows are in registers, and each thread takes a share of them. Everything else that a
   layer does for one token is done in the same call, for which its parts are far too small to be operators each.

   Vectors are the compiler's own, so the same source serves every processor. Threads are OpenMP's. Every output is the
   sum of products in one order, whatever the number of rows and threads. */

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define LANES 16
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef int32_t ints_at __attribute__((vector_size(4 * LANES), aligned(4)));

/* (rows, cols), of numbers or, with scales, of bytes: row i is scales[i] * weight[i]. Both are multiples of LANES. */
typedef struct {
    const void *weight;
    const float *scales;
    int64_t rows, cols;
} matrix;

#define INLINE static inline __attribute__((always_inline))

INLINE vec numbers(const int8_t *bytes) {
#ifdef __AVX512F__ /* which compilers do not find by themselves */
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)bytes)));
#else
    vec v = {0};
    for (int i = 0; i < LANES; i++) v[i] = bytes[i];
    return v;
#endif
}

/* The totals of 16 vectors: neighbouring lanes are added up until each lane is the total of one. */
INLINE vec totals(vec *v) {
    const ints even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30}, odd = even + 1;
#pragma GCC unroll 4
    for (int half = LANES / 2; half; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; i++)
            v[i] = __builtin_shuffle(v[2 * i], v[2 * i + 1], even) + __builtin_shuffle(v[2 * i], v[2 * i + 1], odd);
    return v[0];
}

/* y[b][n] for B rows b of x and LANES / B rows n of the matrix; meanwhile P rows from `ahead` on are fetched. */
INLINE void block(const int B, const int P, const int is_bytes, const matrix *m, const float *x, float *y, int64_t n,
                  int64_t ahead) {
    const int R = LANES / B;
    vec sums[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) sums[i] = (vec){0};
    for (int64_t k = 0; k < m->cols; k += LANES)
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            int64_t at = (n + r) * m->cols + k;
            const int8_t *bytes = (const int8_t *)m->weight + at;
            const float *floats = (const float *)m->weight + at;
            vec w = is_bytes ? numbers(bytes) : *(const vec *)floats;
            int64_t next = (ahead + r) * m->cols + k;
            if (r < P && is_bytes) __builtin_prefetch((const int8_t *)m->weight + next);
            if (r < P && !is_bytes) __builtin_prefetch((const float *)m->weight + next);
#pragma GCC unroll 4
            for (int b = 0; b < B; b++) sums[b * R + r] += w * *(const vec *)(x + b * m->cols + k);
        }
    vec sum = totals(sums);
    for (int b = 0; b < B; b++)
        for (int r = 0; r < R; r++) y[b * m->rows + n + r] = sum[b * R + r] * (is_bytes ? m->scales[n + r] : 1);
}

INLINE void product_of(const int is_bytes, const matrix *m, const float *x, float *y, int64_t count, int64_t start,
                       int64_t stop) {
    for (int64_t n = start; n < stop; n += LANES) {
        int64_t b = 0;
        if (count >= 16) /* the next rows are fetched bit by bit while these are multiplied with 16 rows of x */
            for (; b < 16; b += 4)
                for (int r = 0; r < LANES; r += 4)
                    block(4, 1, is_bytes, m, x + b * m->cols, y + b * m->rows, n + r, n + LANES + r + b / 4);
        for (; b + 4 <= count; b += 4)
            for (int r = 0; r < LANES; r += 4)
                block(4, 4, is_bytes, m, x + b * m->cols, y + b * m->rows, n + r, n + LANES + r);
        for (; b + 2 <= count; b += 2)
            for (int r = 0; r < LANES; r += 8)
                block(2, 8, is_bytes, m, x + b * m->cols, y + b * m->rows, n + r, n + LANES + r);
        for (; b < count; b++) block(1, 16, is_bytes, m, x + b * m->cols, y + b * m->rows, n, n + LANES);
    }
}

/* One of several shares of y (count, rows) = x (count, cols) times the matrix. */
static void product(const matrix *m, const float *x, float *y, int64_t count, int share, int shares) {
    int64_t groups = m->rows / LANES, start = LANES * (groups * share / shares);
    int64_t stop = LANES * (groups * (share + 1) / shares);
    if (m->scales) product_of(1, m, x, y, count, start, stop);
    else product_of(0, m, x, y, count, start, stop);
}

/* e to the x, for x in [-87, 0], to a millionth: 2 to a whole number times a polynomial of what is left. */
INLINE vec exponential(vec x) {
    ints whole = __builtin_convertvector(x * 1.44269504f - 0.5f, ints);
    vec left = x - __builtin_convertvector(whole, vec) * 0.693147181f;
    vec power = (vec){0} + 1.f / 720;
    const float inverse_factorials[] = {1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1, 1};
#pragma GCC unroll 6
    for (int i = 0; i < 6; i++) power = power * left + inverse_factorials[i];
    return power * (vec)((whole + 127) << 23);
}

/* At least -80, of which e to the x is as good as nothing. */
INLINE vec bounded(vec x) {
    ints is_low = x < -80;
    return (vec)(((ints)x & ~is_low) | ((ints)((vec){0} - 80) & is_low));
}

/* y = cap * tanh(y / cap). */
static void softcap(float *y, float cap) {
    ints sign = *(ints_at *)y & INT32_MIN;
    vec e = exponential(bounded((vec)(*(ints_at *)y ^ sign) * (-2 / cap)));
    *(vec *)y = (vec)((ints)(cap * (1 - e) / (1 + e)) | sign);
}

/* cap: of logits, 0 for none. In small shares, so that a thread that is held up holds up no more than one of them. */
void nanochat_linear(const matrix *m, const float *x, float *y, float cap, int64_t count, int threads) {
    int shares = threads == 1 ? 1 : 8 * threads;
    int64_t groups = m->rows / LANES;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int share = 0; share < shares; share++) {
        product(m, x, y, count, share, shares);
        int64_t start = LANES * (groups * share / shares), stop = LANES * (groups * (share + 1) / shares);
        for (int64_t b = 0; cap > 0 && b < count; b++)
            for (int64_t i = start; i < stop; i += LANES) softcap(y + b * m->rows + i, cap);
    }
}

/* C -> 4C -> C with an activation: 0 is relu squared, 1 is gelu. hidden: (count, 4C), overwritten. */
void nanochat_mlp(const matrix *fc, const matrix *proj, int activation, const float *x, float *hidden, float *y,
                  int64_t count, int threads) {
#pragma omp parallel num_threads(threads)
    {
        int thread = omp_get_thread_num(), n = omp_get_num_threads();
        product(fc, x, hidden, count, thread, n);
#pragma omp barrier
        int64_t size = count * fc->rows, stop = size * (thread + 1) / n;
        for (int64_t i = size * thread / n; i < stop; i++) {
            float h = hidden[i];
            if (activation == 0) hidden[i] = h > 0 ? h * h : 0;
            else hidden[i] = 0.5f * h * (1 + erff(h * 0.70710678f));
        }
#pragma omp barrier
        product(proj, hidden, y, count, thread, n);
    }
}

/* As `Attention` in nanochat/model/attention.py. qk_scale 0: no norm. gate.weight 0: no value embedding. */
typedef struct {
    matrix q, k, v, proj, gate;
    int64_t heads, kv_heads, head_dim, window;
    float qk_scale, gate_scale;
    int has_offset;
} attention;

/* Rotate a head by minus its angles, then normalise and scale it. */
static void turn(float *head, const float *cos, const float *sin, int64_t dim, float qk_scale) {
    int64_t half = dim / 2;
    float squares = 0;
    for (int64_t i = 0; i < half; i++) {
        float first = head[i], second = head[i + half];
        head[i] = first * cos[i] + second * sin[i];
        head[i + half] = second * cos[i] - first * sin[i];
    }
    if (qk_scale == 0) return;
    for (int64_t i = 0; i < dim; i++) squares += head[i] * head[i];
    float factor = qk_scale / sqrtf(squares / dim + 1.1920929e-07f);
    for (int64_t i = 0; i < dim; i++) head[i] *= factor;
}

/* out (D) = softmax over positions first to last of q (D) with the keys, times the values; scores: room for them and
   LANES more. */
static void look(const attention *a, int64_t slots, const float *q, const float *keys, const float *values,
                 int64_t first, int64_t last, float *scores, float *out) {
    int64_t dim = a->head_dim, stride = a->kv_heads * dim, count = last - first + 1, slot = first % slots;
    float best = -INFINITY, sum = 0, scale = 1 / sqrtf(dim);
    for (int64_t start = 0; start < count; start += LANES) {
        vec dots[LANES];
        for (int i = 0; i < LANES; i++) {
            dots[i] = (vec){0};
            if (start + i >= count) continue;
            const float *key = keys + slot * stride;
            for (int64_t d = 0; d < dim; d += LANES) dots[i] += *(const vec *)(q + d) * *(const vec *)(key + d);
            slot = slot + 1 == slots ? 0 : slot + 1;
        }
        *(vec *)(scores + start) = totals(dots) * scale;
    }
    for (int64_t i = 0; i < count; i++) best = scores[i] > best ? scores[i] : best;
    for (int64_t i = 0; i < count; i += LANES) *(vec *)(scores + i) = exponential(bounded(*(vec *)(scores + i) - best));
    for (int64_t i = 0; i < count; i++) sum += scores[i];
    memset(out, 0, dim * sizeof(float));
    slot = first % slots;
    for (int64_t i = 0; i < count; i++) {
        const float *value = values + slot * stride, share = scores[i] / sum;
        for (int64_t d = 0; d < dim; d += LANES) *(vec *)(out + d) += share * *(const vec *)(value + d);
        slot = slot + 1 == slots ? 0 : slot + 1;
    }
}

/* x, out: (count, C). embedded: (count, H_kv * D), rows of the value embedding. cos, sin: (count, D / 2).
   keys, values: (count, slots, H_kv, D). last_key: (count, H_kv, D).
   work: room for 2 * count * (C + H_kv * D) + threads * (slots + LANES) numbers. */
void nanochat_attend(const attention *a, const float *x, const float *embedded, const float *cos, const float *sin,
                     const int64_t *positions, float *keys, float *values, float *last_key, float *work, float *out,
                     int64_t slots, int64_t count, int threads) {
    int64_t dim = a->head_dim, kv = a->kv_heads * dim, group = a->heads / a->kv_heads, channels = a->q.cols;
    float *q = work, *k = q + count * channels, *v = k + count * kv, *mixed = v + count * kv;
    float *scores = mixed + count * channels;
#pragma omp parallel num_threads(threads)
    {
        int thread = omp_get_thread_num(), n = omp_get_num_threads();
        product(&a->q, x, q, count, thread, n);
        product(&a->k, x, k, count, thread, n);
        product(&a->v, x, v, count, thread, n);
#pragma omp barrier
        for (int64_t item = thread; item < count * a->kv_heads; item += n) {
            int64_t b = item / a->kv_heads, g = item % a->kv_heads, position = positions[b];
            float *key = k + b * kv + g * dim, *value = v + b * kv + g * dim, *last = last_key + b * kv + g * dim;
            int64_t row = b * slots * kv + g * dim, slot = row + position % slots * kv;
            if (a->gate.weight) {
                const float *weight = (const float *)a->gate.weight + g * a->gate.cols;
                float gate = 0;
                for (int64_t i = 0; i < a->gate.cols; i++) gate += weight[i] * x[b * channels + i];
                gate = a->gate_scale / (1 + expf(-gate));
                for (int64_t i = 0; i < dim; i++) value[i] += gate * embedded[b * kv + g * dim + i];
            }
            turn(key, cos + b * dim / 2, sin + b * dim / 2, dim, a->qk_scale);
            for (int64_t i = 0; i < dim; i++) {
                int is_offset = a->has_offset && i / (dim / 4) % 2;
                keys[slot + i] = !is_offset ? key[i] : position ? last[i] : 0;
                values[slot + i] = value[i];
            }
            if (a->has_offset) memcpy(last, key, dim * sizeof(float));
            for (int64_t h = g * group; h < (g + 1) * group; h++) {
                float *query = q + b * a->q.rows + h * dim;
                turn(query, cos + b * dim / 2, sin + b * dim / 2, dim, a->qk_scale);
                look(a, slots, query, keys + row, values + row, position > a->window ? position - a->window : 0, position,
                     scores + thread * (slots + LANES), mixed + b * a->q.rows + h * dim);
            }
        }
#pragma omp barrier
        product(&a->proj, mixed, out, count, thread, n);
    }
}
