// The compressor: gated pooling of windows into entries, fp32.
#pragma once

#include "vector.h"

namespace {

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
    each(c, [&](auto at) {
      vf top = broadcast(-INFINITY), total = {}, mixed = {};
      for (int s = 0; s < count; s++) top = larger(at.get(slots[s].gate) + at.get(slots[s].ape), top);
      for (int s = 0; s < count; s++) {
        vf p = exponential(at.get(slots[s].gate) + at.get(slots[s].ape) - top);
        total += p;
        mixed += p * at.get(slots[s].value);
      }
      at.put(out + e * c, mixed / total);
    });
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
      each(c, [&](auto at) {
        vf top = broadcast(-INFINITY), total = {}, mixed = {}, p[256];
        for (int s = 0; s < count; s++) top = larger(at.get(slots[s].gate) + at.get(slots[s].ape), top);
        for (int s = 0; s < count; s++) {
          p[s] = exponential(at.get(slots[s].gate) + at.get(slots[s].ape) - top);
          total += p[s];
          mixed += p[s] * at.get(slots[s].value);
        }
        mixed /= total;
        vf grad = at.get(dout + e * c);
        for (int s = 0; s < count; s++) {
          vf share = p[s] / total * grad;
          vf dgate = share * (at.get(slots[s].value) - mixed);
          at.put(dvalues + slots[s].at, share);
          at.put(dgates + slots[s].at, dgate);
          float* a = mine + (slots[s].ape - ape);
          at.put(a, at.get(a) + dgate);
        }
      });
    }
  }
}

}  // namespace
