/* SPDX-License-Identifier: MIT */
/* Guarded memory and generated inputs. */
#define _DEFAULT_SOURCE
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "checkkern.h"

enum { ARENA_BYTES = 1 << 20, MARGIN = 256, CANARY = 0xa5 };

void arena_init(arena *a)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    uint8_t *p = mmap(NULL, ARENA_BYTES + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED || mprotect(p + page, ARENA_BYTES, PROT_READ | PROT_WRITE) != 0) {
        perror("checkkern: mmap");
        exit(2);
    }
    a->base = a->data = p + page;
    a->bytes = 0;
}

void *arena_take(arena *a, size_t bytes, size_t alignment, placement where)
{
    if (bytes + 4 * MARGIN > ARENA_BYTES) {
        fprintf(stderr, "checkkern: a buffer of %zu bytes is larger than an arena\n", bytes);
        exit(2);
    }
    size_t at = where == PLACE_START ? 0 : where == PLACE_END ? (size_t)ARENA_BYTES - bytes : MARGIN + alignment;
    a->data = a->base + at;
    a->bytes = bytes;
    size_t first = at > MARGIN ? at - MARGIN : 0;
    size_t last = at + bytes + MARGIN < ARENA_BYTES ? at + bytes + MARGIN : ARENA_BYTES;
    memset(a->base + first, CANARY, last - first);
    return a->data;
}

bool arena_intact(const arena *a)
{
    size_t at = (size_t)(a->data - a->base);
    for (size_t i = 1; i <= MARGIN && i <= at; i++) {
        if (a->data[-(ptrdiff_t)i] != CANARY) return false;
    }
    for (size_t i = at + a->bytes; i < ARENA_BYTES && i < at + a->bytes + MARGIN; i++) {
        if (a->base[i] != CANARY) return false;
    }
    return true;
}

void *take_input(env *e, int i, size_t bytes, size_t alignment)
{
    return arena_take(&e->in[i], bytes, alignment, e->shape.placement);
}

void take_output(env *e, int i, size_t bytes, size_t alignment)
{
    for (int which = 0; which < 2; which++) arena_take(&e->out[which][i], bytes, alignment, e->shape.placement);
}

float *input_floats(env *e, int i, int64_t n)
{
    return take_input(e, i, (size_t)n * sizeof(float), sizeof(float));
}

float *output_floats(env *e, int which, int i)
{
    return (float *)(void *)e->out[which][i].data;
}

/* splitmix64 (Steele, Lea, Flood 2014) */
uint64_t random_bits(env *e)
{
    uint64_t z = e->random += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

float random_uniform(env *e)
{
    return (float)(random_bits(e) >> 40) * 0x1p-24f;
}

/* Close enough to a normal value, cheap, and the same everywhere: the sum of 4 uniform values, of variance 1. */
float random_normal(env *e)
{
    float sum = -2.0f;
    for (int i = 0; i < 4; i++) sum += random_uniform(e);
    return sum * 1.7320508f;
}

static float generate_one(env *e, int64_t channel)
{
    switch (e->shape.generator) {
    case GEN_ZERO:
        return random_bits(e) & 1 ? 0.0f : -0.0f;
    case GEN_TINY:
        return ldexpf(random_normal(e), -(int)(random_bits(e) % 4) * 15 - 100); /* down to subnormals */
    case GEN_HUGE:
        return fmaxf(-65504.0f, fminf(65504.0f, 6e4f * random_normal(e)));
    case GEN_OUTLIER:
        return random_normal(e) * (channel % 37 == 5 ? 80.0f : 1.0f);
    default:
        return random_normal(e);
    }
}

void generate(env *e, float *x, int64_t n_rows, int64_t n, int64_t stride)
{
    for (int64_t r = 0; r < n_rows; r++) {
        for (int64_t i = 0; i < n; i++) x[r * stride + i] = generate_one(e, i);
        if (r == n_rows - 1) break;
        for (int64_t i = n; i < stride; i++) x[r * stride + i] = NAN;
    }
}

tq_block input_block(env *e)
{
    return (tq_block){.codes = e->in[0].data, .scales = e->codec->traits->n_scales ? (uint16_t *)(void *)e->in[1].data : NULL};
}

tq_block generate_block(env *e)
{
    size_t n = (size_t)e->shape.n;
    uint8_t *codes = take_input(e, 0, n * e->codec->code_bytes, 1);
    uint16_t *scales = take_input(e, 1, n * (size_t)e->codec->traits->n_scales * sizeof(uint16_t), sizeof(uint16_t));
    if (e->codec->traits->family == TQ_FAMILY_TRELLIS) {
        /* Any circle of bits is one that an encoder may write, and the search for the best is slow in the specification. */
        for (size_t i = 0; i < n * e->codec->code_bytes; i++) codes[i] = (uint8_t)random_bits(e);
        for (size_t i = 0; i < n; i++) scales[i] = (uint16_t)(0x1000 + random_bits(e) % 0x4000);
        return input_block(e);
    }
    for (size_t i = 0; i < n; i++) {
        float x[TQ_HEAD_DIM_MAX];
        generate(e, x, 1, e->codec->head_dim, 0);
        tq_vector_encode(e->codec, x, codes + i * e->codec->code_bytes, scales + i * (size_t)e->codec->traits->n_scales);
    }
    return input_block(e);
}
