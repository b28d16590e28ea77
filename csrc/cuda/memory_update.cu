// memory_update on CUDA. The warp of the first image that has a row moves it for all images that have it, in the order
// of the batch, so no two warps write the same row.
#include "cuda/memory_update.h"

#include "cuda/device.h"
#include "cuda/launch.h"
#include "math/memory_update.h"

namespace pyext::memory_update {
namespace {

using namespace pyext::cuda;

template <typename S>
__global__ void __launch_bounds__(kWarp)
    update_kernel(S* bank, int64_t pitch, int64_t rows, const float* embeddings, const int64_t* index, int64_t batch,
                  int64_t features, float momentum) {
  const int64_t image = blockIdx.x;
  const int lane = threadIdx.x;
  const int64_t row = index[image];
  float earlier = 0.f;
  for (int64_t b = lane; b < image; b += kWarp) earlier += index[b] == row ? 1.f : 0.f;
  if (warp_sum(earlier) > 0.f || row < 0 || row >= rows) return;
  S* out = bank + row * pitch;
  for (int64_t b = image; b < batch; ++b) {
    if (index[b] != row) continue;
    const float* embedding = embeddings + b * features;
    float squares = 0.f;
    for (int64_t c = lane; c < features; c += kWarp) {
      const float moved = momentum * to_float(out[c]) + (1.f - momentum) * embedding[c];
      squares += moved * moved;
    }
    const float norm = nonzero_norm(sqrtf(warp_sum(squares)));
    for (int64_t c = lane; c < features; c += kWarp) {
      const float moved = momentum * to_float(out[c]) + (1.f - momentum) * embedding[c];
      out[c] = from_float<S>(moved / norm);
    }
  }
}

template <typename S>
void update_banks(const Inputs& in, cudaStream_t stream) {
  for (int64_t i = 0; i < in.peers; ++i) {
    launch("memory_update", update_kernel<S>, dim3(static_cast<unsigned>(in.batch)), kWarp, 0, stream,
           static_cast<S*>(in.banks[i]), in.pitch[i], in.rows, in.embeddings + i * in.batch * in.features, in.index,
           in.batch, in.features, in.momentum);
  }
}

}  // namespace

void update(const Inputs& in, cudaStream_t stream) {
  switch (in.dtype) {
    case Dtype::kFloat:
      return update_banks<float>(in, stream);
    case Dtype::kBFloat16:
      return update_banks<__nv_bfloat16>(in, stream);
    case Dtype::kHalf:
      return update_banks<__half>(in, stream);
  }
}

}  // namespace pyext::memory_update
