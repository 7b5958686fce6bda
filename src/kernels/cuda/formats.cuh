/* SPDX-License-Identifier: MIT */
/*
 * A pair of formats, as attention's kernels see it: known when a kernel is compiled (known_pair), or only when it runs
 * (any_pair). Either has the bytes of a record and of the tables, the steps of levels, and calls with the types of the codes.
 * any_pair chooses them by a switch that all threads take the same way, once for a half of a record and not for each code, so
 * that one kernel a head_dim serves all pairs.
 */
#ifndef TQ_KERNELS_CUDA_FORMATS_CUH
#define TQ_KERNELS_CUDA_FORMATS_CUH

#include "kernels/cuda/attend_args.cuh"
#include "kernels/cuda/expand.cuh"
#include "kernels/cuda/trellis_codes.cuh"

/* The names in pairs.h. */
using sq8 = scalar_codes<8>;
using sq4 = scalar_codes<4>;
using sq3 = scalar_codes<3>;
using sq2 = scalar_codes<2>;
using tt4 = trellis_codes<4>;
using tt3 = trellis_codes<3>;
using tt2 = trellis_codes<2>;

template <class C> constexpr int kind_of = codes_kind(C::bits, C::is_trellis);

__host__ __device__ constexpr float step_of_kind(int kind)
{
    return kind == kind_of<sq4> ? sq4::step : kind == kind_of<sq3> ? sq3::step : kind == kind_of<sq2> ? sq2::step : 1.0f;
}

__host__ __device__ constexpr float step_inverse_of_kind(int kind)
{
    constexpr float of4 = 1.0f / sq4::step, of3 = 1.0f / sq3::step, of2 = 1.0f / sq2::step;
    return kind == kind_of<sq4> ? of4 : kind == kind_of<sq3> ? of3 : kind == kind_of<sq2> ? of2 : 1.0f;
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
    case kind_of<sq8>:
        return use(sq8());
    case kind_of<sq4>:
        return use(sq4());
    case kind_of<sq3>:
        return use(sq3());
    default:
        return use(sq2());
    }
}

constexpr int record_bytes_of(int head_dim, int bits)
{
    return 4 * head_dim * bits + 2 * TQ_RECORD_SCALE_BYTES;
}

/* The tables of keys and of values; those of the same trellis are one. */
template <int N_COPIES> struct key_value_tables {
    window_table<N_COPIES> key, value;
};

template <class K, class V, int D, int N_COPIES> struct known_pair {
    using table = window_table<N_COPIES>;
    using tables = key_value_tables<N_COPIES>;
    static constexpr int key_bytes = 4 * D * K::bits, value_bytes = 4 * D * V::bits;
    static constexpr int record_bytes = record_bytes_of(D, K::bits + V::bits);
    static constexpr bool has_key_table = K::is_trellis, has_value_table = V::is_trellis && kind_of<K> != kind_of<V>;
    static constexpr int table_bytes = (has_key_table + has_value_table) * table::bytes;
    static constexpr float key_step = K::step, value_step = V::step, key_step_inverse = 1.0f / K::step;

    known_pair() = default;
    __host__ __device__ explicit known_pair(const attend_args &) {}
    /* Bytes of the tables and of n records, at most. */
    static constexpr int room(int n)
    {
        return table_bytes + n * record_bytes;
    }
    template <typename Use> __device__ __forceinline__ void with_keys(const Use &use) const
    {
        use(K());
    }
    template <typename Use> __device__ __forceinline__ void with_values(const Use &use) const
    {
        use(V());
    }
};

/* D, DV: head_dims of keys and of values. */
template <int D, int N_COPIES, int DV = D> struct any_pair {
    static_assert(DV <= D, "or room() is too little");
    using table = window_table<N_COPIES>;
    using tables = key_value_tables<N_COPIES>;
    int key_kind, value_kind, key_bytes, value_bytes, record_bytes, table_bytes;
    bool has_key_table, has_value_table;
    float key_step, value_step, key_step_inverse;

    __host__ __device__ any_pair(int k, int v)
        : key_kind(k), value_kind(v), key_bytes(4 * D * kind_bits(k)), value_bytes(4 * DV * kind_bits(v)),
          record_bytes(key_bytes + value_bytes + 2 * TQ_RECORD_SCALE_BYTES), has_key_table(kind_is_trellis(k)),
          has_value_table(kind_is_trellis(v) && v != k), key_step(step_of_kind(k)), value_step(step_of_kind(v)),
          key_step_inverse(step_inverse_of_kind(k))
    {
        table_bytes = (has_key_table + has_value_table) * table::bytes;
    }
    __host__ __device__ explicit any_pair(const attend_args &args) : any_pair(args.key_kind, args.value_kind) {}
    /* Of the pairs with no table, one (sq8/tt4) and two (tt4/tt3) that have the largest records. */
    static constexpr int room(int n)
    {
        int none = n * record_bytes_of(D, 16), one = table::bytes + n * record_bytes_of(D, 12);
        int two = 2 * table::bytes + n * record_bytes_of(D, 7), larger = one > two ? one : two;
        return D % 64 == 0 && larger > none ? larger : none;
    }
    template <typename Use> __device__ __forceinline__ void with_keys(const Use &use) const
    {
        with_codes<D>(key_kind, use);
    }
    template <typename Use> __device__ __forceinline__ void with_values(const Use &use) const
    {
        with_codes<DV>(value_kind, use);
    }
};

/* The whole block; a barrier must follow before the first look-up. */
template <class P> __device__ __forceinline__ void fill_tables(const P &pair, uint8_t *memory, const int8_t (&windows)[2][256])
{
    if (pair.has_key_table) P::table::fill(memory, windows[0]);
    if (pair.has_value_table) P::table::fill(memory + (pair.has_key_table ? P::table::bytes : 0), windows[1]);
}

template <class P>
__device__ __forceinline__ typename P::tables tables_at(const P &pair, const uint8_t *memory, int lane)
{
    const uint8_t *value = memory + (pair.has_key_table && pair.has_value_table ? P::table::bytes : 0);
    return {P::table::at(memory, lane), P::table::at(value, lane)};
}

#endif
