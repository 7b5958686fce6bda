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
endfunction()
cmake_language(DEFER CALL tq_set_llama_flags)
