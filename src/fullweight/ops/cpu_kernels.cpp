// Fused element-wise parts of the hot operations, for CPUs. Matrix products stay in torch.
//
// Every kernel is one pass over rows that reads and writes memory once; arithmetic is fp32 whatever the
// storage (float or bfloat16). The mathematics is that of reference.py; names and shapes are explained in
// cpu.py, which is the only caller. Plain C++17 with vector extensions and OpenMP, no torch headers, so that
// it compiles in seconds wherever a compiler is.
//
// Determinism: a row belongs to one thread and sums over rows go through per-thread buffers that are added in
// thread order, so results depend on the number of threads but not on timing.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#include <omp.h>

namespace {

constexpr int L = 16;  // lanes
typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));

struct bf16 { uint16_t bits; };

inline vf load(const float* p) { vf v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
inline vf load(const bf16* p) {
  vh h; std::memcpy(&h, p, sizeof h);
  return (vf)(__builtin_convertvector(h, vu) << 16);
}
inline void store(bf16* p, vf v) {
  vu u = (vu)v;
  vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  vu quiet = (u >> 16) | 0x40u;
  vi nan = v != v;
  vh h = __builtin_convertvector((vu)(nan ? (vi)quiet : (vi)rounded), vh);
  std::memcpy(p, &h, sizeof h);
}
// The last n < L elements of a row: lanes past n read as zero and are not written.
template <class T> inline vf load_part(const T* p, int64_t n) {
  T buffer[L] = {};
  std::memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}
template <class T> inline void store_part(T* p, vf v, int64_t n) {
  T buffer[L];
  store(buffer, v);
  std::memcpy(p, buffer, n * sizeof(T));
}
template <class T> inline vf get(const T* p, int64_t i, int64_t n) {
  return n - i >= L ? load(p + i) : load_part(p + i, n - i);
}
template <class T> inline void put(T* p, int64_t i, int64_t n, vf v) {
  if (n - i >= L) store(p + i, v); else store_part(p + i, v, n - i);
}

inline float sum(vf v) { float s = 0; for (int i = 0; i < L; i++) s += v[i]; return s; }
inline float largest(vf v) { float m = v[0]; for (int i = 1; i < L; i++) m = v[i] > m ? v[i] : m; return m; }
inline vf broadcast(float x) { return vf{} + x; }
inline vf smaller(vf a, vf b) { return a < b ? a : b; }
inline vf larger(vf a, vf b) { return a > b ? a : b; }
inline vi lane() { return vi{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

// exp to about 1 ulp: 2^n times a degree-7 polynomial on [-ln2/2, ln2/2]; 0 below -87.3, NaN stays NaN.
inline vf exponential(vf x) {
  const vf lowest = broadcast(-87.3f), highest = broadcast(88.7f);
  vf y = x < lowest ? lowest : x;
  y = y > highest ? highest : y;
  vf n = y * 1.44269504088896341f + 12582912.0f;
  n = n - 12582912.0f;
  vf f = y - n * 0.693359375f;
  f = f - n * -2.12194440e-4f;
  vf p = f * 1.98412698e-4f + 1.38888889e-3f;
  p = p * f + 8.33333333e-3f;
  p = p * f + 4.16666667e-2f;
  p = p * f + 1.66666667e-1f;
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  vi power = (__builtin_convertvector(n, vi) + 127) << 23;
  p = p * (vf)power;
  p = x < lowest ? vf{} : p;
  return x != x ? x : p;
}
inline vf logistic(vf x) { return 1.0f / (1.0f + exponential(-x)); }

// ---- RMSNorm and rotary ------------------------------------------------------------------------------

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

// ---- clamped SwiGLU ----------------------------------------------------------------------------------

// out [rows, f] = scale[row] * silu(min(gate, limit)) * clamp(up); scale may be null.
template <class T>
void swiglu_forward(const T* gate_up, const float* scale, T* out, int64_t rows, int64_t f, float limit,
                    int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    const T* g = gate_up + r * 2 * f;
    const float w = scale ? scale[r] : 1.0f;
    for (int64_t i = 0; i < f; i += L) {
      vf gate = get(g, i, f), up = get(g + f, i, f);
      gate = gate > limit ? broadcast(limit) : gate;
      up = up > limit ? broadcast(limit) : up;
      up = up < -limit ? broadcast(-limit) : up;
      put(out + r * f, i, f, gate * logistic(gate) * up * w);
    }
  }
}

// dgate_up, dscale [rows] (when scale) and the scaled activations again, for the next product's gradient.
template <class T>
void swiglu_backward(const T* dout, const T* gate_up, const float* scale, T* dgate_up, float* dscale, T* out,
                     int64_t rows, int64_t f, float limit, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    const T* g = gate_up + r * 2 * f;
    T* dg = dgate_up + r * 2 * f;
    const float w = scale ? scale[r] : 1.0f;
    vf total = {};
    for (int64_t i = 0; i < f; i += L) {
      vf gate = get(g, i, f), up = get(g + f, i, f), d = get(dout + r * f, i, f);
      vi gate_in = gate <= limit, up_in = (up <= limit) & (up >= -limit);
      gate = gate > limit ? broadcast(limit) : gate;
      up = up > limit ? broadcast(limit) : up;
      up = up < -limit ? broadcast(-limit) : up;
      vf sigma = logistic(gate), silu = gate * sigma;
      vf activation = silu * up;
      total += d * activation;
      d = d * w;
      vf slope = sigma * (1.0f + gate * (1.0f - sigma));
      put(dg, i, f, gate_in ? d * up * slope : vf{});
      put(dg + f, i, f, up_in ? d * silu : vf{});
      if (out) put(out + r * f, i, f, activation * w);
    }
    if (dscale) dscale[r] = sum(total);
  }
}

// ---- hyper-connections -------------------------------------------------------------------------------

// logits[t][o] = rstd[t] * <u[t], fn[o]> for `count` tokens, four tokens and four outputs at a time: fn does not
// fit the first-level cache. u [count, width], fn [M, width], logits [count, M].
template <int M, class T>
void hyper_logits(const T* u, const float* fn, int64_t width, int64_t count, float eps, float* logits, float* rstd) {
  for (int64_t t = 0; t < count; t++) {
    vf squares = {};
    for (int64_t k = 0; k < width; k += L) { vf v = get(u + t * width, k, width); squares += v * v; }
    rstd[t] = 1.0f / std::sqrt(sum(squares) / width + eps);
  }
  for (int64_t first = 0; first < count; first += 4) {
    const T* row[4];
    for (int t = 0; t < 4; t++) row[t] = u + std::min(first + t, count - 1) * width;
    for (int out = 0; out < M; out += 4) {
      const float* weight[4];
      for (int o = 0; o < 4; o++) weight[o] = fn + std::min(out + o, M - 1) * width;
      vf dot[4][4] = {};
      for (int64_t k = 0; k < width; k += L) {
        vf v[4];
        for (int t = 0; t < 4; t++) v[t] = get(row[t], k, width);
        for (int o = 0; o < 4; o++) {
          vf w = get(weight[o], k, width);
          for (int t = 0; t < 4; t++) dot[t][o] += v[t] * w;
        }
      }
      for (int t = 0; t < 4 && first + t < count; t++)
        for (int o = 0; o < 4 && out + o < M; o++)
          logits[(first + t) * M + out + o] = sum(dot[t][o]) * rstd[first + t];
    }
  }
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
    for (int i = 0; i < N; i++) s += pre[i] * get(streams + i * d, k, d);
    put(x, k, d, s);
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
            dot += get(dx + (t0 + t) * d, k, d) * get(streams + ((t0 + t) * N + i) * d, k, d);
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
      for (int64_t first = 0; first < count; first += 4)
        for (int i = 0; i < N; i++)
          for (int64_t k = 0; k < d; k += L) {
            const int64_t at = i * d + k, end = (i + 1) * d;
            vf s[4] = {};
            for (int o = 0; o < M; o++) {
              vf w = get(fn + o * width, at, end);
              for (int t = 0; t < 4; t++) s[t] += weights[o][first + t] * w;
            }
            for (int64_t t = first; t < std::min(first + 4, count); t++) {
              vf through = pre[(t0 + t) * N + i] * get(dx + (t0 + t) * d, k, d);
              vf back = norm[t] * get(streams + (t0 + t) * width, at, end);
              put(dstreams + (t0 + t) * width, at, end, s[t - first] + through - back);
            }
          }
      // dfn: sixteen tokens share one pass over the thread's buffer
      for (int64_t k = 0; k < width; k += L) {
        vf u[L];
        for (int64_t t = 0; t < count; t++) u[t] = get(streams + (t0 + t) * width, k, width);
        for (int o = 0; o < M; o++) {
          vf s = get(my_fn + o * width, k, width);
          for (int64_t t = 0; t < count; t++) s += weights[o][t] * u[t];
          put(my_fn + o * width, k, width, s);
        }
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
      vf v = get(y + t * d, i, d), s[N];
      for (int j = 0; j < N; j++) s[j] = get(streams + (t * N + j) * d, i, d);
      for (int k = 0; k < N; k++) {
        vf r = p[k] * v;
        for (int j = 0; j < N; j++) r += c[j * N + k] * s[j];
        put(out + (t * N + k) * d, i, d, r);
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
      vf g[N], v = get(y + t * d, i, d), grad_y = {};
      for (int k = 0; k < N; k++) {
        g[k] = get(dout + (t * N + k) * d, i, d);
        grad_y += p[k] * g[k];
        dp[k] += g[k] * v;
      }
      put(dy + t * d, i, d, grad_y);
      for (int j = 0; j < N; j++) {
        vf s = get(streams + (t * N + j) * d, i, d), r = {};
        for (int k = 0; k < N; k++) { r += c[j * N + k] * g[k]; dc[j * N + k] += s * g[k]; }
        put(dstreams + (t * N + j) * d, i, d, r);
      }
    }
    for (int k = 0; k < N; k++) dpost[t * N + k] = sum(dp[k]);
    for (int i = 0; i < N * N; i++) dcomb[t * N * N + i] = sum(dc[i]);
  }
}

// ---- attention ---------------------------------------------------------------------------------------

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

// out[index[r]] += rows[r] for index >= 0; threads split the channels, so the order of sums is fixed.
template <class T>
void scatter_add(const T* rows, const int64_t* index, float* out, int64_t count, int64_t dim, int threads) {
  const int64_t blocks = (dim + L - 1) / L;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t part = 0; part < threads; part++) {
    const int64_t from = blocks * part / threads * L, to = std::min(dim, blocks * (part + 1) / threads * L);
    for (int64_t r = 0; r < count; r++) {
      if (index[r] < 0) continue;
      float* sum_row = out + index[r] * dim;
      for (int64_t i = from; i < to; i += L) put(sum_row, i, dim, get(sum_row, i, dim) + get(rows + r * dim, i, dim));
    }
  }
}

