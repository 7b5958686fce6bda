// SPDX-License-Identifier: MIT
/*
 * Declarations with which clang checks src/kernels/metal as a Metal compiler would in one respect: pointers and references keep
 * to their address spaces. Nothing here can run; shim.h is what runs. For AArch64, whose _Float16 is a plain type.
 */
#ifndef TQ_TESTS_METAL_ADDRESS_SPACES_H
#define TQ_TESTS_METAL_ADDRESS_SPACES_H

#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2))) const
#define threadgroup __attribute__((address_space(3)))
#define thread

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef _Float16 half;
typedef half float16_t;

struct uint3 {
    uint x, y, z;
};
enum class mem_flags { mem_none, mem_device, mem_threadgroup };

template <typename To, typename From> To as_type(From);
template <typename T> T simd_sum(T);
template <typename T> T simd_max(T);
template <typename T> T simd_min(T);
template <typename T> T simd_shuffle(T, ushort);
template <typename T> T simd_shuffle_xor(T, ushort);
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);
int min(int, int), max(int, int), abs(int);
uint min(uint, uint), max(uint, uint);
float fmin(float, float), fmax(float, float), fabs(float), rint(float), exp2(float), copysign(float, float);
bool isfinite(float);
namespace precise
{
float sqrt(float), divide(float, float);
} // namespace precise

/* A local variable may not have an address space in C++: a reference to one that has. */
#define TQ_SHARED(name, ...)                      \
    extern threadgroup __VA_ARGS__ name##_memory; \
    threadgroup __VA_ARGS__ &name = name##_memory

extern const uint3 threadgroup_position_in_grid;
extern const uint thread_index_in_simdgroup, simdgroup_index_in_threadgroup;

#endif
