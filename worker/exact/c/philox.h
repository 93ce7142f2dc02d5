/* Blocks of Philox 4x32-10, LANES of them side by side: protocol/philox.py, which says where it comes from. */
#ifndef ICHIBA_PHILOX_H
#define ICHIBA_PHILOX_H
#include <stdint.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define VECTOR __attribute__((target("avx2")))
#else
#define VECTOR
#endif

#define LANES 8 /* blocks drawn side by side */

/* Blocks [block, block + LANES) of (seed, step, stream): word w of block block + l in out[w][l]. */
VECTOR static inline void philox_blocks(uint64_t seed, uint64_t step, uint32_t stream, uint32_t block,
                                        uint32_t out[4][LANES]) {
    uint32_t c0[LANES], c1[LANES], c2[LANES], c3[LANES];
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int l = 0; l < LANES; l++) {
        c0[l] = block + (uint32_t)l;
        c1[l] = stream;
        c2[l] = (uint32_t)step;
        c3[l] = (uint32_t)(step >> 32);
    }
    for (int round = 0; round < 10; round++) {
        for (int l = 0; l < LANES; l++) {
            const uint64_t one = (uint64_t)c0[l] * 0xD2511F53u, two = (uint64_t)c2[l] * 0xCD9E8D57u;
            const uint32_t high0 = (uint32_t)(two >> 32) ^ c1[l] ^ k0, high2 = (uint32_t)(one >> 32) ^ c3[l] ^ k1;
            c0[l] = high0;
            c1[l] = (uint32_t)two;
            c2[l] = high2;
            c3[l] = (uint32_t)one;
        }
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    for (int l = 0; l < LANES; l++) {
        out[0][l] = c0[l];
        out[1][l] = c1[l];
        out[2][l] = c2[l];
        out[3][l] = c3[l];
    }
}
#endif