// ---- indexer -----------------------------------------------------------------------------------------

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
        for (int64_t i = 0; i < n; i += L) {
          vf score = {};
          for (int64_t h = 0; h < heads; h++) {
            vf p = get(products + (q * heads + h) * width + from, i, n);
            score += weights[q * heads + h] * (p > 0.0f ? p : vf{});
          }
          // + 0.0 turns -0.0 into 0.0, so that the two tie
          vu key = ordered(score + 0.0f);
          key = (vu)(lane() < (int32_t)std::min<int64_t>(n - i, L) ? (vi)key : vi{});
          std::memcpy(&keys[i], &key, sizeof key);
        }
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
      for (int64_t i = 0; i < n; i += L) {
        vf s = {};
        for (int64_t h = 0; h < heads; h++) {
          vf p = get(products + (t * heads + h) * k, i, n);
          s += weights[t * heads + h] * (p > 0.0f ? p : vf{});
        }
        put(score.data(), i, n, s);
      }
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
        for (int64_t i = 0; i < n; i += L) {
          vf p = get(row, i, n), g = get(score.data(), i, n);
          vi on = p > 0.0f;
          dw += on ? g * p : vf{};
          put(row, i, n, on ? g * w : vf{});
        }
        for (int64_t i = n; i < k; i += L) put(row, i, k, vf{});
        dweights[t * heads + h] = sum(dw);
      }
    }
    losses[omp_get_thread_num()] = total;
  }
}

