/* Elementary functions, sums and random numbers in one pass over memory: the same operations in the same order as
 * worker/exact/elementary.py, reductions.py and protocol/philox.py, which say where they come from, and the same bits.
 * Built without contraction (no fused multiply-add) and without any option that lets a compiler reorder arithmetic.
 */
#include "compiled.h"
#include "philox.h"

#include <string.h>

int ichiba_version(void) { return ICHIBA_VERSION; }

#if defined(__x86_64__) && defined(__GNUC__)
int ichiba_has_elementwise(void) { return __builtin_cpu_supports("avx2"); }
#else
int ichiba_has_elementwise(void) { return 1; }
#endif

static inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static inline float clamped(float x, float low, float high) { /* a NaN stays */
    x = x < low ? low : x;
    return x > high ? high : x;
}

#define MAGIC 12582912.0f
#define LN2_HIGH 0.693359375f
#define LN2_LOW (-2.12194440e-4f)

VECTOR void ichiba_exp(const float *restrict in, float *restrict out, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        const float x = in[i], c = clamped(x, -104.0f, 89.0f);
        const float t = c * 1.44269504088896341f + MAGIC, k = t - MAGIC;
        const float r = (c - k * LN2_HIGH) - k * LN2_LOW;
        float p = r * 1.9875691500e-4f;
        p = (p + 1.3981999507e-3f) * r;
        p = (p + 8.3334519073e-3f) * r;
        p = (p + 4.1665795894e-2f) * r;
        p = (p + 1.6666665459e-1f) * r;
        p = p + 5.0000001201e-1f;
        p = p * r * r + r + 1.0f;
        const uint32_t scaled = bits_of(p) + ((bits_of(t) - 0x4B400000u) << 23);
        const float up = float_of(scaled + (64u << 23)) * 0x1p-64f;
        const float down = float_of(scaled - (64u << 23)) * 0x1p64f;
        const float y = x > 0.0f ? down : up;
        out[i] = x != x ? x : y;
    }
}

VECTOR void ichiba_log(const float *restrict in, float *restrict out, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        const float x = in[i];
        const int small = x < 0x1p-126f;
        const int32_t bits = (int32_t)(bits_of(small ? x * 0x1p23f : x) - 0x3F3504F3u);
        const float k = (float)(bits >> 23) - (small ? 23.0f : 0.0f);
        const float f = float_of(((uint32_t)bits & 0x7FFFFFu) + 0x3F3504F3u) - 1.0f, square = f * f;
        float y = f * 7.0376836292e-2f;
        y = (y + -1.1514610310e-1f) * f;
        y = (y + 1.1676998740e-1f) * f;
        y = (y + -1.2420140846e-1f) * f;
        y = (y + 1.4249322787e-1f) * f;
        y = (y + -1.6668057665e-1f) * f;
        y = (y + 2.0000714765e-1f) * f;
        y = (y + -2.4999993993e-1f) * f;
        y = y + 3.3333331174e-1f;
        y = y * f * square + k * LN2_LOW - square * 0.5f + f + k * LN2_HIGH;
        y = x > 0.0f ? y : (x == 0.0f ? float_of(0xFF800000u) : float_of(0x7FC00000u));
        out[i] = x == float_of(0x7F800000u) ? x : y;
    }
}

VECTOR void ichiba_erf(const float *restrict in, float *restrict out, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        const double x = (double)clamped(in[i], -3.925f, 3.925f), s = x * x;
        double p = s * 2.04600012669e-06;
        p = (p + 0.000284843006909) * s;
        p = (p + 0.0037725910546) * s;
        p = (p + 0.0527694200261) * s;
        p = (p + 0.190594918387) * s;
        p = (p + 1.12837914576) * x;
        double q = s * 3.80474626905e-05;
        q = (q + 0.00116386497035) * s;
        q = (q + 0.0149832811565) * s;
        q = (q + 0.114183173387) * s;
        q = (q + 0.502243078958) * s;
        out[i] = (float)(p / (q + 1.0));
    }
}

VECTOR void ichiba_tanh(const float *restrict in, float *restrict out, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        const double x = (double)clamped(in[i], -9.02f, 9.02f), s = x * x;
        double p = s * 1.33190700412e-08;
        p = (p + 2.0583488081e-05) * s;
        p = (p + 0.00349403536325) * s;
        p = (p + 0.133797187594) * s;
        p = (p + 0.999999979034) * x;
        double q = s * 7.76202103574e-07;
        q = (q + 0.000328309387151) * s;
        q = (q + 0.0258710766923) * s;
        q = (q + 0.467130340066) * s;
        out[i] = (float)(p / (q + 1.0));
    }
}

