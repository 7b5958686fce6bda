# SPDX-License-Identifier: MIT
# The command tq: the public header, cells to measure, and cJSON.
find_package(PkgConfig QUIET)
if(PKG_CONFIG_FOUND)
    pkg_check_modules(CJSON QUIET IMPORTED_TARGET libcjson)
endif()
if(NOT TARGET PkgConfig::CJSON)
    message(STATUS "tq is not built: cJSON was not found (Debian: libcjson-dev; scripts/setup.sh installs it)")
    return()
endif()

file(GLOB tq_tool_sources CONFIGURE_DEPENDS tools/*.c)
list(REMOVE_ITEM tq_tool_sources ${PROJECT_SOURCE_DIR}/tools/flush_log.c)
if(NOT tq_tool_sources)
    return()
endif()
add_executable(tq ${tq_tool_sources})
set_target_properties(tq PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR})
file(RELATIVE_PATH tq_plugin_from_bin ${CMAKE_INSTALL_FULL_BINDIR} ${CMAKE_INSTALL_FULL_LIBDIR}/turboquant)
file(RELATIVE_PATH tq_packages_from_bin ${CMAKE_INSTALL_FULL_BINDIR} ${CMAKE_INSTALL_FULL_LIBEXECDIR}/turboquant)
file(RELATIVE_PATH tq_library_from_bin ${CMAKE_INSTALL_FULL_BINDIR} ${CMAKE_INSTALL_FULL_LIBDIR})
target_compile_definitions(tq PRIVATE _XOPEN_SOURCE=700 TQ_PLUGIN_FROM_BIN="${tq_plugin_from_bin}"
                                      TQ_PACKAGES_FROM_BIN="${tq_packages_from_bin}"
                                      TQ_LIBRARY_FROM_BIN="${tq_library_from_bin}")
# tq fold takes the arithmetic of factors from the Python package.
install(DIRECTORY tools/calibrate tools/eval tools/fold tools/simulate python/libturboquant
        DESTINATION ${CMAKE_INSTALL_LIBEXECDIR}/turboquant
        FILES_MATCHING PATTERN "*.py" PATTERN "*.html")
install(FILES tools/start_package.py DESTINATION ${CMAKE_INSTALL_LIBEXECDIR}/turboquant)
target_include_directories(tq PRIVATE src)
target_link_libraries(tq PRIVATE turboquant_static tq_flags PkgConfig::CJSON m ${CMAKE_DL_LIBS})

# ggml's attention, beside which `tq bench` measures ours; it links with no ggml library, as the plug-in.
if(EXISTS ${TQ_GGML_DIR}/include/ggml.h)
    add_library(tq-ggml-reference MODULE bench/ggml_reference.c)
    set_target_properties(tq-ggml-reference PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR})
    target_include_directories(tq-ggml-reference PRIVATE tools)
    target_include_directories(tq-ggml-reference SYSTEM PRIVATE ${TQ_GGML_DIR}/include)
    target_link_libraries(tq-ggml-reference PRIVATE tq_flags m ${CMAKE_DL_LIBS})
    install(TARGETS tq-ggml-reference LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}/turboquant)
endif()
