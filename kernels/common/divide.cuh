// Division by numbers that only the host knows in advance.
#pragma once

#include <cstdint>

namespace hf_flashattn {

// n / value for 0 <= n < 2^31 in a multiplication and a shift: with 2^bits >= value and multiplier
// = 2^(31 + bits) / value, rounded up, the error stays below 1 / value (Granlund and Montgomery
// 1994, theorem 4.2). An integer division takes about 30 instructions in a chain.
struct Divisor {
  int value;
  uint32_t multiplier;  // 0: by 1
  int shift;

  __host__ explicit Divisor(int value) : value(value), multiplier(0), shift(0) {
    if (value <= 1) return;
    int bits = 1;
    while ((int64_t{1} << bits) < value) ++bits;
    multiplier = uint32_t(((uint64_t{1} << (31 + bits)) + value - 1) / value);
    shift = bits - 1;
  }

  __host__ __device__ __forceinline__ int divide(int n) const {
    return multiplier == 0 ? n : int(uint32_t(uint64_t(uint32_t(n)) * multiplier >> 32) >> shift);
  }
  __host__ __device__ __forceinline__ void divide(int n, int& quotient, int& remainder) const {
    quotient = divide(n);
    remainder = n - quotient * value;
  }
};

}  // namespace hf_flashattn
