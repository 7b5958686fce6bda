# SPDX-License-Identifier: MIT
# What `make install` copies: one header, both libraries, package files, the plug-in, tq with its manual page and completion.
include(CMakePackageConfigHelpers)

install(FILES include/turboquant.h DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(TARGETS turboquant_static turboquant_shared EXPORT turboquantTargets
        ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(EXPORT turboquantTargets NAMESPACE turboquant:: DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/turboquant)

configure_package_config_file(cmake/turboquantConfig.cmake.in turboquantConfig.cmake
                              INSTALL_DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/turboquant)
# Before 1.0 a minor version may change the interface.
write_basic_package_version_file(turboquantConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/turboquantConfig.cmake ${PROJECT_BINARY_DIR}/turboquantConfigVersion.cmake
        DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/turboquant)

configure_file(cmake/turboquant.pc.in turboquant.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/turboquant.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)

if(TARGET turboquant_cuda)
    install(PROGRAMS ${tq_cuda_library} DESTINATION ${CMAKE_INSTALL_LIBDIR})
endif()
if(TARGET tq)
    install(TARGETS tq RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
    install(FILES docs/tq.1 DESTINATION ${CMAKE_INSTALL_MANDIR}/man1)
    install(FILES tools/tq.bash DESTINATION ${CMAKE_INSTALL_DATADIR}/bash-completion/completions RENAME tq)
endif()
if(TARGET ggml-turboquant)
    install(TARGETS ggml-turboquant LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}/turboquant)
endif()
if(TARGET tq-flush-log)
    install(TARGETS tq-flush-log LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}/turboquant)
endif()

# The wheel of pyproject.toml: the shared libraries beside the Python files. ctypes loads by path, so links are not needed.
install(FILES $<TARGET_FILE:turboquant_shared> DESTINATION libturboquant COMPONENT python RENAME libturboquant.so
        EXCLUDE_FROM_ALL)
if(TARGET turboquant_cuda)
    install(PROGRAMS ${tq_cuda_library} DESTINATION libturboquant COMPONENT python EXCLUDE_FROM_ALL)
endif()
if(TARGET ggml-turboquant)
    install(PROGRAMS $<TARGET_FILE:ggml-turboquant> DESTINATION libturboquant COMPONENT python EXCLUDE_FROM_ALL)
endif()
# MLX compiles these when they are first used.
install(DIRECTORY src/kernels/metal/ DESTINATION libturboquant/metal COMPONENT python EXCLUDE_FROM_ALL FILES_MATCHING
        PATTERN "*.metal")
