// SPDX-License-Identifier: MIT
TQ_SHARED(shared, tq::code_memory<D>);
tq::reference_params p = {params[0], params[1], params[2], params[3]};
tq::encode_reference<D, HAS_FACTORS>(rows, starts, factors, signs, p, refs, shared, threadgroup_position_in_grid,
                                     int(thread_index_in_simdgroup));
