// Clamped SwiGLU.
#pragma once

#include "vector.h"

namespace {

// out [rows, f] = scale[row] * silu(min(gate, limit)) * clamp(up); scale may be null.
template <class T>
void swiglu_forward(const T* gate_up, const float* scale, T* out, int64_t rows, int64_t f, float limit,
                    int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    const T* g = gate_up + r * 2 * f;
    const float w = scale ? scale[r] : 1.0f;
    each(f, [&](auto at) {
      vf gate = at.get(g), up = at.get(g + f);
      gate = gate > limit ? broadcast(limit) : gate;
      up = up > limit ? broadcast(limit) : up;
      up = up < -limit ? broadcast(-limit) : up;
      at.put(out + r * f, gate * logistic(gate) * up * w);
    });
  }
}

// dgate_up, dscale [rows] (when scale) and the scaled activations again, for the next product's gradient.
template <class T>
void swiglu_backward(const T* dout, const T* gate_up, const float* scale, T* dgate_up, float* dscale, T* out,
                     int64_t rows, int64_t f, float limit, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    const T* g = gate_up + r * 2 * f;
    T* dg = dgate_up + r * 2 * f;
    const float w = scale ? scale[r] : 1.0f;
    vf total = {};
    each(f, [&](auto at) {
      vf gate = at.get(g), up = at.get(g + f), d = at.get(dout + r * f);
      vi gate_in = gate <= limit, up_in = (up <= limit) & (up >= -limit);
      gate = gate > limit ? broadcast(limit) : gate;
      up = up > limit ? broadcast(limit) : up;
      up = up < -limit ? broadcast(-limit) : up;
      vf sigma = logistic(gate), silu = gate * sigma;
      vf activation = silu * up;
      total += d * activation;
      d = d * w;
      vf slope = sigma * (1.0f + gate * (1.0f - sigma));
      at.put(dg, gate_in ? d * up * slope : vf{});
      at.put(dg + f, up_in ? d * silu : vf{});
      if (out) at.put(out + r * f, activation * w);
    });
    if (dscale) dscale[r] = sum(total);
  }
}

}  // namespace
