// What dispatch.cpp calls of the Hopper kernels; plain C++, defined by the units of sm90/. HeadDim
// is the kernel's, and may be more than the problem's.
#pragma once

#include "params.h"

namespace hf_flashattn::sm90 {

template <int HeadDim, DType Type, bool Causal, bool Dropout>
Status forward(ForwardParams const& params, int32_t* counter);

template <int HeadDim, DType Type, bool Causal, bool Dropout>
Status backward(BackwardParams const& params);

bool claims_tiles(Problem const& problem);  // whether forward needs its counter

template <int HeadDim>
size_t backward_workspace_bytes(BackwardParams const& params);

}  // namespace hf_flashattn::sm90
