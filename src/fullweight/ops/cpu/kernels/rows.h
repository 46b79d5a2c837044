// Rows moved and summed by index: dispatch to experts and back, gathered entries.
#pragma once

#include "vector.h"

namespace {

// out[i] = rows[index[i]], row 0 for a negative index.
template <class T>
void gather(const T* rows, const int64_t* index, T* out, int64_t count, int64_t dim, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < count; i++)
    std::memcpy(out + i * dim, rows + std::max<int64_t>(index[i], 0) * dim, dim * sizeof(T));
}

// out[t] = sum_k rows[place[t, k]].
template <class T>
void combine(const T* rows, const int64_t* place, T* out, int64_t tokens, int64_t k, int64_t dim, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < tokens; t++)
    each(dim, [&](auto at) {
      vf s = {};
      for (int64_t j = 0; j < k; j++) s += at.get(rows + place[t * k + j] * dim);
      at.put(out + t * dim, s);
    });
}

// out[index[r]] += rows[r] for index >= 0; threads split the channels, so the order of sums is fixed.
template <class T>
void scatter_add(const T* rows, const int64_t* index, float* out, int64_t count, int64_t dim, int threads) {
  const int64_t blocks = (dim + L - 1) / L;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t part = 0; part < threads; part++) {
    const int64_t from = blocks * part / threads * L, to = std::min(dim, blocks * (part + 1) / threads * L);
    for (int64_t r = 0; r < count; r++) {
      if (index[r] < 0) continue;
      float* sum_row = out + index[r] * dim + from;
      each(to - from, [&](auto at) { at.put(sum_row, at.get(sum_row) + at.get(rows + r * dim + from)); });
    }
  }
}

}  // namespace
