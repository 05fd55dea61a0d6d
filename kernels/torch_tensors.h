// Torch's tensors for the kernels: checked, as plain views; their device and its stream; new ones.
//
// On torch's stable ABI, for torch_binding.cpp alone: a kernel's unit includes no torch header.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstdint>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "params.h"

// A CPU-only torch has no such symbol. Weak, it is null there, and the library still loads.
#pragma weak aoti_torch_get_current_cuda_stream

namespace hf_flashattn {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::headeronly::ScalarType;

// ---- checks and views ---------------------------------------------------------------------------

template <typename... Parts>
[[noreturn]] void fail(Parts const&... parts) {
  std::ostringstream message;
  message << "hf_flashattn: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

#define HFA_CHECK(condition, ...)        \
  do {                                   \
    if (!(condition)) fail(__VA_ARGS__); \
  } while (false)

inline std::string shape_of(Tensor const& t) {
  std::ostringstream text;
  text << "(";
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << ")";
  return text.str();
}

inline int32_t to_int32(int64_t value, char const* what) {
  HFA_CHECK(value >= 0 && value <= std::numeric_limits<int32_t>::max(), what,
            ": expected 0 to 2^31 - 1, got ", value, "; next step: split the batch");
  return static_cast<int32_t>(value);
}

// How the dimensions of q, k, v, out, dout come.
enum class Form {
  kDense,       // (B, S, H, D)
  kPacked,      // (T, H, D)
  kHeadsFirst,  // (B, H, S, D), as Transformers' layers have q, k, v
};

struct Shape {
  int64_t batch, seq, heads, dim;  // packed: batch 1
};

inline Shape shape(Tensor const& t, Form form, char const* name) {
  HFA_CHECK(t.dim() == (form == Form::kPacked ? 3 : 4), name, ": expected ",
            form == Form::kPacked  ? "(total, heads, head_dim) with cu_seqlens"
            : form == Form::kDense ? "(batch, seqlen, heads, head_dim) without cu_seqlens"
                                   : "(batch, heads, seqlen, head_dim), heads first",
            ", got shape ", shape_of(t));
  auto const s = t.sizes();
  if (form == Form::kPacked) return {1, s[0], s[1], s[2]};
  if (form == Form::kDense) return {s[0], s[1], s[2], s[3]};
  return {s[0], s[2], s[1], s[3]};
}

struct Layout {
  TensorView view;
  // By TMA: unit stride inside a head, other strides and the base multiples of 16 bytes.
  bool loadable;
};

inline Layout layout(Tensor const& t, Shape const& s, Form form) {
  auto const strides = t.strides();
  bool const packed = form == Form::kPacked;
  int const seq_at = form == Form::kDense ? 1 : packed ? 0 : 2;
  int const head_at = form == Form::kDense ? 2 : 1;
  // The stride of a dimension of size 1 has no meaning and may be anything: give it the contiguous
  // value.
  int64_t const head = s.heads == 1 ? s.dim : strides[head_at];
  int64_t const seq = s.seq == 1 ? s.heads * s.dim : strides[seq_at];
  int64_t const batch = packed || s.batch == 1 ? s.seq * s.heads * s.dim : strides[0];
  void* const data = t.data_ptr();
  auto const usable = [](int64_t stride) { return stride > 0 && stride % 8 == 0; };
  bool const loadable = strides[packed ? 2 : 3] == 1 && usable(head) && usable(seq) &&
                        usable(batch) && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  return {{data, batch, seq, head}, loadable};
}

inline void check_like(Tensor const& t, Tensor const& q, char const* name) {
  HFA_CHECK(t.is_cuda() && t.get_device_index() == q.get_device_index(), name,
            ": expected the device of q (cuda:", q.get_device_index(), "), got another one");
  HFA_CHECK(t.scalar_type() == q.scalar_type(), name, ": expected the dtype of q, got another one");
}

// int32 (n,), contiguous, on q's device; null for None.
inline int32_t const* index_data(OptionalTensor const& t, Tensor const& q, int64_t n,
                                 char const* name) {
  if (!t) return nullptr;
  HFA_CHECK(t->is_cuda() && t->get_device_index() == q.get_device_index(), name,
            ": expected on the device of q");
  HFA_CHECK(t->scalar_type() == ScalarType::Int, name, ": expected dtype int32; next step: ", name,
            ".to(torch.int32)");
  HFA_CHECK(t->dim() == 1 && t->size(0) == n && t->is_contiguous(), name,
            ": expected a contiguous tensor of shape (", n, ",), got ", shape_of(*t));
  return static_cast<int32_t const*>(t->data_ptr());
}

// ---- device and stream --------------------------------------------------------------------------

struct DeviceInfo {
  int32_t compute_capability, num_sms;
};

inline DeviceInfo device_info(int32_t device) {
  constexpr int kMaxDevices = 128;
  static std::atomic<uint64_t> cache[kMaxDevices];  // capability << 32 | SMs; 0: not asked yet
  HFA_CHECK(device >= 0 && device < kMaxDevices, "device index ", device, " is beyond ",
            kMaxDevices);
  uint64_t packed = cache[device].load(std::memory_order_relaxed);
  if (packed == 0) {
    int major = 0, minor = 0, sms = 0;
    cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
    HFA_CHECK(error == cudaSuccess, "cannot ask cuda:", device,
              " for its properties: ", cudaGetErrorString(error));
    packed = static_cast<uint64_t>(10 * major + minor) << 32 | static_cast<uint32_t>(sms);
    cache[device].store(packed, std::memory_order_relaxed);
  }
  return {static_cast<int32_t>(packed >> 32), static_cast<int32_t>(packed)};
}

inline void* current_stream(int32_t device) {
  HFA_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
            "this torch has no CUDA; next step: install a CUDA build of torch");
  void* stream = nullptr;
  // torch's own macro for this check has another name in every other release.
  HFA_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == TORCH_SUCCESS,
            "cannot ask torch for the current stream of cuda:", device);
  return stream;
}

