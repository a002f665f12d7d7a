/* What memory gives: four arrays read and two of them written, in place, as the plain step of `anon.c` does, with one sum each. */
#include <stdint.h>

#include <omp.h>

#define CHUNK 65536 /* elements that a thread takes at a time, as in `anon.c` */

static void add(float *restrict a, const float *restrict b, float *restrict c, const float *restrict d, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        a[i] += b[i];
        c[i] += d[i];
    }
}

void stream(float *a, const float *b, float *c, const float *d, int64_t n, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t i = 0; i < n; i += CHUNK) add(a + i, b + i, c + i, d + i, n - i < CHUNK ? n - i : CHUNK);
}
