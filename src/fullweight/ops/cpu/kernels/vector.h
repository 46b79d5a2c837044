// Sixteen lanes of fp32, loads and stores of float and bfloat16, and what is made of them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#include <omp.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

constexpr int L = 16;  // lanes
typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));

struct bf16 { uint16_t bits; };

#if defined(__clang__)
#define PERMUTE(v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#else
#define PERMUTE(v, ...) __builtin_shuffle(v, vi{__VA_ARGS__})
#endif
// Before a loop whose arrays are to stay in registers.
#define UNROLL _Pragma("GCC unroll 16")

// sixteen bits to 32 and back; compilers make five instructions of what is one
#if defined(__AVX512F__)
inline vu widen(vh h) { return (vu)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)h); }
inline vh narrow(vu u) { return (vh)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)u); }
#else
inline vu widen(vh h) { return __builtin_convertvector(h, vu); }
inline vh narrow(vu u) { return __builtin_convertvector(u, vh); }
#endif

inline vf load(const float* p) { vf v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
inline vf load(const bf16* p) {
  vh h; std::memcpy(&h, p, sizeof h);
  return (vf)(widen(h) << 16);
}
inline void store(bf16* p, vf v) {
  vu u = (vu)v;
  vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  vu quiet = (u >> 16) | 0x40u;
  vi nan = v != v;
  vh h = narrow((vu)(nan ? (vi)quiet : (vi)rounded));
  std::memcpy(p, &h, sizeof h);
}
// Places of one vector in a row: sixteen elements from i on, or the last n < 16, whose further lanes read as zero
// and are not written.
struct Whole {
  int64_t i;
  template <class T> vf get(const T* p) const { return load(p + i); }
  template <class T> void put(T* p, vf v) const { store(p + i, v); }
  vf only(vf v, float) const { return v; }
};
struct Part {
  int64_t i, n;
  template <class T> vf get(const T* p) const {
    T buffer[L] = {};
    std::memcpy(buffer, p + i, n * sizeof(T));
    return load(buffer);
  }
  template <class T> void put(T* p, vf v) const {
    T buffer[L];
    store(buffer, v);
    std::memcpy(p + i, buffer, n * sizeof(T));
  }
  // v where there are elements, `otherwise` in the lanes behind them
  vf only(vf v, float otherwise) const;
};
// f at every place of a row of n elements. The last part is a loop of its own: a test for it in every round costs
// more than most rounds do.
template <class F> inline void each(int64_t n, F f) {
  int64_t i = 0;
  for (; i + L <= n; i += L) f(Whole{i});
  if (i < n) f(Part{i, n - i});
}

template <class T> inline void clear(T* row, int64_t n) {
  if (n > 0) std::memset((void*)row, 0, n * sizeof(T));
}

// By exchanging halves, quarters and so on: sixteen additions in a row would each wait for the one before, and taking
// a vector apart through memory would keep it there while it is summed up.
inline float sum(vf v) {
  v += PERMUTE(v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  v += PERMUTE(v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  v += PERMUTE(v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  return v[0] + v[1];
}
inline vf broadcast(float x) { return vf{} + x; }
inline vf smaller(vf a, vf b) { return a < b ? a : b; }
inline vf larger(vf a, vf b) { return a > b ? a : b; }
inline vi lane() { return vi{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }
inline float largest(vf v) {
  v = larger(v, PERMUTE(v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  v = larger(v, PERMUTE(v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  v = larger(v, PERMUTE(v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  return v[0] > v[1] ? v[0] : v[1];
}
// The two of each pair of lanes exchanged.
inline vf swapped(vf v) { return PERMUTE(v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14); }
// p[0], p[0], p[1], p[1], ... p[7], p[7]
inline vf doubled(const float* p) {
  vf v = {};
  for (int i = 0; i < L / 2; i++) v[i] = p[i];
  return PERMUTE(v, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
}
inline vf Part::only(vf v, float otherwise) const { return lane() < (int32_t)n ? v : broadcast(otherwise); }

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

}  // namespace
