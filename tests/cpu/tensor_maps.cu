// Prints how often tensor maps are encoded, with an encoder that counts instead of the driver's.
#include <cstdio>

#include "sm90/launch.cuh"

using namespace hf_flashattn::sm90;

namespace {

int calls = 0;
bool refuse = false;

CUresult encode(CUtensorMap* map, CUtensorMapDataType, cuuint32_t, void* data, cuuint64_t const*,
                cuuint64_t const*, cuuint32_t const*, cuuint32_t const*, CUtensorMapInterleave,
                CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  ++calls;
  if (refuse) return CUDA_ERROR_INVALID_VALUE;
  map->opaque[0] = reinterpret_cast<uintptr_t>(data);
  map->opaque[1] = calls;
  return CUDA_SUCCESS;
}

// "calls made by now", or a word for what is wrong.
void ask(char const* what, MapKey const& key) {
  CUtensorMap map{};
  CUresult const result = encode_once(map, key, encode);
  bool const right =
      refuse ? result != CUDA_SUCCESS
             : result == CUDA_SUCCESS && map.opaque[0] == reinterpret_cast<uintptr_t>(key.data);
  if (right) std::printf("%s %d\n", what, calls);
  else std::printf("%s wrong\n", what);
}

}  // namespace

int main() {
  MapKey const key = {reinterpret_cast<void*>(0x7f0000001000),
                      {64, 128, 8, 2},
                      {1024, 128, 131072},
                      64,
                      128,
                      CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                      CU_TENSOR_MAP_SWIZZLE_128B};
  ask("first", key);
  ask("again", key);
  MapKey other = key;
  other.data = reinterpret_cast<void*>(0x7f0000002000);
  ask("address", other);
  for (int i = 0; i < 4; ++i) (other = key).sizes[i] += 1, ask("size", other);
  for (int i = 0; i < 3; ++i) (other = key).strides[i] += 16, ask("stride", other);
  (other = key).box_rows = 64, ask("box", other);
  (other = key).box_columns = 32, ask("box", other);
  (other = key).type = CU_TENSOR_MAP_DATA_TYPE_FLOAT16, ask("dtype", other);
  (other = key).swizzle = CU_TENSOR_MAP_SWIZZLE_64B, ask("swizzle", other);
  calls = 0;
  for (int i = 0; i < 1000; ++i) {  // far more than there is room for
    other.data = reinterpret_cast<void*>(0x7f1000000000 + 512 * uintptr_t(i));
    CUtensorMap map{};
    encode_once(map, other, encode);
    if (map.opaque[0] != reinterpret_cast<uintptr_t>(other.data)) std::printf("stale %d\n", i);
  }
  std::printf("many %d\n", calls);
  calls = 0;
  refuse = true;
  other.data = reinterpret_cast<void*>(0x7f0000009999);
  ask("refused", other);
  ask("refused again", other);
  refuse = false;
  ask("then", other);
}
