// Scalar algebra of the gates and of batch normalisation, the same on host and device.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define PYEXT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PYEXT_HOST_DEVICE inline
#endif

namespace pyext {

PYEXT_HOST_DEVICE float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

// Written so that NaN passes: it compares false.
PYEXT_HOST_DEVICE bool relu_is_flat(float x) { return x <= 0.f; }
PYEXT_HOST_DEVICE float relu(float x) { return relu_is_flat(x) ? 0.f : x; }

// Batch normalisation of one channel with given statistics. The mean is subtracted before scaling: folding it into the
// shift would cancel when it is large against the standard deviation.
struct Normalization {
  float mean;
  float rstd;
  float weight;
  float bias;

  PYEXT_HOST_DEVICE float scale() const { return weight * rstd; }
  PYEXT_HOST_DEVICE float standardized(float x) const { return (x - mean) * rstd; }
  PYEXT_HOST_DEVICE float operator()(float x) const { return (x - mean) * scale() + bias; }
};

PYEXT_HOST_DEVICE float reciprocal_deviation(float variance, float eps) { return 1.f / sqrtf(variance + eps); }

// Number, mean and sum of squared deviations from the mean: statistics that merge without cancellation
// (Chan, Golub, LeVeque 1979).
struct Moments {
  float count = 0.f;
  float mean = 0.f;
  float deviation = 0.f;

  PYEXT_HOST_DEVICE void merge(const Moments& other) {
    if (other.count == 0.f) return;
    const float total = count + other.count;
    const float delta = other.mean - mean;
    const float share = other.count / total;
    mean += delta * share;
    deviation += other.deviation + delta * delta * count * share;
    count = total;
  }

  PYEXT_HOST_DEVICE float variance() const { return count == 0.f ? 0.f : deviation / count; }
};

}  // namespace pyext
