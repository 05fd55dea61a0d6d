// The table of kernels/dispatch.cpp with kernels that only say who they are: what
// test_kernel_dispatch.py asks.
//
// stdin, a request a line: forward|backward HEAD_DIM CAPABILITY -> the message of the Status, in
// which a kernel answers with its direction and head dim.
#include <cstring>

#include "dispatch.cpp"

namespace hf_flashattn {

namespace sm90 {

template <int HeadDim, DType Type, bool Causal, bool Dropout>
Status forward(ForwardParams const&, int32_t*) {
  return failure("forward d%d %d%d%d", HeadDim, int(Type), Causal, Dropout);
}

template <int HeadDim, DType Type, bool Causal, bool Dropout>
Status backward(BackwardParams const&) {
  return failure("backward d%d %d%d%d", HeadDim, int(Type), Causal, Dropout);
}

bool claims_tiles(Problem const&) { return false; }

template <int HeadDim>
size_t backward_workspace_bytes(BackwardParams const&) {
  return HeadDim;
}

}  // namespace sm90

void serve() {
  char direction[16];
  Problem p{};
  p.num_sms = p.batch = p.heads_q = p.heads_k = p.seqlen_q = p.seqlen_k = 1;
  p.softmax_scale = 1.f;
  p.dtype = DType::kBFloat16;
  p.causal = true;
  while (std::scanf("%15s %d %d", direction, &p.head_dim, &p.compute_capability) == 3) {
    bool const forward = std::strcmp(direction, "forward") == 0;
    Status const status =
        forward ? launch_forward({.problem = p}, nullptr) : launch_backward({.problem = p});
    std::printf("%s (workspace %zu)\n", status.message, backward_workspace_bytes({.problem = p}));
  }
}

}  // namespace hf_flashattn

int main() { hf_flashattn::serve(); }
