// SPDX-License-Identifier: MIT
TQ_SHARED(shared, tq::trellis_memory<D, tq::bits_of(FORMAT)>);
tq::encode_task task = {rows, refs, signs, (const device tq::encode_params *)params, codes, scales};
tq::encode_trellis<D, FORMAT, HAS_REF>(task, shared, threadgroup_position_in_grid, int(thread_index_in_simdgroup));