// ---- compressor --------------------------------------------------------------------------------------

// The slots of entry e: `ratio` tokens of its window, and with overlap the `ratio` before (first half of the
// channels), unless the window is the document's first. values, gates [T, W]; out [E, c].
struct Slot { const float *value, *gate, *ape; int64_t at; };

inline int slots_of(const float* values, const float* gates, const float* ape, int64_t first, bool previous,
                    int64_t ratio, int64_t width, int64_t c, Slot* slots) {
  int count = 0;
  const int64_t own = width - c;  // with overlap the window's own series is the second half
  if (previous)
    for (int64_t j = 0; j < ratio; j++) {
      const int64_t at = (first - ratio + j) * width;
      slots[count++] = {values + at, gates + at, ape + j * width, at};
    }
  for (int64_t j = 0; j < ratio; j++) {
    const int64_t at = (first + j) * width + own;
    slots[count++] = {values + at, gates + at, ape + j * width + own, at};
  }
  return count;
}

void compress_forward(const float* values, const float* gates, const float* ape, const int64_t* first,
                      const int64_t* position, float* out, int64_t entries, int64_t ratio, int64_t width,
                      int64_t c, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t e = 0; e < entries; e++) {
    Slot slots[256];
    const int count = slots_of(values, gates, ape, first[e], width > c && position[e] > 0, ratio, width, c, slots);
    for (int64_t i = 0; i < c; i += L) {
      vf top = broadcast(-INFINITY), total = {}, mixed = {};
      for (int s = 0; s < count; s++) top = larger(get(slots[s].gate, i, c) + get(slots[s].ape, i, c), top);
      for (int s = 0; s < count; s++) {
        vf p = exponential(get(slots[s].gate, i, c) + get(slots[s].ape, i, c) - top);
        total += p;
        mixed += p * get(slots[s].value, i, c);
      }
      put(out + e * c, i, c, mixed / total);
    }
  }
}

