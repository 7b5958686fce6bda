# SPDX-License-Identifier: MIT
# libturboquant-cuda.so: everything that needs CUDA, with CUDA's runtime inside. libturboquant loads it when it is first asked
# for. nvcc is called by its own rules and not as a CMake language, so that a machine without it configures as before.
find_program(TQ_NVCC nvcc HINTS $ENV{CUDA_HOME}/bin /usr/local/cuda/bin)
if(TQ_BUILD_CUDA STREQUAL "AUTO")
    # Minutes of compiling are of use only where the result can run.
    if(NOT TQ_NVCC OR CMAKE_CROSSCOMPILING OR NOT EXISTS /dev/nvidiactl)
        message(STATUS "libturboquant-cuda.so is not built: no nvcc or no NVIDIA GPU (-DTQ_BUILD_CUDA=ON needs only nvcc)")
        return()
    endif()
elseif(NOT TQ_NVCC)
    message(FATAL_ERROR "TQ_BUILD_CUDA=ON needs nvcc, which was not found. Install NVIDIA's CUDA toolkit and put nvcc on PATH, "
                        "or set CUDA_HOME or -DTQ_NVCC=/path/to/nvcc; or build without CUDA: -DTQ_BUILD_CUDA=OFF")
elseif(CMAKE_CROSSCOMPILING)
    message(FATAL_ERROR "TQ_BUILD_CUDA=ON does not work for another processor; use -DTQ_BUILD_CUDA=OFF")
endif()

# "native" is the GPUs of this machine; where there are none, all that releases are for.
set(tq_cuda_architectures ${TQ_CUDA_ARCHITECTURES})
if(tq_cuda_architectures STREQUAL "native")
    execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
                    OUTPUT_VARIABLE tq_cuda_found ERROR_QUIET RESULT_VARIABLE tq_cuda_status)
    string(REGEX MATCHALL "[0-9]+\\.[0-9]" tq_cuda_found "${tq_cuda_found}")
    if(tq_cuda_status EQUAL 0 AND tq_cuda_found)
        list(REMOVE_DUPLICATES tq_cuda_found)
        list(TRANSFORM tq_cuda_found REPLACE "\\." "")
        list(TRANSFORM tq_cuda_found REPLACE "^90$" "90a")
        list(TRANSFORM tq_cuda_found APPEND "-real" OUTPUT_VARIABLE tq_cuda_architectures)
    else()
        set(tq_cuda_architectures ${TQ_CUDA_RELEASE_ARCHITECTURES})
        message(STATUS "TQ_CUDA_ARCHITECTURES=native, but nvidia-smi shows no GPU: building for all architectures of a "
                       "release, which takes minutes; name those that you need")
    endif()
elseif(tq_cuda_architectures STREQUAL "release")
    set(tq_cuda_architectures ${TQ_CUDA_RELEASE_ARCHITECTURES})
endif()
message(STATUS "libturboquant-cuda.so is built for ${tq_cuda_architectures}")
set(tq_cuda_targets)
foreach(arch ${tq_cuda_architectures})
    if(NOT arch MATCHES "^([0-9]+[af]?)(-real|-virtual)?$")
        message(FATAL_ERROR "TQ_CUDA_ARCHITECTURES: '${arch}' is not native, release, or a number as 90a, 90a-real (machine "
                            "code only) or 90-virtual (PTX only)")
    endif()
    set(number ${CMAKE_MATCH_1})
    if(NOT CMAKE_MATCH_2 STREQUAL "-virtual")
        list(APPEND tq_cuda_targets -gencode=arch=compute_${number},code=sm_${number})
    endif()
    if(NOT CMAKE_MATCH_2 STREQUAL "-real")
        list(APPEND tq_cuda_targets -gencode=arch=compute_${number},code=compute_${number})
    endif()
endforeach()

