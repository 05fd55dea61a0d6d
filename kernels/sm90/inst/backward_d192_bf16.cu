#include "sm90/backward_launch.cuh"

namespace hf_flashattn::sm90 {

template Status backward<192, DType::kBFloat16, false, false>(BackwardParams const&);
template Status backward<192, DType::kBFloat16, false, true>(BackwardParams const&);
template Status backward<192, DType::kBFloat16, true, false>(BackwardParams const&);
template Status backward<192, DType::kBFloat16, true, true>(BackwardParams const&);

}  // namespace hf_flashattn::sm90
