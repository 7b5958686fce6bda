// SPDX-License-Identifier: MIT
TQ_SHARED(shared, tq::code_memory<D>);
tq::encode_task task = {rows, refs, signs, (const device tq::encode_params *)params, codes, scales};
tq::encode_scalar<D, FORMAT, HAS_REF>(task, shared, threadgroup_position_in_grid, int(thread_index_in_simdgroup));
