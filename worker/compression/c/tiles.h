/* What the compiled tiles offer. worker/compression/compiled.py loads it, tiles.py beside it does the same in numpy and
 * says what each number means. Every function takes dense memory of the caller's, keeps no state and may run in several
 * threads at once. `levels` 4, 8, 16, 64 or 256 is a form of plain codes, 12 the one of eight codes in 29 bits. */
#ifndef ICHIBA_TILES_H
#define ICHIBA_TILES_H
#include <stdint.h>

/* Changes with every change of this interface or of a result: a library of another version is not used. */
#define ICHIBA_TILES_VERSION 2
int ichiba_tiles_version(void);

/* Whether this processor runs the rest. */
int ichiba_has_tiles(void);

/* scales: one for each 32 of the `count` values, the last tile may be shorter. Returns the largest, or -1 if a value is
 * not finite or at least 2^127. */
int ichiba_tile_scales(const float *in, int64_t count, int levels, uint16_t *scales);

/* Codes and scale bytes of `count` values from value `first`, a multiple of 64, of the tensor on; in, scales, bytes and
 * codes are those of the values at hand. */
void ichiba_tile_encode(const float *in, int64_t first, int64_t count, int levels, int base, const uint16_t *scales,
                        uint64_t key, uint64_t step, uint8_t *bytes, uint8_t *codes);

/* `count` values from scale bytes and codes, from value `first` on likewise. Returns 0, or 1 where the codes are none of
 * this form. */
int ichiba_tile_decode(const uint8_t *bytes, const uint8_t *codes, int64_t first, int64_t count, int levels, int base,
                       uint64_t key, uint64_t step, float *out);
#endif
