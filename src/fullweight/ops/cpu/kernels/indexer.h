// The indexer's choice of entries and its loss.
#pragma once

#include "vector.h"

namespace {

inline vu ordered(vf v) {  // unsigned keys in the order of floats
  vu bits = (vu)v;
  vi negative = (vi)bits < 0;
  return (vu)(negative ? (vi)~bits : (vi)(bits | 0x80000000u));
}

// products [queries, heads, width] -> the k best of each query's visible range by sum_h w * relu, ties to the
// lower index; selected [queries, k] ascending, -1 last. `offset` is the entry that column 0 stands for.
template <class T>
void select_entries(const T* products, const float* weights, const int32_t* low, const int32_t* high,
                    int64_t* selected, int64_t queries, int64_t heads, int64_t width, int64_t k,
                    int64_t offset, int threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<uint32_t> keys((width + L) / L * L + L);
#pragma omp for schedule(dynamic, 8)
    for (int64_t q = 0; q < queries; q++) {
      const int64_t from = low[q], n = high[q] - from;
      int64_t* chosen = selected + q * k;
      int64_t filled = 0;
      if (n <= k) {
        for (; filled < n; filled++) chosen[filled] = offset + from + filled;
      } else {
        each(n, [&](auto at) {
          vf score = {};
          for (int64_t h = 0; h < heads; h++) {
            vf p = at.get(products + (q * heads + h) * width + from);
            score += weights[q * heads + h] * (p > 0.0f ? p : vf{});
          }
          // + 0.0 turns -0.0 into 0.0, so that the two tie; no score has the key 0
          vu key = (vu)at.only((vf)ordered(score + 0.0f), 0.0f);
          std::memcpy(&keys[at.i], &key, sizeof key);
        });
        uint32_t bound = 0;  // largest key that at least k keys reach
        for (int bit = 31; bit >= 0; bit--) {
          const uint32_t candidate = bound | (1u << bit);
          vi reached = {};
          for (int64_t i = 0; i < n; i += L) {
            vu key; std::memcpy(&key, &keys[i], sizeof key);
            reached -= (vi)(key >= candidate);
          }
          int64_t total = 0;
          for (int i = 0; i < L; i++) total += reached[i];
          if (total >= k) bound = candidate;
          if (total == k) break;
        }
        int64_t above = 0;
        for (int64_t i = 0; i < n; i++) above += keys[i] > bound;
        int64_t ties = k - above;
        for (int64_t i = 0; i < n && filled < k; i++) {
          if (keys[i] > bound) chosen[filled++] = offset + from + i;
          else if (keys[i] == bound && ties > 0) { chosen[filled++] = offset + from + i; ties--; }
        }
      }
      for (; filled < k; filled++) chosen[filled] = -1;
    }
  }
}

// KL(p || softmax(I)) of each token over its k selected entries, p = mass / sum(mass), and the gradients of
// their sum. products [tokens, heads, k] become their own gradient in place; dweights [tokens, heads].
template <class T>
void index_loss(T* products, const float* weights, const int32_t* counts, const float* mass, float* dweights,
                double* losses, int64_t tokens, int64_t heads, int64_t k, int threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> score((k + L) / L * L);
    double total = 0;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; t++) {
      const int64_t n = counts[t];
      float whole = 0;
      for (int64_t i = 0; i < n; i++) whole += mass[t * k + i];
      const bool silent = !(whole > 0);
      float top = -INFINITY, sum_exp = 0, loss = 0;
      each(n, [&](auto at) {
        vf s = {};
        for (int64_t h = 0; h < heads; h++) {
          vf p = at.get(products + (t * heads + h) * k);
          s += weights[t * heads + h] * (p > 0.0f ? p : vf{});
        }
        at.put(score.data(), s);
      });
      for (int64_t i = 0; i < n; i++) top = std::max(top, score[i]);
      for (int64_t i = 0; i < n; i++) sum_exp += std::exp(score[i] - top);
      const float log_sum = top + std::log(sum_exp);
      for (int64_t i = 0; i < n; i++) {
        const float p = silent ? 0.0f : mass[t * k + i] / whole, log_q = score[i] - log_sum;
        if (p > 0) loss += p * (std::log(p) - log_q);
        score[i] = silent ? 0.0f : std::exp(log_q) - p;
      }
      total += loss;
      for (int64_t h = 0; h < heads; h++) {
        T* row = products + (t * heads + h) * k;
        const float w = weights[t * heads + h];
        vf dw = {};
        each(n, [&](auto at) {
          vf p = at.get(row), g = at.get(score.data());
          vi on = p > 0.0f;
          dw += on ? g * p : vf{};
          at.put(row, on ? g * w : vf{});
        });
        clear(row + n, k - n);
        dweights[t * heads + h] = sum(dw);
      }
    }
    losses[omp_get_thread_num()] = total;
  }
}

}  // namespace
