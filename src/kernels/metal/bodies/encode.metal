// SPDX-License-Identifier: MIT
TQ_SHARED(shared, tq::code_memory<D>);
tq::encode_params p = {params[0], params[1], params[2], params[3], params[4], params[5]};
tq::encode_task task = {rows, refs, factors, signs, p, codes, scales};
tq::encode_scalar<D, FORMAT, HAS_REF, HAS_FACTORS>(task, shared, threadgroup_position_in_grid, int(thread_index_in_simdgroup));
