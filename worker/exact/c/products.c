/* Products of integers of at most 15 bits, exactly, by the 16-bit multiply-add of AVX2. worker/exact/products.py.
 *
 * Each row of A and column of B (a "lane") is rounded to integers a, |a| <= 2^(width-1) - 1, times a power of two; the
 * pairs (a[k], a[k+1]) lie in one 32-bit word, so that one vpmaddwd makes the sum of two products of eight outputs.
 * Eight products of 15-bit integers stay below 2^31: 8 * (2^14 - 1)^2 < 2^31. After every eight, the sum t goes into two
 * accumulators: low += t modulo 2^32, high += floor(t / 2^16). With n such sums, T - 2^16 high lies in [0, n * 2^16), so
 * for n < 2^15 both together give T, whole and exact, in the time float32 products take.
 * Layout and blocking after Goto and van de Geijn, "Anatomy of high-performance matrix multiplication" (2008).
 */
#include "compiled.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#include <stdlib.h>
#include <string.h>

#define AVX2 __attribute__((target("avx2")))
#define ROWS 6       /* of a tile: 12 sums, 2 vectors of B and 1 of A fill the 16 registers */
#define COLUMNS 16   /* of a tile: two vectors of eight */
#define STEP 8       /* of K: four multiply-adds, after which the sums are put away */
#define INNER 4096   /* of K at a time: a panel of A and one of B then stay in the second cache; below 2^18 */
#define BLOCK_BYTES (256 * 1024) /* of B's panels at a time: half of a common second cache */
#define ALIGNMENT 64

/* One operand: lane i, place k is at data[i * lane_stride + k * inner_stride]; one of the strides is 1. */
typedef struct {
    const float *data;
    int64_t lanes, inner, lane_stride, inner_stride;
} side;

/* What the largest magnitude of each lane says: scales that make integers, the unit of those, whether it is finite. */
typedef struct {
    float *first, *second; /* x * first * second = x / unit, both powers of two, each product exact or far below 1/2 */
    double *unit;
    int finite; /* of all lanes */
} scales;

