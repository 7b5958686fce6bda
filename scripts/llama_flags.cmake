# SPDX-License-Identifier: MIT
# Read by llama.cpp's build (scripts/get_llama.sh), whose sources stay as they are.
function(tq_set_llama_flags)
    # The code for options, chat templates and HTTP takes half of llama-completion's time to compile and has no part in what is
    # measured: less optimization there saves a third of that. ggml and llama, which are measured, keep their own flags.
    foreach(target llama-common cpp-httplib)
        if(TARGET ${target})
            target_compile_options(${target} PRIVATE -O1)
        endif()
    endforeach()

    # GCC 12 believes that _tile_loadconfig reads 8 of its 64 bytes, drops the stores to the others as dead, and every program
    # ends with an illegal instruction on processors with AMX. llama.cpp knows (its pull request 26954); until that is released,
    # GCC has to keep all stores of that file.
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND TARGET ggml-cpu)
        set_property(SOURCE ${CMAKE_SOURCE_DIR}/ggml/src/ggml-cpu/amx/mmq.cpp TARGET_DIRECTORY ggml-cpu
                     APPEND PROPERTY COMPILE_OPTIONS -fno-tree-dse -fno-dse)
    endif()
endfunction()
cmake_language(DEFER CALL tq_set_llama_flags)
