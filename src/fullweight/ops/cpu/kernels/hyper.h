// Hyper-connections.
#pragma once

#include "vector.h"

namespace {

// Rows are whole numbers of vectors here (d % L == 0); cpu/__init__.py sends other widths to the reference.
//
// Rows of fn and of the streams lie a power of two apart, so that a tall block of them falls into few sets of the
// first-level cache: blocks that are read more than once are copied side by side first.

// logits[t][o] = rstd[t] * <u[t], fn[o]> for `count` <= L tokens. u [count, width], fn [M, width], logits [count, M].
template <int M, class T>
void hyper_logits(const T* u, const float* fn, int64_t width, int64_t count, float eps, float* logits, float* rstd) {
  constexpr int V = 16, G = M % 6 == 0 ? 6 : M % 4 == 0 ? 4 : 1;  // vectors to a block, outputs to a tile
  for (int64_t t = 0; t < count; t++) {
    vf squares = {};
    for (int64_t k = 0; k < width; k += L) { vf v = load(u + t * width + k); squares += v * v; }
    rstd[t] = 1.0f / std::sqrt(sum(squares) / width + eps);
  }
  vf dot[L][M] = {}, block[M][V];
  for (int64_t k = 0; k < width; k += V * L) {
    const int vectors = std::min<int64_t>(V, (width - k) / L);
    for (int o = 0; o < M; o++)
      for (int v = 0; v < vectors; v++) block[o][v] = load(fn + o * width + k + v * L);
    for (int64_t first = 0; first < count; first += 4) {
      const T* row[4];
      for (int t = 0; t < 4; t++) row[t] = u + std::min(first + t, count - 1) * width + k;
      for (int out = 0; out < M; out += G) {
        vf s[4][G];
        UNROLL for (int t = 0; t < 4; t++)
          UNROLL for (int o = 0; o < G; o++) s[t][o] = dot[first + t][out + o];
        for (int v = 0; v < vectors; v++) {
          vf x[4];
          UNROLL for (int t = 0; t < 4; t++) x[t] = load(row[t] + v * L);
          UNROLL for (int o = 0; o < G; o++)
            UNROLL for (int t = 0; t < 4; t++) s[t][o] += x[t] * block[out + o][v];
        }
        UNROLL for (int t = 0; t < 4; t++)
          UNROLL for (int o = 0; o < G; o++) dot[first + t][out + o] = s[t][o];
      }
    }
  }
  for (int64_t t = 0; t < count; t++)
    for (int o = 0; o < M; o++) logits[t * M + o] = sum(dot[t][o]) * rstd[t];
}

// Sixteen tokens' Sinkhorn at once: m[j * N + k] holds entry (j, k) of each. `trace`, when given, gets every
// state after a normalisation and the reciprocals it multiplied by.
template <int N>
void sinkhorn(vf* m, int64_t iters, float eps, vf* trace) {
  auto columns = [&]() {
    for (int k = 0; k < N; k++) {
      vf s = {};
      for (int j = 0; j < N; j++) s += m[j * N + k];
      vf inverse = 1.0f / (s + eps);
      for (int j = 0; j < N; j++) m[j * N + k] *= inverse;
      if (trace) trace[N * N + k] = inverse;
    }
    if (trace) { std::copy(m, m + N * N, trace); trace += N * N + N; }
  };
  auto rows = [&]() {
    for (int j = 0; j < N; j++) {
      vf s = {};
      for (int k = 0; k < N; k++) s += m[j * N + k];
      vf inverse = 1.0f / (s + eps);
      for (int k = 0; k < N; k++) m[j * N + k] *= inverse;
      if (trace) trace[N * N + j] = inverse;
    }
    if (trace) { std::copy(m, m + N * N, trace); trace += N * N + N; }
  };
  columns();
  for (int64_t i = 1; i < iters; i++) { rows(); columns(); }
}

template <int N>
void row_softmax(vf* m) {
  for (int j = 0; j < N; j++) {
    vf top = m[j * N], s = {};
    for (int k = 1; k < N; k++) top = larger(top, m[j * N + k]);
    for (int k = 0; k < N; k++) { m[j * N + k] = exponential(m[j * N + k] - top); s += m[j * N + k]; }
    for (int k = 0; k < N; k++) m[j * N + k] /= s;
  }
}

// x [d] = sum_i pre[i] * streams[i]; one token.
template <class T, int N>
inline void mix_streams(const T* streams, const float* pre, T* x, int64_t d) {
  for (int64_t k = 0; k < d; k += L) {
    vf s = {};
    for (int i = 0; i < N; i++) s += pre[i] * load(streams + i * d + k);
    store(x + k, s);
  }
}

template <class T, int N>
void hyper_mix(const T* streams, const float* pre, T* x, int64_t tokens, int64_t d, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < tokens; t++) mix_streams<T, N>(streams + t * N * d, pre + t * N, x + t * d, d);
}

