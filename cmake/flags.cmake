# SPDX-License-Identifier: MIT
# Compiler flags of everything in this build. -ffp-contract=off is part of the specification: encoding is bit-exact across
# instruction sets only if no compiler fuses a multiplication with an addition on its own.
set(CMAKE_C_STANDARD 11)
set(CMAKE_C_STANDARD_REQUIRED ON)
set(CMAKE_C_EXTENSIONS OFF)
set(CMAKE_C_VISIBILITY_PRESET hidden)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
find_program(TQ_CCACHE ccache)
if(TQ_CCACHE AND NOT CMAKE_C_COMPILER_LAUNCHER)
    set(CMAKE_C_COMPILER_LAUNCHER ${TQ_CCACHE})
endif()
if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
    set(CMAKE_BUILD_TYPE Release CACHE STRING "" FORCE)
endif()

add_library(tq_flags INTERFACE)
target_compile_options(tq_flags INTERFACE
    -ffp-contract=off -Wall -Wextra -Wshadow -Wundef -Wstrict-prototypes -Wmissing-prototypes -Wvla -Wconversion
    -Wimplicit-fallthrough)
if(TQ_WERROR)
    target_compile_options(tq_flags INTERFACE -Werror)
endif()
if(TQ_SANITIZE)
    target_compile_options(tq_flags INTERFACE -fsanitize=${TQ_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer)
    target_link_options(tq_flags INTERFACE -fsanitize=${TQ_SANITIZE})
endif()
if(TQ_LIBFUZZER)
    target_compile_options(tq_flags INTERFACE -fsanitize=fuzzer-no-link)
endif()
