// Fused parts of the hot operations around the matrix products, which stay in torch: the C names of all kernels.
//
// Every kernel is one pass over rows that reads and writes memory once; arithmetic is fp32 whatever the
// storage (float or bfloat16). The mathematics is that of reference.py; shapes are explained where the kernels
// are called (ops/cpu/*.py). Plain C++17 with vector extensions and OpenMP, no torch headers, so that it
// compiles in seconds wherever a compiler is.
//
// Determinism: a row belongs to one thread and sums over rows go through per-thread buffers that are added in
// thread order, so results depend on the number of threads but not on timing.

#include "attention.h"
#include "compressor.h"
#include "hyper.h"
#include "indexer.h"
#include "loss.h"
#include "norm.h"
#include "rows.h"
#include "swiglu.h"

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