// logits [T, M] (saved), rstd [T], x [T, d], pre [T, N], post [T, N], comb [T, N, N]; M = (2+N)N. HEAD collapses
// the streams for good: M = N, and there is no post or comb.
template <class T, int N, bool HEAD>
void hyper_pre_forward(const T* streams, const float* fn, const float* base, const float* scale, T* x,
                       float* post, float* comb, float* pre, float* logits, float* rstd, int64_t tokens,
                       int64_t d, int64_t iters, float eps, float norm_eps, int threads) {
  constexpr int M = HEAD ? N : (2 + N) * N;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < (tokens + L - 1) / L; block++) {
    const int64_t t0 = block * L, count = std::min<int64_t>(L, tokens - t0);
    hyper_logits<M>(streams + t0 * N * d, fn, N * d, count, norm_eps, logits + t0 * M, rstd + t0);
    vf z[M] = {};
    for (int o = 0; o < M; o++)
      for (int64_t i = 0; i < count; i++) z[o][i] = logits[(t0 + i) * M + o];
    for (int i = 0; i < N; i++) {
      vf a = logistic(z[i] * scale[0] + base[i]) + eps;
      for (int64_t t = 0; t < count; t++) pre[(t0 + t) * N + i] = a[t];
    }
    if constexpr (!HEAD) {
      for (int i = 0; i < N; i++) {
        vf b = 2.0f * logistic(z[N + i] * scale[1] + base[N + i]);
        for (int64_t t = 0; t < count; t++) post[(t0 + t) * N + i] = b[t];
      }
      vf m[N * N];
      for (int i = 0; i < N * N; i++) m[i] = z[2 * N + i] * scale[2] + base[2 * N + i];
      row_softmax<N>(m);
      for (int i = 0; i < N * N; i++) m[i] += eps;
      sinkhorn<N>(m, iters, eps, nullptr);
      for (int i = 0; i < N * N; i++)
        for (int64_t t = 0; t < count; t++) comb[(t0 + t) * N * N + i] = m[i][t];
    }
    for (int64_t t = t0; t < t0 + count; t++) mix_streams<T, N>(streams + t * N * d, pre + t * N, x + t * d, d);
  }
}

// dz of the comb logits (before scale) from dcomb: back through Sinkhorn and the row softmax, sixteen tokens.
template <int N>
void sinkhorn_backward(vf* m, vf* g, int64_t iters, float eps, vf* trace, vf* dz) {
  constexpr int S = N * N + N;
  vf soft[N * N];
  row_softmax<N>(m);
  std::copy(m, m + N * N, soft);
  for (int i = 0; i < N * N; i++) m[i] += eps;
  sinkhorn<N>(m, iters, eps, trace);
  for (int64_t step = 2 * iters - 2; step >= 0; step--) {  // 2*iters-1 normalisations, the even ones of columns
    const vf *state = trace + step * S, *inverse = state + N * N;
    for (int a = 0; a < N; a++) {
      vf dot = {};
      for (int b = 0; b < N; b++) { int i = step % 2 ? a * N + b : b * N + a; dot += g[i] * state[i]; }
      for (int b = 0; b < N; b++) { int i = step % 2 ? a * N + b : b * N + a; g[i] = (g[i] - dot) * inverse[a]; }
    }
  }
  for (int j = 0; j < N; j++) {
    vf dot = {};
    for (int k = 0; k < N; k++) dot += g[j * N + k] * soft[j * N + k];
    for (int k = 0; k < N; k++) dz[j * N + k] = soft[j * N + k] * (g[j * N + k] - dot);
  }
}

