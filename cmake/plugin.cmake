# SPDX-License-Identifier: MIT
# The llama.cpp plug-in: a module with the library inside, which exports ggml_backend_init and nothing else. It includes ggml's
# public headers and the private ggml-backend-impl.h, which no installation has: hence the sources. It links with no ggml
# library: the host process has them all.
if(NOT EXISTS ${TQ_GGML_DIR}/src/ggml-backend-impl.h)
    message(STATUS "The plug-in is not built: no ggml sources in ${TQ_GGML_DIR} (scripts/get_llama.sh gets them)")
    return()
endif()

file(GLOB tq_plugin_sources CONFIGURE_DEPENDS plugins/ggml/*.c)
if(NOT tq_plugin_sources)
    return()
endif()
add_library(ggml-turboquant MODULE ${tq_plugin_sources})
set_target_properties(ggml-turboquant PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}
                      LINK_DEPENDS ${PROJECT_SOURCE_DIR}/cmake/plugin.map)
target_include_directories(ggml-turboquant PRIVATE plugins/ggml src)
target_include_directories(ggml-turboquant SYSTEM PRIVATE ${TQ_GGML_DIR}/include ${TQ_GGML_DIR}/src)
target_link_libraries(ggml-turboquant PRIVATE turboquant_static tq_flags Threads::Threads m ${CMAKE_DL_LIBS})
target_link_options(ggml-turboquant PRIVATE -Wl,--version-script=${PROJECT_SOURCE_DIR}/cmake/plugin.map)

# Goes into stock programs together with the plug-in (tools/eval/llama.py). These have no sanitizer's runtime, so it has no
# sanitizer.
if(NOT TQ_SANITIZE)
    add_library(tq-flush-log MODULE tools/flush_log.c)
    set_target_properties(tq-flush-log PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR})
    target_compile_definitions(tq-flush-log PRIVATE _GNU_SOURCE)
    target_link_libraries(tq-flush-log PRIVATE tq_flags Threads::Threads ${CMAKE_DL_LIBS})
endif()
