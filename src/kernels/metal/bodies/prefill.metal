// SPDX-License-Identifier: MIT
TQ_SHARED(shared, tq::prefill_memory<D>);
tq::kv_arrays kv = {k_codes, k_scales, refs, v_codes, v_scales, k_exact, v_exact, factors, signs};
tq::prefill<D, KF, VF, HAS_REF, HAS_FACTORS>(q, kv, sinks, tq::attend_params_of(params), out, shared,
                                             threadgroup_position_in_grid, int(simdgroup_index_in_threadgroup),
                                             int(thread_index_in_simdgroup));
