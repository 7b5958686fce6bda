/* SPDX-License-Identifier: MIT */
/*
 * Decode attention for pairs of formats that have no kernel of their own: formats are looked at when the kernel runs. Its code
 * holds each half of a record (scores of keys, sums of values) once for each format, in a switch that all threads take the
 * same way, so that one kernel a head_dim serves all pairs. Trellises are looked up one window at a time. Expected bound:
 * instruction issue.
 */
#ifndef TQ_KERNELS_CUDA_DECODE_ANY_CUH
#define TQ_KERNELS_CUDA_DECODE_ANY_CUH

#include "kernels/cuda/decode.cuh"
#include "kernels/cuda/pairs.cuh"

__host__ __device__ constexpr float step_of_kind(int kind)
{
    return kind == kind_of<tq4> ? tq4::step : kind == kind_of<tq3> ? tq3::step : kind == kind_of<tq2> ? tq2::step : 1.0f;
}

/* use(codes) with the type of the kind, among those that head_dim D has. */
template <int D, typename Use> __device__ __forceinline__ void with_codes(int kind, const Use &use)
{
    if constexpr (D % 64 == 0) {
        switch (kind) {
        case kind_of<tt4>:
            return use(tt4());
        case kind_of<tt3>:
            return use(tt3());
        case kind_of<tt2>:
            return use(tt2());
        default:
            break;
        }
    }
    switch (kind) {
    case kind_of<tq8>:
        return use(tq8());
    case kind_of<tq4>:
        return use(tq4());
    case kind_of<tq3>:
        return use(tq3());
    default:
        return use(tq2());
    }
}

template <int D> struct any_formats {
    struct tables {
        window_table key, value;
    };
    static constexpr bool is_known = false, is_large = false;
    static constexpr int n_stages = D <= 64 ? 2 : 1; /* records of more than 4 KB are long enough alone */
    int key_kind, value_kind, key_bytes, value_bytes, record_bytes, table_bytes;
    bool has_key_table, has_value_table; /* values of the keys' trellis share its table */
    float key_step, value_step;

    __host__ __device__ explicit any_formats(const attend_args &args)
        : key_kind(args.key_kind), value_kind(args.value_kind), key_bytes(4 * D * kind_bits(key_kind)),
          value_bytes(4 * D * kind_bits(value_kind)), record_bytes(key_bytes + value_bytes + 2 * TQ_RECORD_SCALE_BYTES),
          has_key_table(kind_is_trellis(key_kind)), has_value_table(kind_is_trellis(value_kind) && value_kind != key_kind),
          key_step(step_of_kind(key_kind)), value_step(step_of_kind(value_kind))
    {
        table_bytes = (has_key_table + has_value_table) * TQ_WINDOW_TABLE_BYTES;
    }
    /* The whole block; a barrier must follow before the first look-up. */
    __device__ __forceinline__ tables open_tables(uint8_t *memory, const attend_args &args, int lane) const
    {
        uint8_t *value = memory + (has_key_table && has_value_table ? TQ_WINDOW_TABLE_BYTES : 0);
        if (has_key_table) fill_window_table(memory, args.windows[0]);
        if (has_value_table) fill_window_table(value, args.windows[1]);
        return {{memory + 4 * lane}, {value + 4 * lane}};
    }
    __device__ __forceinline__ void score(float (&s)[8], const query_operand<D> &q, const uint8_t *plane,
                                          const float (&key_scales)[8], const tables &tables, int lane) const
    {
        with_codes<D>(key_kind, [&](auto codes) {
            score_record<decltype(codes), D>(s, q, plane, key_scales, tables.key, lane);
        });
    }
    __device__ __forceinline__ void add(warp_accumulator<D> &acc, const uint8_t *plane, const uint32_t (&weights)[4],
                                        const tables &tables, int lane) const
    {
        with_codes<D>(value_kind, [&](auto codes) {
            add_values<decltype(codes), D>(acc, plane, weights, tables.value, lane);
        });
    }
};

#endif