// dvalues, dgates [T, W] and dape [threads, ratio, W], all zeroed by the caller. Entries without gradient are
// passed over: unused places of the table all point at token 0.
void compress_backward(const float* dout, const float* values, const float* gates, const float* ape,
                       const int64_t* first, const int64_t* position, float* dvalues, float* dgates,
                       float* dape, int64_t entries, int64_t ratio, int64_t width, int64_t c, int threads) {
#pragma omp parallel num_threads(threads)
  {
    float* mine = dape + omp_get_thread_num() * ratio * width;
#pragma omp for schedule(static)
    for (int64_t e = 0; e < entries; e++) {
      bool any = false;
      for (int64_t i = 0; i < c && !any; i++) any = dout[e * c + i] != 0.0f;
      if (!any) continue;
      Slot slots[256];
      const int count = slots_of(values, gates, ape, first[e], width > c && position[e] > 0, ratio, width, c, slots);
      for (int64_t i = 0; i < c; i += L) {
        vf top = broadcast(-INFINITY), total = {}, mixed = {}, p[256];
        for (int s = 0; s < count; s++) top = larger(get(slots[s].gate, i, c) + get(slots[s].ape, i, c), top);
        for (int s = 0; s < count; s++) {
          p[s] = exponential(get(slots[s].gate, i, c) + get(slots[s].ape, i, c) - top);
          total += p[s];
          mixed += p[s] * get(slots[s].value, i, c);
        }
        mixed /= total;
        vf grad = get(dout + e * c, i, c);
        for (int s = 0; s < count; s++) {
          vf share = p[s] / total * grad;
          vf dgate = share * (get(slots[s].value, i, c) - mixed);
          put(dvalues + slots[s].at, i, c, share);
          put(dgates + slots[s].at, i, c, dgate);
          float* a = mine + (slots[s].ape - ape);
          put(a, i, c, get(a, i, c) + dgate);
        }
      }
    }
  }
}

// ---- experts and head --------------------------------------------------------------------------------

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
    for (int64_t i = 0; i < dim; i += L) {
      vf s = {};
      for (int64_t j = 0; j < k; j++) s += get(rows + place[t * k + j] * dim, i, dim);
      put(out + t * dim, i, dim, s);
    }
}

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

// Each kernel under a C name for float (_f) and bfloat16 (_h).
#define BOTH(name, parameters, arguments_f, arguments_h)                  \
  extern "C" void name##_f parameters { ::name arguments_f; }             \
  extern "C" void name##_h parameters { ::name arguments_h; }
#define F(p) ((float*)(p))
#define H(p) ((bf16*)(p))