static float power_of_two(int exponent) { /* exponent in [-126, 127] */
    uint32_t bits = (uint32_t)(exponent + 127) << 23;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static double wide_power_of_two(int exponent) { /* exponent in [-1022, 1023] */
    uint64_t bits = (uint64_t)(exponent + 1023) << 52;
    double value;
    memcpy(&value, &bits, 8);
    return value;
}

/* The bit pattern of the largest magnitude of each lane: patterns of magnitudes are ordered as the magnitudes are. */
AVX2 static void largest(const side *s, int32_t *peak) {
    const __m256i magnitude = _mm256_set1_epi32(0x7FFFFFFF);
    if (s->inner_stride == 1) {
        for (int64_t i = 0; i < s->lanes; i++) {
            const int32_t *row = (const int32_t *)(s->data + i * s->lane_stride);
            __m256i m0 = _mm256_setzero_si256(), m1 = m0;
            int64_t k = 0;
            for (; k + 16 <= s->inner; k += 16) {
                m0 = _mm256_max_epi32(m0, _mm256_and_si256(_mm256_loadu_si256((const __m256i *)(row + k)), magnitude));
                m1 = _mm256_max_epi32(m1, _mm256_and_si256(_mm256_loadu_si256((const __m256i *)(row + k + 8)), magnitude));
            }
            int32_t eight[8], most = 0;
            _mm256_storeu_si256((__m256i *)eight, _mm256_max_epi32(m0, m1));
            for (int j = 0; j < 8; j++) most = eight[j] > most ? eight[j] : most;
            for (; k < s->inner; k++) {
                int32_t one = row[k] & 0x7FFFFFFF;
                most = one > most ? one : most;
            }
            peak[i] = most;
        }
        return;
    }
    memset(peak, 0, (size_t)s->lanes * 4);
    for (int64_t k = 0; k < s->inner; k++) {
        const int32_t *row = (const int32_t *)(s->data + k * s->inner_stride);
        for (int64_t i = 0; i < s->lanes; i++) {
            int32_t one = row[i] & 0x7FFFFFFF;
            peak[i] = one > peak[i] ? one : peak[i];
        }
    }
}

static void find_scales(const int32_t *peak, int64_t lanes, int width, scales *out) {
    out->finite = 1;
    for (int64_t i = 0; i < lanes; i++) {
        int32_t bits = peak[i];
        int e; /* peak = f * 2^e, f in [1/2, 1) */
        if (bits >= 0x7F800000) { /* the caller overwrites this lane's results with NaN */
            out->finite = 0;
            out->first[i] = out->second[i] = 0.0f;
            out->unit[i] = 1.0;
            continue;
        }
        if (bits >= 0x00800000) e = (bits >> 23) - 126;
        else e = bits ? 32 - __builtin_clz((unsigned)bits) - 149 : -1000;
        int unit = e - (width - 1);
        if (unit < -149) unit = -149; /* x is an integer of this unit too: the result has the same value */
        int half = -unit / 2;
        out->first[i] = power_of_two(half);
        out->second[i] = power_of_two(-unit - half);
        out->unit[i] = wide_power_of_two(unit);
    }
}

AVX2 static inline __m256i rounded(__m256 x, __m256 first, __m256 second, __m256i bound) {
    __m256 scaled = _mm256_mul_ps(_mm256_mul_ps(x, first), second);
    __m256i whole = _mm256_cvtps_epi32(scaled); /* ties to even; 2^31 where it does not fit: only lanes not finite */
    return _mm256_max_epi32(_mm256_min_epi32(whole, bound), _mm256_sub_epi32(_mm256_setzero_si256(), bound));
}

AVX2 static inline __m256i some(const float *from, int64_t count) { /* the lanes that exist, of eight */
    const __m256i places = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    int left = count > 8 ? 8 : count < 0 ? 0 : (int)count;
    return _mm256_castps_si256(_mm256_maskload_ps(from, _mm256_cmpgt_epi32(_mm256_set1_epi32(left), places)));
}

/* Eight rows of eight 32-bit words, transposed in place. */
AVX2 static inline void transpose(__m256i r[8]) {
    __m256i t[8], u[8];
    for (int i = 0; i < 4; i++) {
        t[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int h = 0; h < 2; h++) {
        u[4 * h] = _mm256_unpacklo_epi64(t[4 * h], t[4 * h + 2]);
        u[4 * h + 1] = _mm256_unpackhi_epi64(t[4 * h], t[4 * h + 2]);
        u[4 * h + 2] = _mm256_unpacklo_epi64(t[4 * h + 1], t[4 * h + 3]);
        u[4 * h + 3] = _mm256_unpackhi_epi64(t[4 * h + 1], t[4 * h + 3]);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm256_permute2x128_si256(u[i], u[i + 4], 0x20);
        r[i + 4] = _mm256_permute2x128_si256(u[i], u[i + 4], 0x31);
    }
}

/* Sixteen places of one lane along contiguous K as eight words of two integers; beyond `count` places zeros. */
AVX2 static inline __m256i pairs_along(const float *x, int64_t count, __m256 first, __m256 second, __m256i bound) {
    __m256 low, high;
    if (count >= 16) {
        low = _mm256_loadu_ps(x);
        high = _mm256_loadu_ps(x + 8);
    } else {
        low = _mm256_castsi256_ps(some(x, count));
        high = _mm256_castsi256_ps(some(x + 8, count - 8));
    }
    __m256i packed = _mm256_packs_epi32(rounded(low, first, second, bound), rounded(high, first, second, bound));
    return _mm256_permute4x64_epi64(packed, 0xD8);
}

/* Places [from, from + count) of K of all lanes into panels of `wide` lanes: panel p, word w of K, lane l is at
 * out[(p * words + w) * wide + l], words = half of count rounded up to a multiple of STEP. `out` has eight words of slack. */
AVX2 static void pack(const side *s, const scales *by, int width, int wide, int64_t from, int64_t count, int32_t *out) {
    const __m256i bound = _mm256_set1_epi32((1 << (width - 1)) - 1);
    const int64_t words = (count + STEP - 1) / STEP * (STEP / 2);
    for (int64_t panel = 0; panel * wide < s->lanes; panel++) {
        int32_t *base = out + panel * words * wide;
        for (int part = 0; part < wide; part += 8) { /* ROWS is one part of six, COLUMNS two of eight */
            const int64_t lane = panel * wide + part;
            int64_t lanes = s->lanes - lane;
            lanes = lanes > wide - part ? wide - part : lanes;
            if (s->inner_stride == 1) {
                for (int64_t w = 0; w < words; w += 8) {
                    __m256i r[8];
                    for (int l = 0; l < 8; l++) {
                        if (l >= lanes) {
                            r[l] = _mm256_setzero_si256();
                            continue;
                        }
                        const int64_t i = lane + l;
                        r[l] = pairs_along(s->data + i * s->lane_stride + from + 2 * w, count - 2 * w,
                                           _mm256_set1_ps(by->first[i]), _mm256_set1_ps(by->second[i]), bound);
                    }
                    transpose(r);
                    for (int q = 0; q < 8 && w + q < words; q++) /* a store of six lanes is mended by the next one */
                        _mm256_storeu_si256((__m256i *)(base + (w + q) * wide + part), r[q]);
                }
                continue;
            }
            const __m256 first = _mm256_castsi256_ps(some(by->first + lane, lanes));
            const __m256 second = _mm256_castsi256_ps(some(by->second + lane, lanes));
            const float *x = s->data + lane + from * s->inner_stride;
            for (int64_t w = 0; w < words; w++) {
                __m256 low = _mm256_setzero_ps(), high = low;
                if (2 * w < count) low = lanes >= 8 ? _mm256_loadu_ps(x) : _mm256_castsi256_ps(some(x, lanes));
                if (2 * w + 1 < count) {
                    const float *next = x + s->inner_stride;
                    high = lanes >= 8 ? _mm256_loadu_ps(next) : _mm256_castsi256_ps(some(next, lanes));
                }
                x += 2 * s->inner_stride;
                __m256i even = rounded(low, first, second, bound), odd = rounded(high, first, second, bound);
                __m256i both = _mm256_blend_epi16(even, _mm256_slli_epi32(odd, 16), 0xAA);
                _mm256_storeu_si256((__m256i *)(base + w * wide + part), both);
            }
        }
    }
}

/* One tile: low and high accumulators of ROWS x COLUMNS outputs over `words` words of K. */
AVX2 static void tile(const int32_t *a, const int32_t *b, int64_t words, __m256i low[2 * ROWS], __m256i high[2 * ROWS]) {
    for (int i = 0; i < 2 * ROWS; i++) low[i] = high[i] = _mm256_setzero_si256();
    for (int64_t w = 0; w < words; w += STEP / 2) {
        __m256i t[2 * ROWS];
#pragma GCC unroll 4
        for (int q = 0; q < STEP / 2; q++) {
            const __m256i b0 = _mm256_loadu_si256((const __m256i *)(b + q * COLUMNS));
            const __m256i b1 = _mm256_loadu_si256((const __m256i *)(b + q * COLUMNS + 8));
#pragma GCC unroll 6
            for (int i = 0; i < ROWS; i++) {
                const __m256i x = _mm256_set1_epi32(a[q * ROWS + i]);
                const __m256i p0 = _mm256_madd_epi16(x, b0), p1 = _mm256_madd_epi16(x, b1);
                t[2 * i] = q ? _mm256_add_epi32(t[2 * i], p0) : p0;
                t[2 * i + 1] = q ? _mm256_add_epi32(t[2 * i + 1], p1) : p1;
                /* Else GCC makes the products of all four words first and keeps them in memory: a quarter slower. */
                __asm__("" : "+x"(t[2 * i]), "+x"(t[2 * i + 1]));
            }
        }
        a += STEP / 2 * ROWS;
        b += STEP / 2 * COLUMNS;
#pragma GCC unroll 12
        for (int i = 0; i < 2 * ROWS; i++) {
            low[i] = _mm256_add_epi32(low[i], t[i]);
            high[i] = _mm256_add_epi32(high[i], _mm256_srai_epi32(t[i], 16));
        }
    }
}

/* The whole sums of eight outputs as float64, in two vectors of four. */
AVX2 static inline void whole(__m256i low, __m256i high, __m256d out[2]) {
    const __m256i rest = _mm256_sub_epi32(low, _mm256_slli_epi32(high, 16)); /* in [0, 2^31) */
    const __m256d scale = _mm256_set1_pd(65536.0);
    for (int h = 0; h < 2; h++) {
        const __m128i top = h ? _mm256_extracti128_si256(high, 1) : _mm256_castsi256_si128(high);
        const __m128i bottom = h ? _mm256_extracti128_si256(rest, 1) : _mm256_castsi256_si128(rest);
        out[h] = _mm256_add_pd(_mm256_mul_pd(_mm256_cvtepi32_pd(top), scale), _mm256_cvtepi32_pd(bottom));
    }
}

/* Adds a tile's sums to `sums` (float64, exact below 2^53) or, at the end of K, scales, rounds once and stores them. */
AVX2 static void put(__m256i low[2 * ROWS], __m256i high[2 * ROWS], int64_t rows, int64_t columns, double *sums,
                     int64_t sums_stride, int begins, int ends, const double *row_unit, const double *column_unit,
                     float *out, int64_t out_stride) {
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t j = 0; j < COLUMNS && j < columns; j += 8) {
            __m256d both[2];
            whole(low[2 * i + j / 8], high[2 * i + j / 8], both);
            double *kept = sums + i * sums_stride + j;
            if (!begins)
                for (int h = 0; h < 2; h++) both[h] = _mm256_add_pd(both[h], _mm256_loadu_pd(kept + 4 * h));
            if (!ends) {
                for (int h = 0; h < 2; h++) _mm256_storeu_pd(kept + 4 * h, both[h]);
                continue;
            }
            float eight[8];
            for (int h = 0; h < 2; h++) {
                const __m256d unit = _mm256_mul_pd(_mm256_set1_pd(row_unit[i]), _mm256_loadu_pd(column_unit + j + 4 * h));
                /* -0.0, of a negative sum too small for float32, becomes +0.0. */
                _mm_storeu_ps(eight + 4 * h, _mm_add_ps(_mm256_cvtpd_ps(_mm256_mul_pd(both[h], unit)), _mm_setzero_ps()));
            }
            int64_t left = columns - j;
            if (left >= 8) memcpy(out + i * out_stride + j, eight, 32);
            else memcpy(out + i * out_stride + j, eight, (size_t)left * 4);
        }
    }
}

