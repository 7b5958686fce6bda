/* SPDX-License-Identifier: MIT */
/* AMX: many rows of the formats whose values are bytes. */
#include "kernels/x86/target.h"

#if TQ_ARCH_X86
TQ_TARGET_BEGIN_AMX
#include "kernels/x86/vec_avx512.h"

#include "kernels/x86/accumulate_amx.h"
#include "kernels/x86/score_amx.h"

TQ_BYTE_FORMATS(BYTE_KERNELS)
TQ_TARGET_END

void tq_kernels_init_amx(tq_kernels *kernels)
{
    TQ_BYTE_FORMATS(SET_BYTE_KERNELS)
}
#endif
