/* SPDX-License-Identifier: MIT */
/* A caller's configuration of AMX's tiles. ggml makes its own once in a thread, so kernels have to leave it as it was. */
#include <stdint.h>
#include <string.h>

#include "checkkern.h"

#if defined(__x86_64__)
#include <immintrin.h>

/* Palette 1, and from byte 16 on each tile's bytes a row, from byte 48 on its rows: as no kernel of ours has them. */
static const uint8_t configuration[64] = {[0] = 1, [16] = 32, [18] = 48, [48] = 7, [49] = 9};

__attribute__((target("amx-tile"))) void tiles_configure(void)
{
    _tile_loadconfig(configuration);
}

__attribute__((target("amx-tile"))) bool tiles_kept(void)
{
    uint8_t now[64] = {0};
    _tile_storeconfig(now);
    __asm__ volatile("" : "+m"(now)); /* gcc 12 believes that 8 bytes of it were written */
    return memcmp(now, configuration, sizeof(now)) == 0;
}
#else
void tiles_configure(void)
{
}

bool tiles_kept(void)
{
    return true;
}
#endif
