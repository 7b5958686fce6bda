/* SPDX-License-Identifier: MIT */
/* The rungs of the ladder above NEON: the formats whose values are bytes. Compiled for the baseline. */
#include "kernels/arm/target.h"

#if TQ_ARM_PRODUCTS
#include "kernels/arm/vec_neon.h"

#include "kernels/arm/products.h"

#define SET_PRODUCTS(index, name, level)                                \
    kernels->format[index].score = tq_score_##name##_##level;           \
    kernels->format[index].accumulate = tq_accumulate_##name##_##level; \
    kernels->format[index].expand_rows = INT32_MAX

void tq_kernels_init_dotprod(tq_kernels *kernels)
{
    SET_PRODUCTS(TQ_FORMAT_SQ8, sq8, dotprod);
    SET_PRODUCTS(TQ_FORMAT_TT4, tt4, dotprod);
    SET_PRODUCTS(TQ_FORMAT_TT3, tt3, dotprod);
    SET_PRODUCTS(TQ_FORMAT_TT2, tt2, dotprod);
}

void tq_kernels_init_i8mm(tq_kernels *kernels)
{
    SET_PRODUCTS(TQ_FORMAT_SQ8, sq8, i8mm);
    SET_PRODUCTS(TQ_FORMAT_TT4, tt4, i8mm);
    SET_PRODUCTS(TQ_FORMAT_TT3, tt3, i8mm);
    SET_PRODUCTS(TQ_FORMAT_TT2, tt2, i8mm);
}
#elif defined(__aarch64__)
#include "kernels/kernels.h"

/* What the compiler lacks stays as NEON has it. */
void tq_kernels_init_dotprod(tq_kernels *kernels)
{
    (void)kernels;
}

void tq_kernels_init_i8mm(tq_kernels *kernels)
{
    (void)kernels;
}
#else
typedef int tq_init_products_empty; /* ISO C wants a declaration in every file */
#endif