BOTH(norm_rotary_forward,
     (void* x, float* w, float* c, float* s, void* out, float* rstd, int64_t rows, int64_t dim,
      int64_t per_token, int64_t pairs, float eps, int threads),
     (F(x), w, c, s, F(out), rstd, rows, dim, per_token, pairs, eps, threads),
     (H(x), w, c, s, H(out), rstd, rows, dim, per_token, pairs, eps, threads))
BOTH(norm_rotary_backward,
     (void* dout, void* x, float* w, float* c, float* s, float* rstd, void* dx, float* dw, int64_t rows,
      int64_t dim, int64_t per_token, int64_t pairs, int threads),
     (F(dout), F(x), w, c, s, rstd, F(dx), dw, rows, dim, per_token, pairs, threads),
     (H(dout), H(x), w, c, s, rstd, H(dx), dw, rows, dim, per_token, pairs, threads))
BOTH(swiglu_forward,
     (void* g, float* scale, void* out, int64_t rows, int64_t f, float limit, int threads),
     (F(g), scale, F(out), rows, f, limit, threads), (H(g), scale, H(out), rows, f, limit, threads))
BOTH(swiglu_backward,
     (void* d, void* g, float* scale, void* dg, float* ds, void* out, int64_t rows, int64_t f, float limit,
      int threads),
     (F(d), F(g), scale, F(dg), ds, F(out), rows, f, limit, threads),
     (H(d), H(g), scale, H(dg), ds, H(out), rows, f, limit, threads))
BOTH(softmax_forward,
     (void* w, int64_t ww, int32_t* wl, int32_t* wh, void* e, int64_t ew, int32_t* el, int32_t* eh,
      float* sink, float* lse, float* mass, int64_t queries, int64_t heads, float scale, int threads),
     (F(w), ww, wl, wh, F(e), ew, el, eh, sink, lse, mass, queries, heads, scale, threads),
     (H(w), ww, wl, wh, H(e), ew, el, eh, sink, lse, mass, queries, heads, scale, threads))
BOTH(softmax_backward,
     (void* s, void* g, int64_t width, int32_t* low, int32_t* high, float* lse, float* delta,
      int64_t queries, int64_t heads, float scale, int threads),
     (F(s), F(g), width, low, high, lse, delta, queries, heads, scale, threads),
     (H(s), H(g), width, low, high, lse, delta, queries, heads, scale, threads))
BOTH(row_dot, (void* a, void* b, float* out, int64_t rows, int64_t dim, int threads),
     (F(a), F(b), out, rows, dim, threads), (H(a), H(b), out, rows, dim, threads))
BOTH(scatter_add, (void* rows, int64_t* index, float* out, int64_t count, int64_t dim, int threads),
     (F(rows), index, out, count, dim, threads), (H(rows), index, out, count, dim, threads))
BOTH(select_entries,
     (void* p, float* w, int32_t* low, int32_t* high, int64_t* selected, int64_t queries, int64_t heads,
      int64_t width, int64_t k, int64_t offset, int threads),
     (F(p), w, low, high, selected, queries, heads, width, k, offset, threads),
     (H(p), w, low, high, selected, queries, heads, width, k, offset, threads))
BOTH(index_loss,
     (void* p, float* w, int32_t* counts, float* mass, float* dw, double* losses, int64_t tokens,
      int64_t heads, int64_t k, int threads),
     (F(p), w, counts, mass, dw, losses, tokens, heads, k, threads),
     (H(p), w, counts, mass, dw, losses, tokens, heads, k, threads))
BOTH(gather, (void* rows, int64_t* index, void* out, int64_t count, int64_t dim, int threads),
     (F(rows), index, F(out), count, dim, threads), (H(rows), index, H(out), count, dim, threads))
BOTH(combine, (void* rows, int64_t* place, void* out, int64_t tokens, int64_t k, int64_t dim, int threads),
     (F(rows), place, F(out), tokens, k, dim, threads), (H(rows), place, H(out), tokens, k, dim, threads))
BOTH(cross_entropy,
     (void* logits, int64_t* targets, float* weights, float* log_probs, int64_t rows, int64_t v, int grad,
      int threads),
     (F(logits), targets, weights, log_probs, rows, v, grad, threads),
     (H(logits), targets, weights, log_probs, rows, v, grad, threads))

