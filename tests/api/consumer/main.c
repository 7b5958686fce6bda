/* SPDX-License-Identifier: MIT */
/* A program that uses the installed library: prints its version, and encodes and decodes a vector. */
#include <stdio.h>
#include <turboquant.h>

int main(void)
{
    float x[64] = {1.0f}, y[64];
    unsigned char bytes[256];
    tq_codec *codec = NULL;
    if (tq_codec_create(&codec, TQ_FORMAT_SQ4, 64, TQ_SEED_DEFAULT) != TQ_OK) return 1;
    if (tq_codec_encode(codec, x, 1, bytes) != TQ_OK || tq_codec_decode(codec, bytes, 1, y) != TQ_OK) return 2;
    tq_codec_free(codec);
    printf("%s on %s\n", tq_version_string(), tq_cpu_name());
    return y[0] > 0.5f && y[0] < 1.5f ? 0 : 3;
}
