#include "sm90/backward_launch.cuh"

namespace hf_flashattn::sm90 {

template Status backward<256, DType::kFloat16, false, false>(BackwardParams const&);
template Status backward<256, DType::kFloat16, false, true>(BackwardParams const&);
template Status backward<256, DType::kFloat16, true, false>(BackwardParams const&);
template Status backward<256, DType::kFloat16, true, true>(BackwardParams const&);

}  // namespace hf_flashattn::sm90
