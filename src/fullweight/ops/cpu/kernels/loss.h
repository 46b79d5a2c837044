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
    each(vocabulary, [&](auto at) { most = larger(at.only(at.get(row), -INFINITY), most); });
    const float top = largest(most);
    each(vocabulary, [&](auto at) { total += at.only(exponential(at.get(row) - top), 0.0f); });
    const float lse = top + std::log(sum(total)), w = weights[r];
    const Part target{targets[r], 1};
    const float score = target.get(row)[0];
    log_probs[r] = score - lse;
    if (!with_gradient) continue;
    each(vocabulary, [&](auto at) { at.put(row, w * exponential(at.get(row) - lse)); });
    target.put(row, broadcast(w * (std::exp(score - lse) - 1.0f)));
  }
}

}  // namespace
