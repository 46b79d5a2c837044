// Sixteen lanes of fp32, loads and stores of float and bfloat16, and what is made of them.
#pragma once

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

}  // namespace
