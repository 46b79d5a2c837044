// One pass of an optimizer's step over many tensors at once, for fp32 on a CPU.
//
// A step of a small row is bound by how often weights, gradients and moments go through memory, and by the calls that
// tensors of a few hundred entries cost. Here one call takes all tensors: `adamw` scales a gradient, moves both
// moments and writes the weight while the entries are in registers; `norms` reads gradients once.
//
// Determinism: entries are updated one by one, so it does not matter who does which; sums go over blocks of a fixed
// size in a fixed order, in double. Results depend on neither timing nor the number of threads. Contraction is off
// (the compiler's options) and fused multiply-adds are written out, so that a vector and its remainder agree.

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace {

constexpr int64_t BLOCK = 4096;  // entries that one thread takes at a time
constexpr int64_t LANES = 16;

// Calls body(tensor, first, last) for every block of every tensor, each thread a contiguous part of the blocks.
template <class Body>
void over_blocks(int64_t tensors, const int64_t* sizes, int threads, Body body) {
  int64_t blocks = 0;
  for (int64_t t = 0; t < tensors; ++t) blocks += (sizes[t] + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int part = 0; part < threads; ++part) {
    const int64_t begin = blocks * part / threads, end = blocks * (part + 1) / threads;
    int64_t block = 0;  // of the first of tensor t
    for (int64_t t = 0; t < tensors && block < end; ++t) {
      const int64_t count = (sizes[t] + BLOCK - 1) / BLOCK;
      const int64_t first = std::max(begin - block, int64_t(0)), last = std::min(end - block, count);
      for (int64_t b = first; b < last; ++b) body(t, block + b, b * BLOCK, std::min(sizes[t], (b + 1) * BLOCK));
      block += count;
    }
  }
}

double square_sum(const float* x, int64_t n) {
  double lanes[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int64_t l = 0; l < LANES; ++l) lanes[l] = std::fma(double(x[i + l]), double(x[i + l]), lanes[l]);
  for (int64_t l = 0; i + l < n; ++l) lanes[l] = std::fma(double(x[i + l]), double(x[i + l]), lanes[l]);
  double sum = 0;
  for (double lane : lanes) sum += lane;
  return sum;
}

}  // namespace

// weights, gradients, first and second moments: addresses of `tensors` arrays of `sizes` entries. `rates` and
// `roots` hold, for each tensor, lr / (1 - beta1^step) and sqrt(1 - beta2^step). Weights shrink by `keep` first.
extern "C" void adamw_f(float** weights, const float** gradients, float** first, float** second, const int64_t* sizes,
                        const float* rates, const float* roots, int64_t tensors, float scale, float keep,
                        float beta1_rest, float beta2, float beta2_rest, float eps, int threads) {
  over_blocks(tensors, sizes, threads, [&](int64_t t, int64_t, int64_t a, int64_t b) {
    float *__restrict w = weights[t], *__restrict m = first[t], *__restrict v = second[t];
    const float* __restrict grad = gradients[t];
    const float rate = -rates[t], root = roots[t];
#pragma omp simd
    for (int64_t i = a; i < b; ++i) {
      const float g = grad[i] * scale;
      m[i] = std::fma(beta1_rest, g - m[i], m[i]);
      v[i] = std::fma(beta2_rest * g, g, v[i] * beta2);
      w[i] = w[i] * keep + rate * m[i] / (std::sqrt(v[i]) / root + eps);
    }
  });
}

// out[t] = 2-norm of tensor t; `partial` has room for one number a block.
extern "C" void norms_f(const float** tensors, const int64_t* sizes, double* partial, float* out, int64_t count,
                        int threads) {
  over_blocks(count, sizes, threads, [&](int64_t t, int64_t block, int64_t a, int64_t b) {
    partial[block] = square_sum(tensors[t] + a, b - a);
  });
  for (int64_t t = 0, block = 0; t < count; ++t) {
    double sum = 0;
    for (int64_t a = 0; a < sizes[t]; a += BLOCK) sum += partial[block++];
    out[t] = float(std::sqrt(sum));
  }
}
