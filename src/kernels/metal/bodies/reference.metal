// SPDX-License-Identifier: MIT
TQ_SHARED(shared, tq::code_memory<D>);
tq::encode_reference<D>(rows, starts, signs, *(const device tq::reference_params *)params, refs, shared,
                        threadgroup_position_in_grid, int(thread_index_in_simdgroup));
