// One-instruction wrappers that belong to no other noun: registers, barriers, fences, conversions.
// PTX ISA 9.0 is the reference for each.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace hf_flashattn {

constexpr int kWarpThreads = 32;
constexpr int kWarpgroupThreads = 128;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

// The same value, but to the compiler another one: what a loop makes of it is made anew in every
// turn, and not kept in registers that it then lacks.
__device__ __forceinline__ int anew(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// An address that stays in its registers, where ptxas would make it again at each use.
template <class T>
__device__ __forceinline__ T* kept(T* address) {
  asm volatile("" : "+l"(address));
  return address;
}

// This thread's lane, likewise.
__device__ __forceinline__ int lane_anew() {
  uint32_t lane;
  asm volatile("mov.u32 %0, %%laneid;\n" : "=r"(lane));
  return lane;
}

__device__ __forceinline__ uint32_t smem_address(void const* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// True in one lane of a converged warp.
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(elected));
  return elected != 0;
}

template <int Registers>
__device__ __forceinline__ void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(Registers));
}

template <int Registers>
__device__ __forceinline__ void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(Registers));
}

// Waits until `threads` threads have arrived at or synced on the named barrier.
__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

// Lets the next kernel of the stream start, if it was launched to overlap with this one. It sees
// what this one writes only after wait_for_previous_kernel().
__device__ __forceinline__ void launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
}

// Returns when the kernels before this one have ended and their results are visible.
__device__ __forceinline__ void wait_for_previous_kernel() {
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
}

// Ordinary shared-memory stores of this thread become visible to TMA and wgmma.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

// Global memory accesses of this thread, and those it has seen of others, are ordered before its
// bulk copies of global memory. One instruction; fence.proxy.async for all memory also waits for
// every access that is under way, as __threadfence() does.
__device__ __forceinline__ void fence_proxy_async_global() {
  asm volatile("fence.proxy.async.global;\n" ::: "memory");
}

// Ordinary stores of this thread become visible to bulk copies, of shared and global memory.
__device__ __forceinline__ void fence_proxy_async_all() {
  asm volatile("fence.proxy.async;\n" ::: "memory");
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// Two floats to one register of 16-bit values, `low` in the lower half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// The products of two registers of two 16-bit values each.
template <class T>
__device__ __forceinline__ uint32_t multiply(uint32_t a, uint32_t b);

template <>
__device__ __forceinline__ uint32_t multiply<__half>(uint32_t a, uint32_t b) {
  uint32_t product;
  asm("mul.rn.f16x2 %0, %1, %2;\n" : "=r"(product) : "r"(a), "r"(b));
  return product;
}

template <>
__device__ __forceinline__ uint32_t multiply<__nv_bfloat16>(uint32_t a, uint32_t b) {
  uint32_t product;
  asm("mul.rn.bf16x2 %0, %1, %2;\n" : "=r"(product) : "r"(a), "r"(b));
  return product;
}

// Four 8x8 matrices of 16-bit values; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void store_matrix_x4(uint32_t address, uint32_t const (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(address),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

__device__ __forceinline__ uint4 load_shared_16b(uint32_t address) {
  uint4 value;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

__device__ __forceinline__ uint2 load_shared_8b(uint32_t address) {
  uint2 value;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];\n"
               : "=r"(value.x), "=r"(value.y)
               : "r"(address)
               : "memory");
  return value;
}

__device__ __forceinline__ uint32_t load_shared_4b(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.u32 %0, [%1];\n" : "=r"(value) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ float2 load_shared_float2(uint32_t address) {
  float2 value;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];\n" : "=f"(value.x), "=f"(value.y) : "r"(address));
  return value;
}

// For what another kernel may have written since this one started.
__device__ __forceinline__ int32_t load_from_l2(int32_t const* pointer) {
  int32_t value;
  asm volatile("ld.global.cg.s32 %0, [%1];\n" : "=r"(value) : "l"(pointer) : "memory");
  return value;
}

__device__ __forceinline__ void store_shared_16b(uint32_t address, float4 value) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "f"(value.x),
               "f"(value.y), "f"(value.z), "f"(value.w)
               : "memory");
}

__device__ __forceinline__ void store_shared_16b(uint32_t address, uint4 value) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "r"(value.x),
               "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}

__device__ __forceinline__ void store_shared_zero_16b(uint32_t address) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};\n" ::"r"(address), "r"(0) : "memory");
}

// One store of 16 bytes under a condition that differs between lanes, without a branch. Assigned
// through a pointer, four values that come out of assembly leave as four stores of 4 bytes.
__device__ __forceinline__ void store_global_16b_if(bool condition, void* global, uint4 value) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\n"
      "@p st.global.v4.u32 [%0], {%1, %2, %3, %4};\n}\n" ::"l"(global),
      "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(uint32_t(condition))
      : "memory");
}

__device__ __forceinline__ void store_global_8b(void* global, uint32_t first, uint32_t second) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};\n" ::"l"(global), "r"(first), "r"(second)
               : "memory");
}

__device__ __forceinline__ void store_global_8b_if(bool condition, void* global, uint32_t first,
                                                   uint32_t second) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.u32 p, %3, 0;\n"
      "@p st.global.v2.u32 [%0], {%1, %2};\n}\n" ::"l"(global),
      "r"(first), "r"(second), "r"(uint32_t(condition))
      : "memory");
}

// global[0 .. 3] += value, in the L2; nobody waits for it. 16-byte aligned.
__device__ __forceinline__ void reduce_add_16b(float* global, float4 value) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"l"(global),
               "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w)
               : "memory");
}

// Keeps what comes before it before it. ptxas moves arithmetic freely across wgmma waits, and sinks
// a softmax below the wait that it is meant to hide; it does not move it out of a basic block, and
// this ends one. `never` is negative in no launch, which the compiler cannot know.
__device__ __forceinline__ void schedule_fence(int never) {
  if (never < 0) __nanosleep(1);
}

// The lane whose bit `Bit` is clear gives `second` and gets the other's `first`; the other way
// round in the lane where it is set.
template <int Bit>
__device__ __forceinline__ void swap_with_lane(uint32_t& first, uint32_t& second, bool set) {
  uint32_t const got = __shfl_xor_sync(0xffffffff, set ? first : second, Bit);
  (set ? first : second) = got;
}

// A value known to be the same in the whole warp: lets the compiler keep it in a uniform register.
__device__ __forceinline__ int warp_uniform(int value) { return __shfl_sync(0xffffffff, value, 0); }

}  // namespace hf_flashattn