// The gradients of up to sixteen tokens' streams through logits, norm and mixture, and what they add to fn's, for V
// vectors of stream i from channel k on. weights [M, L] and norm [L] are zero for the tokens that are missing.
template <class T, int N, int M>
struct Gradients {
  const T *streams, *dx;
  const float *fn, *pre;
  T* dstreams;
  float* dfn;
  const float *weights, *norm;
  int64_t count, d;

  template <int V> void at(int i, int64_t k) const {
    constexpr int G = M % 4 == 0 ? 4 : 1;
    const int64_t width = N * d, from = i * d + k;
    vf u[L][V] = {}, block[M][V];
    for (int64_t t = 0; t < count; t++)
      for (int v = 0; v < V; v++) u[t][v] = load(streams + t * width + from + v * L);
    for (int o = 0; o < M; o++)
      for (int v = 0; v < V; v++) block[o][v] = load(fn + o * width + from + v * L);
    for (int64_t first = 0; first < count; first += 4) {
      vf s[4][V] = {};
      for (int o = 0; o < M; o++)
        UNROLL for (int t = 0; t < 4; t++)
          UNROLL for (int v = 0; v < V; v++) s[t][v] += weights[o * L + first + t] * block[o][v];
      for (int64_t t = first; t < std::min(first + 4, count); t++)
        UNROLL for (int v = 0; v < V; v++) {
          vf through = pre[t * N + i] * load(dx + t * d + k + v * L);
          store(dstreams + t * width + from + v * L, s[t - first][v] + through - norm[t] * u[t][v]);
        }
    }
    for (int out = 0; out < M; out += G) {
      vf s[G][V];
      UNROLL for (int o = 0; o < G; o++)
        UNROLL for (int v = 0; v < V; v++) s[o][v] = load(dfn + (out + o) * width + from + v * L);
      for (int t = 0; t < L; t++)
        UNROLL for (int o = 0; o < G; o++)
          UNROLL for (int v = 0; v < V; v++) s[o][v] += weights[(out + o) * L + t] * u[t][v];
      UNROLL for (int o = 0; o < G; o++)
        UNROLL for (int v = 0; v < V; v++) store(dfn + (out + o) * width + from + v * L, s[o][v]);
    }
  }
};

