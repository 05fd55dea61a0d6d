// kernels/torch_binding.cpp for CPU tensors, on launchers that do nothing but note what they got.
//
// What the host does for a call can so be timed and looked at without a GPU, nvcc or a CUDA build
// of torch; tools/host_binding.py compiles it. The binding and its header are included as they are.
// Only what they ask of devices is answered here: tensors of the CPU count as cuda:0, which is the
// current device.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>

#include "params.h"

// The few CUDA names that the binding uses, in the place of cuda_runtime_api.h.
enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount
};
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount      ? 132
           : attribute == cudaDevAttrComputeCapabilityMajor ? 9
                                                            : 0;
  return cudaSuccess;
}
inline char const* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
using cudaStream_t = void*;
inline cudaError_t cudaStreamGetId(cudaStream_t, unsigned long long*) { return cudaSuccess; }
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone };
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus*) {
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}

namespace {
int32_t host_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
}  // namespace

#define is_cuda is_cpu
#define get_device_index() is_cpu() - 1  // asked for as on a GPU, and 0
#define aoti_torch_device_type_cuda aoti_torch_device_type_cpu
#define aoti_torch_get_current_cuda_stream host_stream
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, name) _STABLE_TORCH_LIBRARY_IMPL(ns, CPU, name, C10_UID)
#include "torch_binding.cpp"
#undef get_device_index

namespace hf_flashattn {
namespace {

// q, k, v, out, dout, dq, dk, dv: data, stride of batch, sequence and head.
TensorView views[8];
Problem problem;

}  // namespace

Status launch_forward(ForwardParams const& p, int32_t*) {
  TensorView const now[] = {p.q, p.k, p.v, p.out};
  std::memcpy(views, now, sizeof now);
  problem = p.problem;
  return {""};
}

Status launch_backward(BackwardParams const& p) {
  TensorView const now[] = {p.q, p.k, p.v, p.out, p.dout, p.dq, p.dk, p.dv};
  std::memcpy(views, now, sizeof now);
  problem = p.problem;
  return {""};
}

bool forward_claims_tiles(Problem const& p) {
  return p.key_start || p.key_len || p.key_bits || p.cu_seqlens_q;
}
int32_t* tile_counter(int32_t number) {
  static int32_t counters[kTileCounters];
  return &counters[number];
}
size_t backward_workspace_bytes(BackwardParams const&) { return 1024; }
Status check_supported(Problem const&) { return {""}; }

}  // namespace hf_flashattn

// Copies what the last launch got: 8 views of 4 numbers; seqlen_q, seqlen_k, heads_q, heads_k,
// batch, head_dim, key_start, key_len, key_bits, key_bits_stride.
extern "C" __attribute__((visibility("default"))) void hf_flashattn_last_launch(
    int64_t (&out)[42]) {
  using namespace hf_flashattn;
  std::memcpy(out, views, sizeof views);
  int64_t const numbers[] = {problem.seqlen_q,
                             problem.seqlen_k,
                             problem.heads_q,
                             problem.heads_k,
                             problem.batch,
                             problem.head_dim,
                             reinterpret_cast<int64_t>(problem.key_start),
                             reinterpret_cast<int64_t>(problem.key_len),
                             reinterpret_cast<int64_t>(problem.key_bits),
                             problem.key_bits_stride};
  std::memcpy(out + 32, numbers, sizeof numbers);
}
