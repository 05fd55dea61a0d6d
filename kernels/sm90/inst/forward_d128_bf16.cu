#include "sm90/forward_launch.cuh"

namespace hf_flashattn::sm90 {

template Status forward<128, DType::kBFloat16, false, false>(ForwardParams const&, void*);
template Status forward<128, DType::kBFloat16, false, true>(ForwardParams const&, void*);
template Status forward<128, DType::kBFloat16, true, false>(ForwardParams const&, void*);
template Status forward<128, DType::kBFloat16, true, true>(ForwardParams const&, void*);

}  // namespace hf_flashattn::sm90