// dstreams [T, N, d]; dfn [threads, M, N*d], dbase [threads, M], dscale [threads, 3 or 1] zeroed by the caller.
template <class T, int N, bool HEAD>
void hyper_pre_backward(const T* streams, const float* fn, const float* base, const float* scale,
                        const float* pre, const float* logits, const float* rstd, const T* dx,
                        const float* dpost, const float* dcomb, T* dstreams, float* dfn, float* dbase,
                        float* dscale, int64_t tokens, int64_t d, int64_t iters, float eps, int threads) {
  constexpr int M = HEAD ? N : (2 + N) * N, SCALES = HEAD ? 1 : 3;
  const int64_t width = N * d;
#pragma omp parallel num_threads(threads)
  {
    const int me = omp_get_thread_num();
    float *my_fn = dfn + me * M * width, *my_base = dbase + me * M, *my_scale = dscale + me * SCALES;
    std::vector<vf> trace(HEAD ? 0 : 2 * iters * (N * N + N));
#pragma omp for schedule(static)
    for (int64_t block = 0; block < (tokens + L - 1) / L; block++) {
      const int64_t t0 = block * L, count = std::min<int64_t>(L, tokens - t0);
      vf z[M] = {}, dz[M] = {};
      for (int o = 0; o < M; o++)
        for (int64_t i = 0; i < count; i++) z[o][i] = logits[(t0 + i) * M + o];
      for (int i = 0; i < N; i++) {
        vf a = logistic(z[i] * scale[0] + base[i]), da = {};
        for (int64_t t = 0; t < count; t++) {
          vf dot = {};
          for (int64_t k = 0; k < d; k += L)
            dot += load(dx + (t0 + t) * d + k) * load(streams + ((t0 + t) * N + i) * d + k);
          da[t] = sum(dot);
        }
        dz[i] = da * a * (1.0f - a);
      }
      if constexpr (!HEAD) {
        for (int i = 0; i < N; i++) {
          vf b = logistic(z[N + i] * scale[1] + base[N + i]), db = {};
          for (int64_t t = 0; t < count; t++) db[t] = dpost[(t0 + t) * N + i];
          dz[N + i] = 2.0f * db * b * (1.0f - b);
        }
        vf m[N * N], g[N * N] = {};
        for (int i = 0; i < N * N; i++) {
          m[i] = z[2 * N + i] * scale[2] + base[2 * N + i];
          for (int64_t t = 0; t < count; t++) g[i][t] = dcomb[(t0 + t) * N * N + i];
        }
        sinkhorn_backward<N>(m, g, iters, eps, trace.data(), dz + 2 * N);
      }
      for (int o = 0; o < M; o++) {  // dz is d(scale * z + base) so far
        const int which = HEAD || o < N ? 0 : o < 2 * N ? 1 : 2;
        for (int64_t t = count; t < L; t++) dz[o][t] = 0;
        my_base[o] += sum(dz[o]);
        my_scale[which] += sum(dz[o] * z[o]);
        dz[o] *= scale[which];
      }
      float weights[M][L], norm[L];
      for (int64_t t = 0; t < L; t++) {
        const float r = t < count ? rstd[t0 + t] : 0.0f;
        norm[t] = 0;
        for (int o = 0; o < M; o++) { weights[o][t] = dz[o][t] * r; norm[t] += dz[o][t] * z[o][t]; }
        norm[t] *= r * r / width;
      }
      const Gradients<T, N, M> rows{streams + t0 * width, dx + t0 * d, fn, pre + t0 * N, dstreams + t0 * width,
                                    my_fn, &weights[0][0], norm, count, d};
      for (int i = 0; i < N; i++) {
        int64_t k = 0;
        for (; k + 4 * L <= d; k += 4 * L) rows.template at<4>(i, k);
        for (; k < d; k += L) rows.template at<1>(i, k);
      }
    }
  }
}

template <class T, int N>
void hyper_post_forward(const T* streams, const T* y, const float* post, const float* comb, T* out,
                        int64_t tokens, int64_t d, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < tokens; t++) {
    const float *p = post + t * N, *c = comb + t * N * N;
    for (int64_t i = 0; i < d; i += L) {
      vf v = load(y + t * d + i), s[N];
      for (int j = 0; j < N; j++) s[j] = load(streams + (t * N + j) * d + i);
      for (int k = 0; k < N; k++) {
        vf r = p[k] * v;
        for (int j = 0; j < N; j++) r += c[j * N + k] * s[j];
        store(out + (t * N + k) * d + i, r);
      }
    }
  }
}

template <class T, int N>
void hyper_post_backward(const T* dout, const T* streams, const T* y, const float* post, const float* comb,
                         T* dstreams, T* dy, float* dpost, float* dcomb, int64_t tokens, int64_t d,
                         int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < tokens; t++) {
    const float *p = post + t * N, *c = comb + t * N * N;
    vf dp[N] = {}, dc[N * N] = {};
    for (int64_t i = 0; i < d; i += L) {
      vf g[N], v = load(y + t * d + i), grad_y = {};
      for (int k = 0; k < N; k++) {
        g[k] = load(dout + (t * N + k) * d + i);
        grad_y += p[k] * g[k];
        dp[k] += g[k] * v;
      }
      store(dy + t * d + i, grad_y);
      for (int j = 0; j < N; j++) {
        vf s = load(streams + (t * N + j) * d + i), r = {};
        for (int k = 0; k < N; k++) { r += c[j * N + k] * g[k]; dc[j * N + k] += s * g[k]; }
        store(dstreams + (t * N + j) * d + i, r);
      }
    }
    for (int k = 0; k < N; k++) dpost[t * N + k] = sum(dp[k]);
    for (int i = 0; i < N * N; i++) dcomb[t * N * N + i] = sum(dc[i]);
  }
}

}  // namespace
