// wgmma: one warpgroup multiplies a 64 x 16 by a 16 x N tile of 16-bit values into 64 x N floats.
//
// The accumulator of lane (g, t) = (lane / 4, lane % 4) of warp w holds, for each group j of 8
// columns, d[4j + 0, 1] = rows 16w + g, columns 8j + 2t, +1 and d[4j + 2, 3] = the same columns of
// row + 8.
#pragma once

#include "common/ptx.cuh"

namespace hf_flashattn {

// Orders register and shared-memory accesses before the next wgmma of this warpgroup.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}

// Waits until at most `Pending` committed groups are in flight.
template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(Pending) : "memory");
}

// Keeps the compiler from moving accesses of an accumulator across this point.
template <int Size>
__device__ __forceinline__ void pin_registers(float (&registers)[Size]) {
#pragma unroll
  for (int i = 0; i < Size; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

template <int Steps>
__device__ __forceinline__ void pin_registers(uint32_t (&registers)[Steps][4]) {
#pragma unroll
  for (int i = 0; i < Steps * 4; ++i) asm volatile("" : "+r"(registers[i / 4][i % 4])::"memory");
}

enum class Major { kK = 0, kMN = 1 };  // which index of a shared-memory operand is contiguous

// One instruction; `accumulate` false overwrites d. Defined below for the N and types in use.
template <class T, int N>
struct Wgmma;

// clang-format off
#define HFA_F8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define HFA_F32(d, i) HFA_F8(d, i), HFA_F8(d, i + 8), HFA_F8(d, i + 16), HFA_F8(d, i + 24)
#define HFA_REGISTERS_32(d) HFA_F8(d, 0), HFA_F8(d, 8)
#define HFA_REGISTERS_48(d) HFA_REGISTERS_32(d), HFA_F8(d, 16)
#define HFA_REGISTERS_64(d) HFA_F32(d, 0)
#define HFA_REGISTERS_80(d) HFA_F32(d, 0), HFA_F8(d, 32)
#define HFA_REGISTERS_96(d) HFA_REGISTERS_80(d), HFA_F8(d, 40)
#define HFA_REGISTERS_128(d) HFA_F32(d, 0), HFA_F32(d, 32)
#define HFA_REGISTERS_192(d) HFA_REGISTERS_128(d), HFA_F32(d, 64)
#define HFA_REGISTERS_256(d) HFA_REGISTERS_192(d), HFA_F32(d, 96)
#define HFA_PLACES_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define HFA_PLACES_48 HFA_PLACES_32 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define HFA_PLACES_64 HFA_PLACES_48 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define HFA_PLACES_80 HFA_PLACES_64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define HFA_PLACES_96 HFA_PLACES_80 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define HFA_PLACES_112 HFA_PLACES_96 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define HFA_PLACES_128 HFA_PLACES_112 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define HFA_PLACES_192 HFA_PLACES_128 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define HFA_PLACES_256 HFA_PLACES_192 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// NAME is the type in PTX; A .. G number the operands that follow the N / 2 accumulators.
#define HFA_WGMMA_TYPE(T, NAME, N, A, B, C, D, E, F, G)                                          \
  template <>                                                                                    \
  struct Wgmma<T, N> {                                                                           \
    template <Major MajorA, Major MajorB>                                                        \
    static __device__ __forceinline__ void smem_smem(float (&d)[N / 2], uint64_t a, uint64_t b,  \
                                                     int accumulate) {                           \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #C ", 0;\n"                              \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME               \
                   " {" HFA_PLACES_##N "}, %" #A ", %" #B ", p, 1, 1, %" #D ", %" #E ";\n}\n"    \
                   : HFA_REGISTERS_##N(d)                                                        \
                   : "l"(a), "l"(b), "r"(accumulate), "n"(int(MajorA)), "n"(int(MajorB)));       \
    }                                                                                            \
    template <Major MajorB>                                                                      \
    static __device__ __forceinline__ void register_smem(float (&d)[N / 2],                      \
                                                         uint32_t const (&a)[4], uint64_t b,     \
                                                         int accumulate) {                       \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #F ", 0;\n"                              \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME               \
                   " {" HFA_PLACES_##N "}, {%" #A ", %" #B ", %" #C ", %" #D "}, %" #E           \
                   ", p, 1, 1, %" #G ";\n}\n"                                                    \
                   : HFA_REGISTERS_##N(d)                                                        \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate),        \
                     "n"(int(MajorB)));                                                          \
    }                                                                                            \
  };
#define HFA_WGMMA(N, ...)                                 \
  HFA_WGMMA_TYPE(__half, "f16", N, __VA_ARGS__)           \
  HFA_WGMMA_TYPE(__nv_bfloat16, "bf16", N, __VA_ARGS__)

HFA_WGMMA(32, 16, 17, 18, 19, 20, 21, 22)
HFA_WGMMA(48, 24, 25, 26, 27, 28, 29, 30)
HFA_WGMMA(64, 32, 33, 34, 35, 36, 37, 38)
HFA_WGMMA(80, 40, 41, 42, 43, 44, 45, 46)
HFA_WGMMA(96, 48, 49, 50, 51, 52, 53, 54)
HFA_WGMMA(128, 64, 65, 66, 67, 68, 69, 70)
HFA_WGMMA(192, 96, 97, 98, 99, 100, 101, 102)
HFA_WGMMA(256, 128, 129, 130, 131, 132, 133, 134)
// clang-format on

}  // namespace hf_flashattn
