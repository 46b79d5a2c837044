// Attention's softmax over window keys and entries, forward and backward.
#pragma once

#include "vector.h"

namespace {

// One query-and-head row has scores over window tokens and over entries, each with one visible range, and a
// sink. Scores become probabilities in place, zero outside the ranges; lse [rows]; mass [queries, entries] sums
// the entries' probabilities over heads.

template <class T>
void softmax_forward(T* window, int64_t window_width, const int32_t* window_low, const int32_t* window_high,
                     T* entries, int64_t entries_width, const int32_t* entries_low,
                     const int32_t* entries_high, const float* sink, float* lse, float* mass, int64_t queries,
                     int64_t heads, float scale, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t q = 0; q < queries; q++) {
    if (mass) std::fill(mass + q * entries_width, mass + (q + 1) * entries_width, 0.0f);
    for (int64_t h = 0; h < heads; h++) {
      const int64_t row = q * heads + h;
      T* data[2] = {window + row * window_width, entries ? entries + row * entries_width : nullptr};
      const int64_t width[2] = {window_width, entries ? entries_width : 0};
      const int64_t low[2] = {window_low[q], entries ? entries_low[q] : 0};
      const int64_t high[2] = {window_high[q], entries ? entries_high[q] : 0};
      vf most = broadcast(-INFINITY), total = {};
      for (int s = 0; s < 2; s++) {
        const T* p = data[s] + low[s];
        each(high[s] - low[s], [&](auto at) { most = larger(at.only(at.get(p) * scale, -INFINITY), most); });
      }
      const float top = std::max(sink[h], largest(most));
      for (int s = 0; s < 2; s++) {
        const T* p = data[s] + low[s];
        each(high[s] - low[s], [&](auto at) { total += at.only(exponential(at.get(p) * scale - top), 0.0f); });
      }
      const float log_total = top + std::log(sum(total) + std::exp(sink[h] - top));
      lse[row] = log_total;
      for (int s = 0; s < 2; s++) {
        T* p = data[s] + low[s];
        float* m = s && mass ? mass + q * entries_width + low[s] : nullptr;
        clear(data[s], low[s]);
        each(high[s] - low[s], [&](auto at) {
          vf v = exponential(at.get(p) * scale - log_total);
          at.put(p, v);
          if (m) at.put(m, at.get(m) + v);
        });
        clear(data[s] + high[s], width[s] - high[s]);
      }
    }
  }
}

// scores -> probabilities in place; dprobabilities -> dscores (scaled) in place.
template <class T>
void softmax_backward(T* scores, T* grads, int64_t width, const int32_t* low, const int32_t* high,
                      const float* lse, const float* delta, int64_t queries, int64_t heads, float scale,
                      int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < queries * heads; row++) {
    const int64_t from = low[row / heads], to = high[row / heads];
    T *s = scores + row * width, *g = grads + row * width;
    clear(s, from);
    clear(g, from);
    each(to - from, [&](auto at) {
      vf p = exponential(at.get(s + from) * scale - lse[row]);
      at.put(g + from, p * (at.get(g + from) - delta[row]) * scale);
      at.put(s + from, p);
    });
    clear(s + to, width - to);
    clear(g + to, width - to);
  }
}

// delta [rows] = <dout, out>.
template <class T>
void row_dot(const T* a, const T* b, float* out, int64_t rows, int64_t dim, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    vf dot = {};
    each(dim, [&](auto at) { dot += at.get(a + r * dim) * at.get(b + r * dim); });
    out[r] = sum(dot);
  }
}

}  // namespace
