/* Blocks of Philox 4x32-10, LANES of them side by side: protocol/philox.py, which says where it comes from. */
#ifndef ICHIBA_PHILOX_H
#define ICHIBA_PHILOX_H
#include <stdint.h>

#define LANES 8 /* blocks drawn side by side */

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define VECTOR __attribute__((target("avx2")))

/* One block in each 64-bit lane, a word of it in the lower half; what the upper half holds never matters. */
typedef struct {
    __m256i c0, c1, c2, c3;
} philox_four;

VECTOR static inline void philox_round(philox_four *b, __m256i k0, __m256i k1) {
    const __m256i one = _mm256_mul_epu32(b->c0, _mm256_set1_epi64x(0xD2511F53));
    const __m256i two = _mm256_mul_epu32(b->c2, _mm256_set1_epi64x(0xCD9E8D57));
    b->c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(two, 32), b->c1), k0);
    b->c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(one, 32), b->c3), k1);
    b->c1 = two;
    b->c3 = one;
}

/* The lower halves of eight lanes. */
VECTOR static inline void philox_words(uint32_t *out, __m256i first, __m256i second) {
    const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
    first = _mm256_permutevar8x32_epi32(first, order);
    second = _mm256_permutevar8x32_epi32(second, order);
    _mm256_storeu_si256((__m256i *)out, _mm256_blend_epi32(first, second, 0xF0));
}

/* Blocks [block, block + LANES) of (seed, step, stream): word w of block block + l in out[w][l]. */
VECTOR static inline void philox_blocks(uint64_t seed, uint64_t step, uint32_t stream, uint32_t block,
                                        uint32_t out[4][LANES]) {
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    const __m256i number = _mm256_add_epi64(_mm256_set1_epi64x(block), _mm256_setr_epi64x(0, 1, 2, 3));
    philox_four a = {number, _mm256_set1_epi64x(stream), _mm256_set1_epi64x((int64_t)(step & 0xFFFFFFFFu)),
                     _mm256_set1_epi64x((int64_t)(step >> 32))};
    philox_four b = a;
    b.c0 = _mm256_add_epi64(number, _mm256_set1_epi64x(4));
    for (int round = 0; round < 10; round++) {
        const __m256i key0 = _mm256_set1_epi64x(k0), key1 = _mm256_set1_epi64x(k1);
        philox_round(&a, key0, key1);
        philox_round(&b, key0, key1);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    philox_words(out[0], a.c0, b.c0);
    philox_words(out[1], a.c1, b.c1);
    philox_words(out[2], a.c2, b.c2);
    philox_words(out[3], a.c3, b.c3);
}

#else
#define VECTOR

static inline void philox_blocks(uint64_t seed, uint64_t step, uint32_t stream, uint32_t block,
                                 uint32_t out[4][LANES]) {
    for (int l = 0; l < LANES; l++) {
        uint32_t c0 = block + (uint32_t)l, c1 = stream, c2 = (uint32_t)step, c3 = (uint32_t)(step >> 32);
        uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
        for (int round = 0; round < 10; round++) {
            const uint64_t one = (uint64_t)c0 * 0xD2511F53u, two = (uint64_t)c2 * 0xCD9E8D57u;
            c0 = (uint32_t)(two >> 32) ^ c1 ^ k0;
            c1 = (uint32_t)two;
            c2 = (uint32_t)(one >> 32) ^ c3 ^ k1;
            c3 = (uint32_t)one;
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        out[0][l] = c0;
        out[1][l] = c1;
        out[2][l] = c2;
        out[3][l] = c3;
    }
}
#endif
#endif
