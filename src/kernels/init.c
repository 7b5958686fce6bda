/* SPDX-License-Identifier: MIT */
/* Dispatch: a ladder of instruction sets, each rung replacing what it does better than the one below. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/cpu.h"
#include "base/log.h"
#include "kernels/arm/target.h"
#include "kernels/kernels.h"

void tq_kernels_init(tq_kernels *kernels, uint32_t cpu_flags)
{
    (void)cpu_flags;
    tq_kernels_init_scalar(kernels);
#if defined(__x86_64__)
    if (cpu_flags & TQ_CPU_AVX2) tq_kernels_init_avx2(kernels);
    if (cpu_flags & TQ_CPU_AVX512) tq_kernels_init_avx512(kernels);
    if (cpu_flags & TQ_CPU_AMX) tq_kernels_init_amx(kernels);
#elif defined(__aarch64__)
    if (cpu_flags & TQ_CPU_NEON) tq_kernels_init_neon(kernels);
#if TQ_ARM_PRODUCTS
    if (cpu_flags & TQ_CPU_DOTPROD) tq_kernels_init_dotprod(kernels);
    if (cpu_flags & TQ_CPU_I8MM) tq_kernels_init_i8mm(kernels);
#endif
#endif
}

static pthread_once_t machine_once = PTHREAD_ONCE_INIT;
static tq_kernels machine_kernels, scalar_kernels;
static bool machine_is_valid;
static char refused_cap[32]; /* what TQ_CPU held, for the message */

static void init_machine(void)
{
    uint32_t flags;
    tq_kernels_init(&scalar_kernels, 0);
    machine_is_valid = tq_cpu_flags(&flags) == 0;
    if (machine_is_valid) {
        tq_kernels_init(&machine_kernels, flags);
    } else {
        snprintf(refused_cap, sizeof(refused_cap), "%s", getenv("TQ_CPU"));
    }
}

static void log_refusal(void)
{
    char list[64];
    size_t used = 0;
    int n;
    uint32_t machine = tq_cpu_detect();
    const tq_cpu_level *levels = tq_cpu_levels(&n);
    for (int i = 0; i < n; i++) {
        if ((levels[i].flags & ~machine) != 0) continue;
        used += (size_t)snprintf(list + used, sizeof(list) - used, "%s%s", i == 0 ? "" : ", ", levels[i].name);
    }
    tq_log(TQ_LOG_ERROR, "TQ_CPU=%s is not an instruction set of this machine: it has %s; unset TQ_CPU to use the best",
           refused_cap, list);
}

const tq_kernels *tq_kernels_get(int32_t head_dim, int32_t head_dim_v)
{
    pthread_once(&machine_once, init_machine);
    bool is_whole = head_dim % TQ_KERNELS_STEP == 0 && head_dim_v % TQ_KERNELS_STEP == 0;
    if (machine_is_valid) return is_whole ? &machine_kernels : &scalar_kernels;
    log_refusal();
    return NULL;
}
