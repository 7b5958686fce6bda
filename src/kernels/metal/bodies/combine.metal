// SPDX-License-Identifier: MIT
tq::combine<D>(partial, signs, *(const device tq::attend_params *)params, out, threadgroup_position_in_grid,
               int(thread_index_in_simdgroup));
