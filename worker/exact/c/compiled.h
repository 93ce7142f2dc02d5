/* What the compiled helper offers. worker/exact/compiled.py loads it and says when it is used. Every function takes dense
 * memory of the caller's, keeps no state and may run in several threads at once. */
#ifndef ICHIBA_COMPILED_H
#define ICHIBA_COMPILED_H
#include <stdint.h>

/* Changes with every change of this interface or of a result: a library of another version is not used. */
#define ICHIBA_VERSION 1
int ichiba_version(void);

/* Whether this processor runs ichiba_product; whether it runs the others. */
int ichiba_has_products(void);
int ichiba_has_elementwise(void);

/* out[z] = a[z] @ b[z], float32 (batch, m, n) row-major, each operand rounded to `width` (8 or 15) bits a lane.
 * strides: in elements, a's batch, m, k, then b's batch, k, n; of each operand the stride of m or k (k or n) is 1.
 * k is at least 1 and at most 2^25. Returns 0, or 1 without memory. */
int ichiba_product(const float *a, const float *b, float *out, int64_t batch, int64_t m, int64_t k, int64_t n,
                   const int64_t *strides, int width);

/* Elementary functions of `count` float32 values. */
void ichiba_exp(const float *in, float *out, int64_t count);
void ichiba_log(const float *in, float *out, int64_t count);
void ichiba_erf(const float *in, float *out, int64_t count);
void ichiba_tanh(const float *in, float *out, int64_t count);

/* out (outer, inner): exact sums over the middle of float32 (outer, count, inner), each value kept to `kept` bits. */
void ichiba_sum(const float *in, float *out, int64_t outer, int64_t count, int64_t inner, int kept);

/* Numbers [first, first + count) of stream (seed, step, stream), uniform in [0, 1); first is a multiple of 4. */
void ichiba_uniform(uint64_t seed, uint64_t step, uint32_t stream, int64_t first, int64_t count, float *out);
#endif