// Makes a device the current one; where it is already, torch's guard is spared.
class OnDevice {
 public:
  explicit OnDevice(int32_t device) {
    int current = -1;  // by CUDA itself: torch takes 0.4 us to answer
    if (cudaGetDevice(&current) != cudaSuccess || current != device) guard_.emplace(device);
  }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

// ---- allocation ---------------------------------------------------------------------------------

// An uninitialised CUDA tensor of a shim dtype.
template <size_t N>
Tensor empty(int64_t const (&sizes)[N], int64_t const (&strides)[N], int32_t dtype,
             int32_t device) {
  AtenTensorHandle handle = nullptr;
  // The C shim keeps only the fact of a failure. These words are what tools look for to try a
  // smaller batch.
  HFA_CHECK(aoti_torch_empty_strided(N, sizes, strides, dtype, aoti_torch_device_type_cuda(),
                                     device, &handle) == TORCH_SUCCESS,
            "cannot allocate ", sizes[0], " x ", strides[0], " elements on cuda:", device,
            ": CUDA out of memory. Next step: a smaller batch, or shorter sequences");
  return Tensor(handle);
}

// The same, contiguous.
template <size_t N>
Tensor empty(int64_t const (&sizes)[N], int32_t dtype, int32_t device) {
  int64_t strides[N];
  int64_t step = 1;
  for (size_t i = N; i-- > 0;) {
    strides[i] = step;
    step *= sizes[i] > 0 ? sizes[i] : 1;
  }
  return empty(sizes, strides, dtype, device);
}

// In memory always (B, S, H, D), or packed (T, H, D), whatever comes first in the tensor's shape:
// what the projections before and behind attention have.
inline Tensor empty_like(Shape const& s, Form form, int32_t dtype, int32_t device) {
  if (form == Form::kPacked) return empty({s.seq, s.heads, s.dim}, dtype, device);
  if (form == Form::kDense) return empty({s.batch, s.seq, s.heads, s.dim}, dtype, device);
  auto const least1 = [](int64_t size) { return size > 0 ? size : 1; };
  int64_t const head = least1(s.dim), seq = head * least1(s.heads), batch = seq * least1(s.seq);
  return empty({s.batch, s.heads, s.seq, s.dim}, {batch, head, seq, 1}, dtype, device);
}

}  // namespace hf_flashattn
