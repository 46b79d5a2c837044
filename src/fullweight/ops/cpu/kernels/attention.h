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
      const int32_t low[2] = {window_low[q], entries ? entries_low[q] : 0};
      const int32_t high[2] = {window_high[q], entries ? entries_high[q] : 0};
      float top = sink[h];
      for (int s = 0; s < 2; s++) {
        vf most = broadcast(-INFINITY);
        for (int64_t i = low[s]; i < high[s]; i += L) {
          vf v = get(data[s], i, high[s]) * scale;
          v = lane() < (int32_t)(high[s] - i) ? v : broadcast(-INFINITY);
          most = larger(v, most);
        }
        top = std::max(top, largest(most));
      }
      vf total = {};
      for (int s = 0; s < 2; s++)
        for (int64_t i = low[s]; i < high[s]; i += L) {
          vf v = exponential(get(data[s], i, high[s]) * scale - top);
          total += lane() < (int32_t)(high[s] - i) ? v : vf{};
        }
      const float log_total = top + std::log(sum(total) + std::exp(sink[h] - top));
      lse[row] = log_total;
      for (int s = 0; s < 2; s++) {
        T* p = data[s];
        for (int64_t i = 0; i < low[s]; i += L) put(p, i, low[s], vf{});
        for (int64_t i = low[s]; i < high[s]; i += L) {
          vf v = exponential(get(p, i, high[s]) * scale - log_total);
          put(p, i, high[s], v);
          if (s && mass) {
            float* m = mass + q * entries_width;
            put(m, i, high[s], get(m, i, high[s]) + v);
          }
        }
        for (int64_t i = high[s]; i < width[s]; i += L) put(p, i, width[s], vf{});
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
    const int64_t q = row / heads;
    T *s = scores + row * width, *g = grads + row * width;
    for (int64_t i = 0; i < low[q]; i += L) { put(s, i, low[q], vf{}); put(g, i, low[q], vf{}); }
    for (int64_t i = low[q]; i < high[q]; i += L) {
      vf p = exponential(get(s, i, high[q]) * scale - lse[row]);
      put(g, i, high[q], p * (get(g, i, high[q]) - delta[row]) * scale);
      put(s, i, high[q], p);
    }
    for (int64_t i = high[q]; i < width; i += L) { put(s, i, width, vf{}); put(g, i, width, vf{}); }
  }
}

// delta [rows] = <dout, out>.
template <class T>
void row_dot(const T* a, const T* b, float* out, int64_t rows, int64_t dim, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    vf dot = {};
    for (int64_t i = 0; i < dim; i += L) dot += get(a + r * dim, i, dim) * get(b + r * dim, i, dim);
    out[r] = sum(dot);
  }
}

}  // namespace
