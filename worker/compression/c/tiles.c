/* Tiles in one pass over memory: the same operations in the same order as worker/compression/tiles.py, the same bits.
 * Built without contraction and without any option that lets a compiler reorder arithmetic. */
#include "tiles.h"
#include "../../exact/c/philox.h"

#include <string.h>

#define TILE 32
#define PAIR 64 /* two tiles: as many values as eight blocks of random words have halves, and whole bytes in every form */
#define TOO_LARGE 0x7F000000u /* the bits of 2^127 */
#define RADIX 12
#define GROUP_BITS 29
#define GROUP_MOST 429981696u /* 12^8 */

int ichiba_tiles_version(void) { return ICHIBA_TILES_VERSION; }

#if defined(__x86_64__) && defined(__GNUC__)
int ichiba_has_tiles(void) { return __builtin_cpu_supports("avx2"); }
#elif defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
int ichiba_has_tiles(void) { return 1; }
#else
int ichiba_has_tiles(void) { return 0; }
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

static inline int bits_of_levels(int levels) {
    int bits = 1;
    while (1 << bits < levels) bits++;
    return bits;
}

/* The bytes of the codes of `count` values. */
static int64_t code_bytes(int64_t count, int levels) {
    if (levels == RADIX) return ((count + 7) / 8 * GROUP_BITS + 7) / 8;
    return (count * bits_of_levels(levels) + 7) / 8;
}

VECTOR int ichiba_tile_scales(const float *in, int64_t count, int levels, uint16_t *scales) {
    const float most = (float)(levels - 1);
    uint32_t top = 0, all = 0;
    for (int64_t at = 0; at < count; at += TILE) {
        uint32_t peak = 0;
        if (count - at >= TILE) {
            for (int i = 0; i < TILE; i++) {
                const uint32_t one = bits_of(in[at + i]) & 0x7FFFFFFFu;
                peak = one > peak ? one : peak;
            }
        } else {
            for (int64_t i = at; i < count; i++) {
                const uint32_t one = bits_of(in[i]) & 0x7FFFFFFFu;
                peak = one > peak ? one : peak;
            }
        }
        all = peak > all ? peak : all;
        uint32_t scale = (bits_of(float_of(peak) / most) + 0xFFFFFu) >> 20;
        scale = peak && !scale ? 1 : scale;
        scales[at / TILE] = (uint16_t)scale;
        top = scale > top ? scale : top;
    }
    return all >= TOO_LARGE ? -1 : (int)top;
}

/* 16 random bits for each of the 64 values of pair number `pair`. */
VECTOR static inline void draw(uint64_t key, uint64_t step, int64_t pair, uint32_t *noise) {
    uint32_t words[4][LANES];
    philox_blocks(key, step, 0, (uint32_t)(pair * LANES), words);
    for (int l = 0; l < LANES; l++)
        for (int w = 0; w < 4; w++) {
            noise[8 * l + 2 * w] = words[w][l] & 0xFFFFu;
            noise[8 * l + 2 * w + 1] = words[w][l] >> 16;
        }
}

VECTOR static inline void round_tile(const float *in, float scale, int levels, const uint32_t *noise, uint8_t *codes) {
    const float most = (float)(levels - 1);
    const int32_t limit = (levels - 1) << 16;
    int32_t found[TILE];
    for (int i = 0; i < TILE; i++) {
        int32_t z = (int32_t)__builtin_rintf((in[i] / scale + most) * 32768.0f);
        z = z < 0 ? 0 : z;
        z = z > limit ? limit : z;
        found[i] = (z + (int32_t)noise[i]) >> 16;
    }
    for (int i = 0; i < TILE; i++) codes[i] = (uint8_t)found[i];
}

/* 64 codes to whole bytes. */
VECTOR static void pack(const uint8_t *restrict codes, int levels, uint8_t *restrict out) {
    switch (levels) {
    case 256: memcpy(out, codes, PAIR); return;
    case 16:
        for (int i = 0; i < PAIR / 2; i++) out[i] = (uint8_t)(codes[2 * i] | codes[2 * i + 1] << 4);
        return;
    case 4:
        for (int i = 0; i < PAIR / 4; i++)
            out[i] = (uint8_t)(codes[4 * i] | codes[4 * i + 1] << 2 | codes[4 * i + 2] << 4 | codes[4 * i + 3] << 6);
        return;
    default: break;
    }
    const int radix = levels == RADIX, bits = radix ? GROUP_BITS : bits_of_levels(levels);
    uint64_t held = 0;
    int have = 0;
    for (int i = 0; i < PAIR;) {
        uint32_t word = 0;
        if (radix) {
            for (int j = 7; j >= 0; j--) word = word * RADIX + codes[i + j];
            i += 8;
        } else {
            word = codes[i++];
        }
        held |= (uint64_t)word << have;
        for (have += bits; have >= 8; have -= 8, held >>= 8) *out++ = (uint8_t)held;
    }
}