set(tq_cuda_dir ${PROJECT_SOURCE_DIR}/src/kernels/cuda)
file(GLOB tq_cuda_headers CONFIGURE_DEPENDS ${tq_cuda_dir}/*.cuh ${tq_cuda_dir}/*.h)
set(tq_cuda_flags -std=c++17 -O3 -Xcompiler=-fPIC,-fvisibility=hidden,-Wall -I${PROJECT_SOURCE_DIR}/src
    -I${PROJECT_SOURCE_DIR}/include)
set(tq_cuda_objects)
function(tq_cuda_object name source)
    set(object ${PROJECT_BINARY_DIR}/cuda/${name}.o)
    add_custom_command(OUTPUT ${object}
        COMMAND ${CMAKE_COMMAND} -E make_directory ${PROJECT_BINARY_DIR}/cuda
        COMMAND ${TQ_NVCC} ${tq_cuda_flags} ${ARGN} -c ${tq_cuda_dir}/${source} -o ${object}
        DEPENDS ${tq_cuda_dir}/${source} ${tq_cuda_headers} ${PROJECT_SOURCE_DIR}/include/turboquant.h
        COMMENT "nvcc ${name}" VERBATIM)
    set(tq_cuda_objects ${tq_cuda_objects} ${object} PARENT_SCOPE)
endfunction()

# Attention; sources with many kernels are compiled once for each group of head_dims, of like size, the longest first. Hopper's
# prefill is by the products of warp groups that only the feature set 90a has, and its decode by the memory of a multiprocessor.
function(tq_cuda_groups name)
    foreach(group 128 64:256 192:96)
        string(REGEX REPLACE "([0-9]+):?" "X(\\1) " head_dims ${group})
        string(REPLACE ":" "_" suffix ${group})
        tq_cuda_object(${name}_${suffix} ${name}.cu "-DTQ_HEAD_DIMS(X)=${head_dims}" ${ARGN})
    endforeach()
    set(tq_cuda_objects ${tq_cuda_objects} PARENT_SCOPE)
endfunction()

set(tq_cuda_hopper)
tq_cuda_groups(decode ${tq_cuda_targets})
if(tq_cuda_architectures MATCHES "90a")
    set(tq_cuda_hopper -DTQ_CUDA_HOPPER)
    tq_cuda_groups(decode_hopper -gencode=arch=compute_90a,code=sm_90a)
    tq_cuda_groups(prefill_hopper -gencode=arch=compute_90a,code=sm_90a)
endif()
tq_cuda_object(prefill prefill.cu ${tq_cuda_targets})
tq_cuda_object(plain_attend plain_attend.cu ${tq_cuda_targets})
tq_cuda_object(entry entry.cu ${tq_cuda_targets} ${tq_cuda_hopper})
# Encoders round after each operation, as the specification does.
foreach(name trellis encode_many append plain_append pages pass)
    tq_cuda_object(${name} ${name}.cu ${tq_cuda_targets} -fmad=false)
endforeach()

set(tq_cuda_library ${PROJECT_BINARY_DIR}/libturboquant-cuda.so)
add_custom_command(OUTPUT ${tq_cuda_library}
    COMMAND ${TQ_NVCC} -shared -cudart static ${tq_cuda_targets} ${tq_cuda_objects} -o ${tq_cuda_library}
            -Xlinker=--exclude-libs=ALL
    DEPENDS ${tq_cuda_objects} COMMENT "Linking libturboquant-cuda.so" VERBATIM)
add_custom_target(turboquant_cuda ALL DEPENDS ${tq_cuda_library})

# Tests on a device; they count themselves as skipped where there is none. tests/run_all.py runs them.
if(TQ_BUILD_TESTS)
    get_filename_component(tq_cuda_root ${TQ_NVCC} DIRECTORY)
    add_executable(test_device tests/cuda/test_device.c tests/cuda/device_model.c
                   tests/cuda/device_engine.c tests/cuda/device_batches.c tests/cuda/device_prompt.c tests/unit/vectors.c)
    set_target_properties(test_device PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/tests/cuda)
    target_include_directories(test_device PRIVATE src tests/unit tests/cuda)
    target_include_directories(test_device SYSTEM PRIVATE ${tq_cuda_root}/../include)
    target_link_libraries(test_device PRIVATE turboquant_static tq_flags Threads::Threads
                          ${tq_cuda_root}/../lib64/libcudart_static.a rt m ${CMAKE_DL_LIBS})
endif()
