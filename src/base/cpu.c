/* SPDX-License-Identifier: MIT */
/* Detection of instruction sets, and the cap by TQ_CPU. */
#define _DEFAULT_SOURCE

#include "base/cpu.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

static const tq_cpu_level levels[] = {
    {"scalar", 0},
#if defined(__x86_64__)
    {"avx2", TQ_CPU_AVX2},
    {"avx512", TQ_CPU_AVX2 | TQ_CPU_AVX512},
    {"amx", TQ_CPU_AVX2 | TQ_CPU_AVX512 | TQ_CPU_AMX},
#elif defined(__aarch64__)
    {"neon", TQ_CPU_NEON},
    {"dotprod", TQ_CPU_NEON | TQ_CPU_DOTPROD},
    {"i8mm", TQ_CPU_NEON | TQ_CPU_DOTPROD | TQ_CPU_I8MM},
#endif
};
enum { N_LEVELS = sizeof(levels) / sizeof(levels[0]) };

const tq_cpu_level *tq_cpu_levels(int *n_out)
{
    *n_out = N_LEVELS;
    return levels;
}

#if defined(__x86_64__)
/* The register states that the operating system saves. A CPU may have an instruction set that its system does not save. */
static uint64_t saved_states(void)
{
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

static bool has_all(uint64_t value, uint64_t bits)
{
    return (value & bits) == bits;
}

/* Linux saves AMX's registers, 8 KiB, only for processes that ask. */
static bool may_use_tiles(void)
{
#if defined(__linux__)
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 }; /* Linux's asm/prctl.h */
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return false;
#endif
}

uint32_t tq_cpu_detect(void)
{
    enum { AVX_STATES = 0x6, AVX512_STATES = 0xe6, AMX_STATES = 0x60000 };
    const uint32_t leaf1_ecx = 1u << 12 | 1u << 27 | 1u << 28 | 1u << 29;     /* FMA, OSXSAVE, AVX, F16C */
    const uint32_t leaf7_ebx = 1u << 3 | 1u << 5 | 1u << 8;                   /* BMI1, AVX2, BMI2 */
    const uint32_t leaf7_ebx_512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31; /* F, DQ, BW, VL */
    const uint32_t leaf7_ecx_512 = 1u << 1 | 1u << 11;                        /* VBMI, VNNI */
    const uint32_t leaf7_edx_amx = 1u << 24 | 1u << 25;                       /* TILE, INT8 */
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !has_all(ecx, leaf1_ecx)) return 0;
    if (!has_all(saved_states(), AVX_STATES)) return 0;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !has_all(ebx, leaf7_ebx)) return 0;
    if (!has_all(ebx, leaf7_ebx_512) || !has_all(ecx, leaf7_ecx_512)) return TQ_CPU_AVX2;
    if (!has_all(saved_states(), AVX512_STATES)) return TQ_CPU_AVX2;
    bool tiles = has_all(edx, leaf7_edx_amx) && has_all(saved_states(), AMX_STATES) && may_use_tiles();
    return TQ_CPU_AVX2 | TQ_CPU_AVX512 | (tiles ? TQ_CPU_AMX : 0);
}
#elif defined(__aarch64__)
uint32_t tq_cpu_detect(void)
{
    uint32_t flags = TQ_CPU_NEON;                                           /* part of every AArch64 application processor */
#if defined(__linux__)
    const unsigned long hwcap_asimddp = 1ul << 20, hwcap2_i8mm = 1ul << 13; /* Linux's asm/hwcap.h */
    if (getauxval(AT_HWCAP) & hwcap_asimddp) flags |= TQ_CPU_DOTPROD;
    if ((flags & TQ_CPU_DOTPROD) && (getauxval(AT_HWCAP2) & hwcap2_i8mm)) flags |= TQ_CPU_I8MM;
#endif
    return flags;
}
#else
uint32_t tq_cpu_detect(void)
{
    return 0;
}
#endif

int tq_cpu_flags(uint32_t *out)
{
    uint32_t machine = tq_cpu_detect();
    const char *cap = getenv("TQ_CPU");
    if (cap == NULL || cap[0] == '\0') {
        *out = machine;
        return 0;
    }
    for (int i = 0; i < N_LEVELS; i++) {
        if (strcmp(cap, levels[i].name) != 0) continue;
        if ((levels[i].flags & ~machine) != 0) return -1;
        *out = levels[i].flags;
        return 0;
    }
    return -1;
}

const char *tq_cpu_flags_name(uint32_t flags)
{
    const char *name = levels[0].name;
    for (int i = 0; i < N_LEVELS; i++) {
        if ((levels[i].flags & ~flags) == 0) name = levels[i].name;
    }
    return name;
}