/* 64 codes from whole bytes. Returns 1 if a group is no number of eight codes. */
VECTOR static int unpack(const uint8_t *restrict in, int levels, uint8_t *restrict codes) {
    switch (levels) {
    case 256: memcpy(codes, in, PAIR); return 0;
    case 16:
        for (int i = 0; i < PAIR / 2; i++) {
            codes[2 * i] = in[i] & 15;
            codes[2 * i + 1] = in[i] >> 4;
        }
        return 0;
    case 4:
        for (int i = 0; i < PAIR / 4; i++)
            for (int j = 0; j < 4; j++) codes[4 * i + j] = in[i] >> (2 * j) & 3;
        return 0;
    default: break;
    }
    const int radix = levels == RADIX, bits = radix ? GROUP_BITS : bits_of_levels(levels);
    uint64_t held = 0;
    int have = 0, bad = 0;
    for (int i = 0; i < PAIR;) {
        for (; have < bits; have += 8) held |= (uint64_t)*in++ << have;
        uint32_t word = (uint32_t)held & ((1u << bits) - 1);
        held >>= bits;
        have -= bits;
        if (radix) {
            bad |= word >= GROUP_MOST;
            for (int j = 0; j < 8; j++, word /= RADIX) codes[i++] = (uint8_t)(word % RADIX);
        } else {
            codes[i++] = (uint8_t)word;
        }
    }
    return bad;
}

VECTOR void ichiba_tile_encode(const float *in, int64_t first, int64_t count, int levels, int base,
                               const uint16_t *scales, uint64_t key, uint64_t step, uint8_t *bytes, uint8_t *codes) {
    const int64_t whole = code_bytes(PAIR, levels);
    for (int64_t at = 0; at < count; at += PAIR) {
        const int64_t left = count - at < PAIR ? count - at : PAIR;
        float held[PAIR];
        const float *x = in + at;
        if (left < PAIR) {
            memset(held, 0, sizeof held);
            memcpy(held, x, (size_t)left * 4);
            x = held;
        }
        uint32_t noise[PAIR];
        uint8_t found[PAIR] = {0}, packed[PAIR];
        draw(key, step, (first + at) / PAIR, noise);
        for (int64_t t = 0; t * TILE < left; t++) {
            const int64_t tile = at / TILE + t;
            const int scale = scales[tile], byte = scale - base;
            bytes[tile] = (uint8_t)(scale ? (byte < 1 ? 1 : byte) : 0);
            if (scale)
                round_tile(x + t * TILE, float_of((uint32_t)(base + bytes[tile]) << 20), levels, noise + t * TILE,
                           found + t * TILE);
        }
        for (int64_t i = left; i < PAIR; i++) found[i] = 0;
        pack(found, levels, left == PAIR ? codes + at / PAIR * whole : packed);
        if (left < PAIR) memcpy(codes + at / PAIR * whole, packed, (size_t)code_bytes(left, levels));
    }
}

VECTOR int ichiba_tile_decode(const uint8_t *bytes, const uint8_t *codes, int64_t first, int64_t count, int levels,
                              int base, uint64_t key, uint64_t step, float *out) {
    const int64_t whole = code_bytes(PAIR, levels);
    int bad = 0;
    for (int64_t at = 0; at < count; at += PAIR) {
        const int64_t left = count - at < PAIR ? count - at : PAIR;
        uint8_t packed[PAIR] = {0}, found[PAIR];
        const uint8_t *from = codes + at / PAIR * whole;
        if (left < PAIR) {
            memcpy(packed, from, (size_t)code_bytes(left, levels));
            from = packed;
        }
        bad |= unpack(from, levels, found);
        float values[PAIR];
        uint32_t noise[PAIR];
        draw(key, step, (first + at) / PAIR, noise);
        for (int t = 0; t < 2; t++) {
            if (t * TILE >= left) break;
            const uint8_t byte = bytes[at / TILE + t];
            const float scale = byte ? float_of((uint32_t)(base + byte) << 20) : 0.0f;
            int32_t any = 0;
            for (int i = 0; i < TILE; i++) {
                const int32_t code = found[t * TILE + i];
                any |= code;
                /* Below 2^24, so that its float is exact and one operation rounds. */
                const int32_t z = (2 * code + 1 - levels) * 65536 + 65535 - 2 * (int32_t)noise[t * TILE + i];
                values[t * TILE + i] = byte ? (float)z * 0x1p-16f * scale : 0.0f;
            }
            bad |= !byte && any;
        }
        for (int64_t i = left; i < PAIR; i++) bad |= found[i];
        memcpy(out + at, values, (size_t)left * 4);
    }
    return bad != 0;
}
