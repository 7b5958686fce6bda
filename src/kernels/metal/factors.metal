// SPDX-License-Identifier: MIT
/*
 * Factors of keys' channels (docs/formats.md): what is coded of a key is divided by them, and queries are multiplied. Exact
 * keys are as they came.
 */
namespace tq
{

/* 2^(step / 4): the bits of tq_channel_factor. */
inline float channel_factor(int step)
{
    int quarter = step & 3;
    uint bits = quarter == 0 ? 0x3f800000u : quarter == 1 ? 0x3f9837f0u : quarter == 2 ? 0x3fb504f3u : 0x3fd744fdu;
    return as_type<float>(bits + uint((step - quarter) / 4) * 0x800000u);
}

/*
 * x, strided, of `head`, which counts sequences times KV heads: those of a sequence are n_head_kv, with factors [n_head_kv, D].
 * sign: 1 for queries, -1 for keys.
 */
template <int D>
inline void scale_channels(thread float (&x)[lane_elements(D)], const device int8_t *factors, int n_head_kv, int head, int sign,
                           int lane)
{
    factors += head % n_head_kv * D + lane;
    for (int k = 0; k < lane_elements(D); k++) {
        if (exists<D>(32 * k + lane)) x[k] *= channel_factor(sign * int(factors[32 * k]));
    }
}

} // namespace tq
