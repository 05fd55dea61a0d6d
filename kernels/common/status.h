// Making a Status; plain C++, for dispatch and launchers alike.
#pragma once

#include <cstdio>

#include "params.h"

namespace hf_flashattn {

inline Status success() {
  Status status;
  status.message[0] = '\0';
  return status;
}

template <class... Values>
Status failure(char const* format, Values... values) {
  Status status;
  std::snprintf(status.message, sizeof status.message, format, values...);
  return status;
}

}  // namespace hf_flashattn