extern "C" void compress_forward_f(float* v, float* g, float* ape, int64_t* first, int64_t* position, float* out,
                                   int64_t entries, int64_t ratio, int64_t width, int64_t c, int threads) {
  compress_forward(v, g, ape, first, position, out, entries, ratio, width, c, threads);
}
extern "C" void compress_backward_f(float* d, float* v, float* g, float* ape, int64_t* first, int64_t* position,
                                    float* dv, float* dg, float* dape, int64_t entries, int64_t ratio,
                                    int64_t width, int64_t c, int threads) {
  compress_backward(d, v, g, ape, first, position, dv, dg, dape, entries, ratio, width, c, threads);
}

// Hyper-connections are compiled for 1, 2 and 4 streams; cpu.py sends other counts to the reference.
#define STREAMS(call)                     \
  switch (n) {                            \
    case 1: { constexpr int N = 1; call; break; } \
    case 2: { constexpr int N = 2; call; break; } \
    case 4: { constexpr int N = 4; call; break; } \
  }
#define HYPER(suffix, T)                                                                                     \
  extern "C" void hyper_pre_forward_##suffix(T* s, float* fn, float* base, float* scale, T* x, float* post,  \
                                             float* comb, float* pre, float* logits, float* rstd,            \
                                             int64_t tokens, int64_t d, int64_t iters, float eps,            \
                                             float norm_eps, int threads, int n) {                           \
    STREAMS((hyper_pre_forward<T, N, false>(s, fn, base, scale, x, post, comb, pre, logits, rstd, tokens, d, iters, \
                                     eps, norm_eps, threads)))                                               \
  }                                                                                                          \
  extern "C" void hyper_pre_backward_##suffix(T* s, float* fn, float* base, float* scale, float* pre,        \
                                              float* logits, float* rstd, T* dx, float* dpost, float* dcomb, \
                                              T* ds, float* dfn, float* dbase, float* dscale, int64_t tokens,\
                                              int64_t d, int64_t iters, float eps, int threads, int n) {     \
    STREAMS((hyper_pre_backward<T, N, false>(s, fn, base, scale, pre, logits, rstd, dx, dpost, dcomb, ds, dfn,      \
                                      dbase, dscale, tokens, d, iters, eps, threads)))                       \
  }                                                                                                          \
  extern "C" void hyper_head_forward_##suffix(T* s, float* fn, float* base, float* scale, T* x, float* pre,    \
                                              float* logits, float* rstd, int64_t tokens, int64_t d, float eps, \
                                              float norm_eps, int threads, int n) {                            \
    STREAMS((hyper_pre_forward<T, N, true>(s, fn, base, scale, x, nullptr, nullptr, pre, logits, rstd, tokens, \
                                           d, 0, eps, norm_eps, threads)))                                     \
  }                                                                                                            \
  extern "C" void hyper_head_backward_##suffix(T* s, float* fn, float* base, float* scale, float* pre,         \
                                               float* logits, float* rstd, T* dx, T* ds, float* dfn,           \
                                               float* dbase, float* dscale, int64_t tokens, int64_t d,         \
                                               int threads, int n) {                                           \
    STREAMS((hyper_pre_backward<T, N, true>(s, fn, base, scale, pre, logits, rstd, dx, nullptr, nullptr, ds,   \
                                            dfn, dbase, dscale, tokens, d, 0, 0.0f, threads)))                 \
  }                                                                                                            \
  extern "C" void hyper_mix_##suffix(T* s, float* pre, T* x, int64_t tokens, int64_t d, int threads, int n) {  \
    STREAMS((hyper_mix<T, N>(s, pre, x, tokens, d, threads)))                                                \
  }                                                                                                          \
  extern "C" void hyper_post_forward_##suffix(T* s, T* y, float* post, float* comb, T* out, int64_t tokens,  \
                                              int64_t d, int threads, int n) {                               \
    STREAMS((hyper_post_forward<T, N>(s, y, post, comb, out, tokens, d, threads)))                           \
  }                                                                                                          \
  extern "C" void hyper_post_backward_##suffix(T* dout, T* s, T* y, float* post, float* comb, T* ds, T* dy,  \
                                               float* dpost, float* dcomb, int64_t tokens, int64_t d,        \
                                               int threads, int n) {                                         \
    STREAMS((hyper_post_backward<T, N>(dout, s, y, post, comb, ds, dy, dpost, dcomb, tokens, d, threads)))   \
  }
HYPER(f, float)
HYPER(h, bf16)
