/* SPDX-License-Identifier: MIT */
/* Weighted sums for NEON with i8mm (smmla): accumulate_products.h on products_i8mm.h. */
#include "kernels/arm/target.h"

#if TQ_ARM_PRODUCTS
#include "kernels/arm/vec_neon.h"

#include "kernels/arm/products.h"

TQ_TARGET_BEGIN_I8MM
#include "kernels/arm/products_i8mm.h"

#include "kernels/arm/accumulate_products.h"
TQ_TARGET_END
#else
typedef int tq_accumulate_i8mm_empty; /* ISO C wants a declaration in every file */
#endif
