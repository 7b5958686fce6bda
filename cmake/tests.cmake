# SPDX-License-Identifier: MIT
# Test programs: tests/unit/test_*.c are one program each (the other .c files there are shared by all), tests/kernels is
# checkkern, fuzz/fuzz_*.c are one program each, examples/*.c likewise. tests/run_all.py runs them.
set(tq_test_dir ${PROJECT_BINARY_DIR}/tests)

# All of this, and what the tests run: the target of `make check` and `make test`. CUDA's library is not among it.
add_custom_target(tests)
add_dependencies(tests product_without_cuda)

function(tq_add_program name)
    cmake_parse_arguments(arg "" "DIR" "SOURCES;LIBRARIES;INCLUDES" ${ARGN})
    add_executable(${name} ${arg_SOURCES})
    add_dependencies(tests ${name})
    set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${arg_DIR})
    target_include_directories(${name} PRIVATE ${arg_INCLUDES})
    target_link_libraries(${name} PRIVATE turboquant_static tq_flags ${arg_LIBRARIES} Threads::Threads m)
endfunction()

if(CMAKE_CROSSCOMPILING)
    set(TQ_CMOCKA "")
    set(tq_cmocka_include tests/cross)
    # gcc 12 for AArch64 stops with an internal error when it vectorizes sums in the tests.
    add_compile_options(-fno-tree-vectorize)
else()
    find_library(TQ_CMOCKA cmocka)
endif()
file(GLOB tq_unit_tests CONFIGURE_DEPENDS tests/unit/test_*.c)
file(GLOB tq_unit_shared CONFIGURE_DEPENDS tests/unit/*.c)
list(REMOVE_ITEM tq_unit_shared ${tq_unit_tests} "")
if(TQ_CMOCKA OR CMAKE_CROSSCOMPILING)
    foreach(source ${tq_unit_tests})
        get_filename_component(name ${source} NAME_WE)
        tq_add_program(${name} DIR ${tq_test_dir}/unit SOURCES ${source} ${tq_unit_shared} LIBRARIES ${TQ_CMOCKA}
                       INCLUDES src tests tests/unit ${tq_cmocka_include})
        add_test(NAME ${name} COMMAND ${name} WORKING_DIRECTORY ${PROJECT_SOURCE_DIR})
    endforeach()
    # It needs nothing of ggml.
    target_sources(test_gpu_cells PRIVATE plugins/ggml/gpu_cells.c)
    target_include_directories(test_gpu_cells PRIVATE plugins/ggml)
    # Written from the public header, so that no function is left out.
    find_package(Python3 COMPONENTS Interpreter)
    if(Python3_FOUND)
        set(tq_hostile ${PROJECT_BINARY_DIR}/test_hostile.c)
        set(tq_hostile_from ${PROJECT_SOURCE_DIR}/tests/hostile/generate.py ${PROJECT_SOURCE_DIR}/include/turboquant.h
            ${PROJECT_SOURCE_DIR}/src/cache/cells.h)
        add_custom_command(OUTPUT ${tq_hostile} COMMAND ${Python3_EXECUTABLE} ${tq_hostile_from} ${tq_hostile}
                           DEPENDS ${tq_hostile_from} VERBATIM)
        tq_add_program(test_hostile DIR ${tq_test_dir}/unit SOURCES ${tq_hostile} LIBRARIES ${TQ_CMOCKA}
                       INCLUDES src tests tests/unit tests/hostile ${tq_cmocka_include})
        add_test(NAME test_hostile COMMAND test_hostile WORKING_DIRECTORY ${PROJECT_SOURCE_DIR})
    else()
        message(STATUS "The test of hostile arguments is not built: Python 3 was not found")
    endif()
else()
    message(STATUS "Unit tests are not built: cmocka was not found (Debian: libcmocka-dev; scripts/setup.sh installs it)")
endif()

file(GLOB tq_checkkern_sources CONFIGURE_DEPENDS tests/kernels/*.c)
if(tq_checkkern_sources)
    tq_add_program(checkkern DIR ${tq_test_dir} SOURCES ${tq_checkkern_sources} INCLUDES src tests tests/kernels)
    add_test(NAME checkkern COMMAND checkkern)
endif()

# In place of libturboquant-cuda.so, on machines without a device: for test_batch, test_paged and the Python package's tests.
# What is built for an emulator is static, and loads nothing.
if(NOT CMAKE_CROSSCOMPILING)
    add_library(turboquant_cuda_emulated MODULE tests/cuda/emulated_device.c)
    add_dependencies(tests turboquant_cuda_emulated)
    set_target_properties(turboquant_cuda_emulated PROPERTIES OUTPUT_NAME turboquant-cuda-emulated C_VISIBILITY_PRESET hidden
                          LIBRARY_OUTPUT_DIRECTORY ${tq_test_dir}/cuda)
    target_include_directories(turboquant_cuda_emulated PRIVATE src)
    target_link_libraries(turboquant_cuda_emulated PRIVATE turboquant_static tq_flags Threads::Threads m)
    if(NOT APPLE)
        target_link_options(turboquant_cuda_emulated PRIVATE -Wl,--exclude-libs,ALL)
    endif()
endif()

# fuzz/standalone.h gives a target its own main() where there is no libFuzzer. Two targets are about the plug-in.
set(tq_plugin_fuzz_targets fuzz_options fuzz_state)
file(GLOB tq_fuzz_targets CONFIGURE_DEPENDS fuzz/fuzz_*.c)
foreach(source ${tq_fuzz_targets})
    get_filename_component(name ${source} NAME_WE)
    if(NOT name IN_LIST tq_plugin_fuzz_targets)
        tq_add_program(${name} DIR ${tq_test_dir}/fuzz SOURCES ${source} INCLUDES src tests tests/unit fuzz)
    elseif(TARGET ggml-turboquant)
        tq_add_program(${name} DIR ${tq_test_dir}/fuzz SOURCES ${source} ${tq_plugin_sources}
                       LIBRARIES ${CMAKE_DL_LIBS} INCLUDES src fuzz plugins/ggml)
        target_include_directories(${name} SYSTEM PRIVATE ${TQ_GGML_DIR}/include ${TQ_GGML_DIR}/src)
    else()
        continue()
    endif()
    if(TQ_LIBFUZZER)
        target_compile_definitions(${name} PRIVATE TQ_LIBFUZZER)
        target_link_options(${name} PRIVATE -fsanitize=fuzzer)
    endif()
endforeach()

file(GLOB tq_examples CONFIGURE_DEPENDS examples/*.c)
foreach(source ${tq_examples})
    get_filename_component(name ${source} NAME_WE)
    tq_add_program(example_${name} DIR ${PROJECT_BINARY_DIR}/examples SOURCES ${source})
endforeach()
