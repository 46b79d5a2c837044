// Cross-entropy and its gradient, in place of the logits.
#pragma once

#include "vector.h"

namespace {

// logits [rows, V] -> weight * (softmax - onehot) in place, log_probs [rows] of the targets.
template <class T>
void cross_entropy(T* logits, const int64_t* targets, const float* weights, float* log_probs, int64_t rows,
                   int64_t vocabulary, bool with_gradient, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    T* row = logits + r * vocabulary;
    vf most = broadcast(-INFINITY), total = {};
    for (int64_t i = 0; i < vocabulary; i += L) {
      vf v = get(row, i, vocabulary);
      v = lane() < (int32_t)std::min<int64_t>(vocabulary - i, L) ? v : broadcast(-INFINITY);
      most = larger(v, most);
    }
    const float top = largest(most);
    for (int64_t i = 0; i < vocabulary; i += L) {
      vf v = exponential(get(row, i, vocabulary) - top);
      total += lane() < (int32_t)std::min<int64_t>(vocabulary - i, L) ? v : vf{};
    }
    const float lse = top + std::log(sum(total)), w = weights[r];
    const float target = get(row, targets[r], targets[r] + 1)[0];
    log_probs[r] = target - lse;
    if (!with_gradient) continue;
    for (int64_t i = 0; i < vocabulary; i += L)
      put(row, i, vocabulary, w * exponential(get(row, i, vocabulary) - lse));
    put(row, targets[r], targets[r] + 1, broadcast(w * (std::exp(target - lse) - 1.0f)));
  }
}

}  // namespace
