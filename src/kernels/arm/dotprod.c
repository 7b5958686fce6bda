/* SPDX-License-Identifier: MIT */
/* NEON with dotprod (sdot): the formats whose values are bytes. */
#include "kernels/arm/target.h"

#if TQ_ARM_PRODUCTS
#include "kernels/arm/vec_neon.h"

TQ_TARGET_BEGIN_DOTPROD
#include "kernels/arm/products_dotprod.h"

#include "kernels/arm/accumulate_products.h"
#include "kernels/arm/score_products.h"

TQ_BYTE_FORMATS(BYTE_KERNELS)
TQ_TARGET_END

void tq_kernels_init_dotprod(tq_kernels *kernels)
{
    TQ_BYTE_FORMATS(SET_BYTE_KERNELS)
}
#endif
