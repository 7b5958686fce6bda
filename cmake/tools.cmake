# SPDX-License-Identifier: MIT
# The command tq: the public header and cJSON, nothing else.
find_package(PkgConfig QUIET)
if(PKG_CONFIG_FOUND)
    pkg_check_modules(CJSON QUIET IMPORTED_TARGET libcjson)
endif()
if(NOT TARGET PkgConfig::CJSON)
    message(STATUS "tq is not built: cJSON was not found (Debian: libcjson-dev; scripts/setup.sh installs it)")
    return()
endif()

file(GLOB tq_tool_sources CONFIGURE_DEPENDS tools/*.c)
if(NOT tq_tool_sources)
    return()
endif()
add_executable(tq ${tq_tool_sources})
set_target_properties(tq PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR})
file(RELATIVE_PATH tq_plugin_from_bin ${CMAKE_INSTALL_FULL_BINDIR} ${CMAKE_INSTALL_FULL_LIBDIR}/turboquant)
file(RELATIVE_PATH tq_eval_from_bin ${CMAKE_INSTALL_FULL_BINDIR} ${CMAKE_INSTALL_FULL_LIBEXECDIR}/turboquant)
target_compile_definitions(tq PRIVATE _XOPEN_SOURCE=700 TQ_PLUGIN_FROM_BIN="${tq_plugin_from_bin}"
                                      TQ_EVAL_FROM_BIN="${tq_eval_from_bin}")
install(DIRECTORY tools/eval DESTINATION ${CMAKE_INSTALL_LIBEXECDIR}/turboquant FILES_MATCHING PATTERN "*.py" PATTERN "*.html")
target_link_libraries(tq PRIVATE turboquant_static tq_flags PkgConfig::CJSON m)
