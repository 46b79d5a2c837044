// RMSNorm and rotary.
#pragma once

#include "vector.h"

namespace {

// Rows of pairs (a, b) turned by angles with these cosines and sines: (a c - b s, a s + b c), back with sign -1.
struct Turn {
  const float *cosine, *sine;
  int64_t pairs;
  float sign;
  vf operator()(Whole at, vf v) const { return by(v, doubled(cosine + at.i / 2), doubled(sine + at.i / 2)); }
  vf operator()(Part at, vf v) const {
    float c[L / 2] = {}, s[L / 2] = {};
    std::memcpy(c, cosine + at.i / 2, at.n / 2 * sizeof(float));
    std::memcpy(s, sine + at.i / 2, at.n / 2 * sizeof(float));
    return by(v, doubled(c), doubled(s));
  }
  vf by(vf v, vf c, vf s) const {
    const vf signs = {-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1};
    return v * c + swapped(v) * s * (signs * sign);
  }
};

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
      each(dim, [&](auto at) { vf v = at.get(in); squares += v * v; });
      scale = 1.0f / std::sqrt(sum(squares) / dim + eps);
      rstd[r] = scale;
    }
    const int64_t plain = cosine ? dim - 2 * pairs : dim;
    each(plain, [&](auto at) {
      vf v = at.get(in) * scale;
      at.put(to, weight ? v * at.get(weight) : v);
    });
    if (!cosine) continue;
    const int64_t token = r / per_token;
    const Turn turn{cosine + token * pairs, sine + token * pairs, pairs, 1.0f};
    each(2 * pairs, [&](auto at) {
      vf v = at.get(in + plain) * scale;
      at.put(to + plain, turn(at, weight ? v * at.get(weight + plain) : v));
    });
  }
}

// dx, and dweight [threads, dim] zeroed by the caller.
template <class T>
void norm_rotary_backward(const T* dout, const T* x, const float* weight, const float* cosine,
                          const float* sine, const float* rstd, T* dx, float* dweight, int64_t rows,
                          int64_t dim, int64_t per_token, int64_t pairs, int threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> grad(dim);
    float* mine = dweight ? dweight + omp_get_thread_num() * dim : nullptr;
    const int64_t plain = cosine ? dim - 2 * pairs : dim;
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
      const T *g = dout + r * dim, *in = x + r * dim;
      each(plain, [&](auto at) { at.put(grad.data(), at.get(g)); });
      if (cosine) {
        const int64_t token = r / per_token;
        const Turn back{cosine + token * pairs, sine + token * pairs, pairs, -1.0f};
        each(2 * pairs, [&](auto at) { at.put(grad.data() + plain, back(at, at.get(g + plain))); });
      }
      if (!rstd) {
        each(dim, [&](auto at) { at.put(dx + r * dim, at.get(grad.data())); });
        continue;
      }
      const float scale = rstd[r];
      vf dot = {};
      each(dim, [&](auto at) {
        vf d = at.get(grad.data()), v = at.get(in) * scale;
        if (weight) {
          at.put(mine, at.get(mine) + d * v);
          d = d * at.get(weight);
          at.put(grad.data(), d);
        }
        dot += d * v;
      });
      const float mean = sum(dot) / dim;
      each(dim, [&](auto at) {
        at.put(dx + r * dim, (at.get(grad.data()) - at.get(in) * scale * mean) * scale);
      });
    }
  }
}

}  // namespace
