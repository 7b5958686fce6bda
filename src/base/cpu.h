/* SPDX-License-Identifier: MIT */
/* What instruction sets this machine (and its operating system) offers, as named levels. */
#ifndef TQ_BASE_CPU_H
#define TQ_BASE_CPU_H

#include <stdint.h>

enum {
    TQ_CPU_AVX2 = 1u << 0,    /* AVX2, FMA, F16C, BMI2: Haswell class */
    TQ_CPU_AVX512 = 1u << 1,  /* F, BW, DQ, VL, VBMI, VNNI: Ice Lake class; implies TQ_CPU_AVX2 */
    TQ_CPU_AMX = 1u << 2,     /* tiles and products of bytes: Sapphire Rapids class; implies TQ_CPU_AVX512 */
    TQ_CPU_NEON = 1u << 3,    /* AArch64 Advanced SIMD with FP16 conversion */
    TQ_CPU_DOTPROD = 1u << 4, /* sdot: Armv8.4 class; implies TQ_CPU_NEON */
    TQ_CPU_I8MM = 1u << 5     /* smmla: Armv8.6 class; implies TQ_CPU_DOTPROD */
};

/* A level is a name and the set of flags up to it. The list is ordered from "scalar" (0) to the most. */
typedef struct tq_cpu_level {
    const char *name;
    uint32_t flags;
} tq_cpu_level;
/* The levels that make sense on this architecture, those that the machine lacks included. */
const tq_cpu_level *tq_cpu_levels(int *n_out);

/*
 * Flags of this machine: CPUID and XGETBV, or what Linux says of an AArch64 processor. No environment. Where there is AMX it
 * asks Linux for permission, which holds for the process: without it, its registers are not saved and using them is fatal.
 */
uint32_t tq_cpu_detect(void);
/*
 * Flags after the cap by TQ_CPU (a level's name; unset: no cap). Returns 0 and fills *out, or -1 if the
 * name is unknown or the machine lacks it.
 */
int tq_cpu_flags(uint32_t *out);
/* The name of the highest level within flags. */
const char *tq_cpu_flags_name(uint32_t flags);

#endif
