// RMSNorm and rotary.
#pragma once

#include "vector.h"

namespace {

// out = rotate(weight * x * rstd); weight may be null, cos/sin null for no rotation, rstd null for no norm.
template <class T>
void norm_rotary_forward(const T* x, const float* weight, const float* cosine, const float* sine, T* out,
                         float* rstd, int64_t rows, int64_t dim, int64_t per_token, int64_t pairs, float eps,
                         int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    const T* in = x + r * dim;
    T* to = out + r * dim;
    float scale = 1.0f;
    if (rstd) {
      vf squares = {};
      for (int64_t i = 0; i < dim; i += L) { vf v = get(in, i, dim); squares += v * v; }
      scale = 1.0f / std::sqrt(sum(squares) / dim + eps);
      rstd[r] = scale;
    }
    const int64_t plain = cosine ? dim - 2 * pairs : dim;
    for (int64_t i = 0; i < plain; i += L) {
      vf v = get(in, i, plain) * scale;
      put(to, i, plain, weight ? v * get(weight, i, plain) : v);
    }
    if (!cosine) continue;
    const float* c = cosine + (r / per_token) * pairs;
    const float* s = sine + (r / per_token) * pairs;
    float turned[2 * 512];
    const int64_t width = 2 * pairs;
    for (int64_t i = 0; i < width; i += L) {
      vf v = get(in + plain, i, width) * scale;
      put(turned, i, width, weight ? v * get(weight + plain, i, width) : v);
    }
    for (int64_t i = 0; i < pairs; i++) {
      float a = turned[2 * i], b = turned[2 * i + 1];
      turned[2 * i] = a * c[i] - b * s[i];
      turned[2 * i + 1] = a * s[i] + b * c[i];
    }
    for (int64_t i = 0; i < width; i += L) put(to + plain, i, width, get(turned, i, width));
  }
}

inline void unrotate(float* row, const float* c, const float* s, int64_t pairs) {
  for (int64_t i = 0; i < pairs; i++) {
    float a = row[2 * i], b = row[2 * i + 1];
    row[2 * i] = a * c[i] + b * s[i];
    row[2 * i + 1] = b * c[i] - a * s[i];
  }
}

// dx, and dweight [threads, dim] zeroed by the caller.
template <class T>
void norm_rotary_backward(const T* dout, const T* x, const float* weight, const float* cosine,
                          const float* sine, const float* rstd, T* dx, float* dweight, int64_t rows,
                          int64_t dim, int64_t per_token, int64_t pairs, int threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> grad((dim + L - 1) / L * L), normed(grad.size());
    float* mine = dweight ? dweight + omp_get_thread_num() * dim : nullptr;
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
      const float* c = cosine ? cosine + (r / per_token) * pairs : nullptr;
      const float* s = sine ? sine + (r / per_token) * pairs : nullptr;
      for (int64_t i = 0; i < dim; i += L) put(grad.data(), i, dim, get(dout + r * dim, i, dim));
      if (cosine) unrotate(grad.data() + dim - 2 * pairs, c, s, pairs);
      if (!rstd) {
        for (int64_t i = 0; i < dim; i += L) put(dx + r * dim, i, dim, get(grad.data(), i, dim));
        continue;
      }
      const float scale = rstd[r];
      for (int64_t i = 0; i < dim; i += L) put(normed.data(), i, dim, get(x + r * dim, i, dim) * scale);
      vf dot = {};
      for (int64_t i = 0; i < dim; i += L) {
        vf g = get(grad.data(), i, dim), v = get(normed.data(), i, dim);
        if (weight) {
          put(mine, i, dim, get(mine, i, dim) + g * v);
          g = g * get(weight, i, dim);
          put(grad.data(), i, dim, g);
        }
        dot += g * v;
      }
      const float mean = sum(dot) / dim;
      for (int64_t i = 0; i < dim; i += L)
        put(dx + r * dim, i, dim, (get(grad.data(), i, dim) - get(normed.data(), i, dim) * mean) * scale);
    }
  }
}

}  // namespace