static void *carve(char **at, int64_t bytes) {
    char *here = *at;
    *at += (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return here;
}

static int64_t panels(int64_t lanes, int wide) { return (lanes + wide - 1) / wide; }

typedef struct {
    int32_t *peak, *a, *b;
    scales rows, columns;
    double *sums;
    void *memory;
} workspace;

static int reserve(workspace *w, int64_t m, int64_t n, int64_t k) {
    const int64_t deep = (k < INNER ? k : INNER) / STEP * STEP + STEP, lanes = (m > n ? m : n) + COLUMNS;
    const int64_t high = panels(m, ROWS) * ROWS, wide = panels(n, COLUMNS) * COLUMNS;
    const int64_t sums = k > INNER ? high * wide * 8 : 0;
    const int64_t slack = 16 * ALIGNMENT;
    const int64_t bytes = lanes * 4 + (high + wide) * deep * 2 + 2 * (lanes * 2 * 4 + lanes * 8) + sums + slack;
    w->memory = NULL;
    if (posix_memalign(&w->memory, ALIGNMENT, (size_t)bytes)) return 1;
    char *at = w->memory;
    w->peak = carve(&at, lanes * 4);
    w->a = carve(&at, high * deep * 2 + 32);
    w->b = carve(&at, wide * deep * 2 + 32);
    for (int which = 0; which < 2; which++) {
        scales *one = which ? &w->columns : &w->rows;
        one->first = carve(&at, lanes * 4);
        one->second = carve(&at, lanes * 4);
        one->unit = carve(&at, lanes * 8);
    }
    w->sums = sums ? carve(&at, sums) : NULL;
    return 0;
}

AVX2 static void multiply(const side *a, const side *b, int width, workspace *w, float *out, int64_t out_stride) {
    const int64_t m = a->lanes, n = b->lanes, k = a->inner, wide = panels(n, COLUMNS) * COLUMNS;
    __m256i low[2 * ROWS], high[2 * ROWS];
    for (int64_t from = 0; from < k; from += INNER) {
        const int64_t count = k - from < INNER ? k - from : INNER;
        const int64_t words = (count + STEP - 1) / STEP * (STEP / 2);
        const int begins = from == 0, ends = from + count == k;
        pack(a, &w->rows, width, ROWS, from, count, w->a);
        pack(b, &w->columns, width, COLUMNS, from, count, w->b);
        int64_t block = BLOCK_BYTES / (words * 4 * COLUMNS) * COLUMNS;
        block = block < COLUMNS ? COLUMNS : block;
        for (int64_t start = 0; start < n; start += block) {
            const int64_t stop = start + block < n ? start + block : n;
            for (int64_t i = 0; i < m; i += ROWS) {
                for (int64_t j = start; j < stop; j += COLUMNS) {
                    tile(w->a + i * words, w->b + j * words, words, low, high);
                    put(low, high, m - i < ROWS ? m - i : ROWS, n - j, w->sums + i * wide + j, wide, begins, ends,
                        w->rows.unit + i, w->columns.unit + j, out + i * out_stride + j, out_stride);
                }
            }
        }
    }
}

static void poison(const int32_t *peak, int64_t lanes, int64_t others, int64_t lane_stride, int64_t other_stride, float *out) {
    const uint32_t bits = 0x7FC00000;
    for (int64_t i = 0; i < lanes; i++)
        if (peak[i] >= 0x7F800000)
            for (int64_t j = 0; j < others; j++) memcpy(out + i * lane_stride + j * other_stride, &bits, 4);
}

int ichiba_has_products(void) { return __builtin_cpu_supports("avx2"); }

int ichiba_product(const float *a, const float *b, float *out, int64_t batch, int64_t m, int64_t k, int64_t n,
                   const int64_t *strides, int width) {
    workspace w;
    if (reserve(&w, m, n, k)) return 1;
    for (int64_t z = 0; z < batch; z++) {
        const side left = {a + z * strides[0], m, k, strides[1], strides[2]};
        const side right = {b + z * strides[3], n, k, strides[5], strides[4]};
        float *result = out + z * m * n;
        largest(&left, w.peak);
        find_scales(w.peak, m, width, &w.rows);
        largest(&right, w.peak);
        find_scales(w.peak, n, width, &w.columns);
        multiply(&left, &right, width, &w, result, n);
        if (!w.columns.finite) poison(w.peak, n, m, 1, n, result);
        if (!w.rows.finite) {
            largest(&left, w.peak);
            poison(w.peak, m, n, n, 1, result);
        }
    }
    free(w.memory);
    return 0;
}

#else
int ichiba_has_products(void) { return 0; }
int ichiba_product(const float *a, const float *b, float *out, int64_t batch, int64_t m, int64_t k, int64_t n,
                   const int64_t *strides, int width) {
    (void)a, (void)b, (void)out, (void)batch, (void)m, (void)k, (void)n, (void)strides, (void)width;
    return 1;
}
#endif
