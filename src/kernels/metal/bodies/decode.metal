// SPDX-License-Identifier: MIT
TQ_SHARED(shared, tq::decode_memory<D, ROWS>);
tq::kv_arrays kv = {k_codes, k_scales, refs, v_codes, v_scales, k_exact, v_exact, factors, signs};
tq::decode<D, KF, VF, HAS_REF, HAS_FACTORS, ROWS>(q, kv, tq::attend_params_of(params), partial, shared,
                                     threadgroup_position_in_grid, int(simdgroup_index_in_threadgroup),
                                     int(thread_index_in_simdgroup));
