// SPDX-License-Identifier: MIT
tq::combine<D>(partial, signs, sinks, tq::attend_params_of(params), out, threadgroup_position_in_grid,
               int(thread_index_in_simdgroup));