/* The float64 anchor that rounds to `kept` bits below the exponent of the largest magnitude (scales.py, anchor64). */
static inline double anchor(uint32_t peak, int kept) {
    const double wide = (double)float_of(peak);
    uint64_t bits;
    memcpy(&bits, &wide, 8);
    bits = peak >= 0x7F800000u ? 0x7FF8000000000000u : ((bits >> 52) + (uint64_t)(53 - kept)) << 52 | 1ull << 51;
    double value;
    memcpy(&value, &bits, 8);
    return value;
}

#define CHAINS 16 /* sums kept apart along a row; they are exact, so how many there are moves no bit */

VECTOR static float row_sum(const float *x, int64_t count, int kept) {
    uint32_t peaks[CHAINS] = {0}, peak = 0;
    double sums[CHAINS] = {0}, total = 0.0;
    int64_t k = 0;
    for (; k + CHAINS <= count; k += CHAINS)
        for (int c = 0; c < CHAINS; c++) {
            const uint32_t one = bits_of(x[k + c]) & 0x7FFFFFFFu;
            peaks[c] = one > peaks[c] ? one : peaks[c];
        }
    for (int c = 0; c < CHAINS; c++) peak = peaks[c] > peak ? peaks[c] : peak;
    for (; k < count; k++) {
        const uint32_t one = bits_of(x[k]) & 0x7FFFFFFFu;
        peak = one > peak ? one : peak;
    }
    const double a = anchor(peak, kept);
    for (k = 0; k + CHAINS <= count; k += CHAINS)
        for (int c = 0; c < CHAINS; c++) sums[c] += ((double)x[k + c] + a) - a;
    for (; k < count; k++) total += ((double)x[k] + a) - a;
    for (int c = 0; c < CHAINS; c++) total += sums[c];
    return (float)total + 0.0f;
}

#define COLUMNS 64 /* summed together: their anchors and sums stay in the first cache */

VECTOR static void column_sums(const float *x, int64_t count, int64_t stride, int64_t wide, int kept, float *out) {
    uint32_t peaks[COLUMNS] = {0};
    double anchors[COLUMNS], sums[COLUMNS] = {0};
    for (int64_t k = 0; k < count; k++)
        for (int64_t c = 0; c < wide; c++) {
            const uint32_t one = bits_of(x[k * stride + c]) & 0x7FFFFFFFu;
            peaks[c] = one > peaks[c] ? one : peaks[c];
        }
    for (int64_t c = 0; c < wide; c++) anchors[c] = anchor(peaks[c], kept);
    for (int64_t k = 0; k < count; k++)
        for (int64_t c = 0; c < wide; c++) sums[c] += ((double)x[k * stride + c] + anchors[c]) - anchors[c];
    for (int64_t c = 0; c < wide; c++) out[c] = (float)sums[c] + 0.0f;
}

void ichiba_sum(const float *in, float *out, int64_t outer, int64_t count, int64_t inner, int kept) {
    for (int64_t o = 0; o < outer; o++) {
        const float *x = in + o * count * inner;
        if (inner == 1) {
            out[o] = row_sum(x, count, kept);
            continue;
        }
        for (int64_t c = 0; c < inner; c += COLUMNS)
            column_sums(x + c, count, inner, inner - c < COLUMNS ? inner - c : COLUMNS, kept, out + o * inner + c);
    }
}

VECTOR void ichiba_uniform(uint64_t seed, uint64_t step, uint32_t stream, int64_t first, int64_t count, float *out) {
    for (int64_t at = 0; at < count; at += 4 * LANES) {
        uint32_t words[4][LANES];
        philox_blocks(seed, step, stream, (uint32_t)((first + at) / 4), words);
        float drawn[4 * LANES];
        for (int l = 0; l < LANES; l++) {
            drawn[4 * l] = (float)(int32_t)(words[0][l] >> 8) * 0x1p-24f;
            drawn[4 * l + 1] = (float)(int32_t)(words[1][l] >> 8) * 0x1p-24f;
            drawn[4 * l + 2] = (float)(int32_t)(words[2][l] >> 8) * 0x1p-24f;
            drawn[4 * l + 3] = (float)(int32_t)(words[3][l] >> 8) * 0x1p-24f;
        }
        const int64_t left = count - at < 4 * LANES ? count - at : 4 * LANES;
        memcpy(out + at, drawn, (size_t)left * sizeof(float));
    }
}
