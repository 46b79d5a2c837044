// FP4 and FP8 codes to bf16 or fp32: the inner loops of fp4.py and fp8.py, which are their only callers.
//
// The definitions are the torch functions there; these give the same bits. FP4 under a power-of-two scale is
// exact in bf16, so a block of 32 columns is sixteen table look-ups of two bytes: one table for each of the 256
// scale bytes, made by the caller from the definition. FP8 is a conversion and one multiplication in fp32; a
// block to bf16 is a look-up too, where the processor has one for 128 entries.

#include <algorithm>
#include <cstdint>
#include <cstring>
#if defined(__SSSE3__) || defined(__AVX512BW__)
#include <immintrin.h>
#endif

namespace {

struct bf16 { uint16_t bits; };

inline void put(float* out, uint16_t bits) {
  uint32_t wide = uint32_t(bits) << 16;
  std::memcpy(out, &wide, sizeof wide);
}
inline void put(bf16* out, uint16_t bits) { out->bits = bits; }

#if defined(__SSSE3__)
// Sixteen packed bytes to 32 values; `table` holds the 16 values' low bytes, then their high bytes.
inline void block(const uint8_t* packed, const uint8_t* table, __m128i value[4]) {
  const __m128i nibble = _mm_set1_epi8(15);
  const __m128i low = _mm_loadu_si128((const __m128i*)table), high = _mm_loadu_si128((const __m128i*)(table + 16));
  const __m128i bytes = _mm_loadu_si128((const __m128i*)packed);
  const __m128i even = _mm_and_si128(bytes, nibble), odd = _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble);
  const __m128i a0 = _mm_shuffle_epi8(low, even), a1 = _mm_shuffle_epi8(high, even);
  const __m128i b0 = _mm_shuffle_epi8(low, odd), b1 = _mm_shuffle_epi8(high, odd);
  const __m128i a = _mm_unpacklo_epi8(a0, a1), b = _mm_unpacklo_epi8(b0, b1);
  const __m128i c = _mm_unpackhi_epi8(a0, a1), d = _mm_unpackhi_epi8(b0, b1);
  value[0] = _mm_unpacklo_epi16(a, b);
  value[1] = _mm_unpackhi_epi16(a, b);
  value[2] = _mm_unpacklo_epi16(c, d);
  value[3] = _mm_unpackhi_epi16(c, d);
}
inline void full_block(const uint8_t* packed, const uint8_t* table, bf16* out) {
  __m128i value[4];
  block(packed, table, value);
  for (int i = 0; i < 4; i++) _mm_storeu_si128((__m128i*)(out + 8 * i), value[i]);
}
inline void full_block(const uint8_t* packed, const uint8_t* table, float* out) {
  __m128i value[4];
  block(packed, table, value);
  const __m128i zero = _mm_setzero_si128();
  for (int i = 0; i < 4; i++) {
    _mm_storeu_si128((__m128i*)(out + 8 * i), _mm_unpacklo_epi16(zero, value[i]));
    _mm_storeu_si128((__m128i*)(out + 8 * i + 4), _mm_unpackhi_epi16(zero, value[i]));
  }
}
#endif

template <class T> inline void part_block(const uint8_t* packed, const uint8_t* table, T* out, int64_t columns) {
  for (int64_t j = 0; j < columns; j++) {
    const int code = (packed[j / 2] >> (4 * (j & 1))) & 15;
    put(out + j, uint16_t(table[code] | (table[16 + code] << 8)));
  }
}

// packed [rows, columns/2], scales [rows, ceil(columns/32)], out rows `stride` elements apart.
template <class T>
void fp4_decode(const uint8_t* packed, const uint8_t* scales, const uint8_t* tables, T* out, int64_t rows,
                int64_t columns, int64_t stride) {
  const int64_t blocks = (columns + 31) / 32;
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    const uint8_t* from = packed + row * (columns / 2);
    T* to = out + row * stride;
    for (int64_t b = 0; b < blocks; b++) {
      const uint8_t* table = tables + 32 * scales[row * blocks + b];
      const int64_t left = columns - 32 * b;
#if defined(__SSSE3__)
      if (left >= 32) { full_block(from + 16 * b, table, to + 32 * b); continue; }
#endif
      part_block(from + 16 * b, table, to + 32 * b, left < 32 ? left : 32);
    }
  }
}

constexpr int L = 16;  // lanes
typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));
typedef uint8_t vb __attribute__((vector_size(16)));

// Sixteen codes to fp32. The code's seven low bits, moved to fp32's exponent and mantissa, are the value up to a
// power of two (e4m3's bias is 7, fp32's 127), except below 8, where the code counts 2^-9.
inline vf numbers(const uint8_t* codes) {
  vb bytes;
  std::memcpy(&bytes, codes, sizeof bytes);
  const vi code = __builtin_convertvector(bytes, vi);
  const vi magnitude = code & 0x7f;
  const vf small = __builtin_convertvector(magnitude, vf) * 0x1p-9f;
  vi bits = magnitude < 8 ? (vi)small : (magnitude << 20) + (120 << 23);
  bits = magnitude == 127 ? vi{} + 0x7fc00000 : bits;
  return (vf)(bits | (code & 0x80) << 24);
}
inline void write(float* out, vf value) { std::memcpy(out, &value, sizeof value); }
inline void write(bf16* out, vf value) {
  const vu u = (vu)value;
  const vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;  // a NaN here has no low bits to carry
  const vh half = __builtin_convertvector(rounded, vh);
  std::memcpy(out, &half, sizeof half);
}

// Up to 128 codes by conversion.
template <class T> inline void convert(const uint8_t* from, T* to, int64_t count, float scale) {
  int64_t j = 0;
  for (; j + L <= count; j += L) write(to + j, numbers(from + j) * scale);
  if (j < count) {
    uint8_t rest[L] = {};
    T values[L];
    std::memcpy(rest, from + j, count - j);
    write(values, numbers(rest) * scale);
    std::memcpy(to + j, values, (count - j) * sizeof(T));
  }
}

// The rows of one 128 x 128 block; `columns` and `rows` are fewer at an edge.
inline void fp8_block(const uint8_t* from, float* to, int64_t rows, int64_t columns, int64_t from_stride,
                      int64_t to_stride, float scale) {
  for (int64_t row = 0; row < rows; row++) convert(from + row * from_stride, to + row * to_stride, columns, scale);
}
inline void fp8_block(const uint8_t* from, bf16* to, int64_t rows, int64_t columns, int64_t from_stride,
                      int64_t to_stride, float scale) {
#if defined(__AVX512BW__)
  if (columns == 128 && rows > 1) {  // a block has 128 magnitudes: look them up
    uint8_t codes[128];
    bf16 table[128];
    for (int i = 0; i < 128; i++) codes[i] = uint8_t(i);
    convert(codes, table, 128, scale);
    const __m512i t0 = _mm512_loadu_si512(table), t1 = _mm512_loadu_si512(table + 32);
    const __m512i t2 = _mm512_loadu_si512(table + 64), t3 = _mm512_loadu_si512(table + 96);
    const __m512i sign = _mm512_set1_epi16(int16_t(0x8000)), bit6 = _mm512_set1_epi16(64);
    for (int64_t row = 0; row < rows; row++) {
      const uint8_t* in = from + row * from_stride;
      bf16* out = to + row * to_stride;
      for (int64_t j = 0; j < 128; j += 32) {
        const __m512i code = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(in + j)));
        const __m512i below = _mm512_permutex2var_epi16(t0, code, t1);
        const __m512i above = _mm512_permutex2var_epi16(t2, code, t3);
        const __m512i value = _mm512_mask_blend_epi16(_mm512_test_epi16_mask(code, bit6), below, above);
        const __m512i signs = _mm512_and_si512(_mm512_slli_epi16(code, 8), sign);
        _mm512_storeu_si512(out + j, _mm512_or_si512(value, signs));
      }
    }
    return;
  }
#endif
  for (int64_t row = 0; row < rows; row++) convert(from + row * from_stride, to + row * to_stride, columns, scale);
}

// codes [rows, columns], scales fp32 [ceil((rows + first) / 128), ceil(columns / 128)]; row 0 is row `first`
// (below 128) of its block; out rows `stride` elements apart.
template <class T>
void fp8_decode(const uint8_t* codes, const float* scales, T* out, int64_t rows, int64_t columns, int64_t first,
                int64_t stride) {
  const int64_t blocks = (columns + 127) / 128, bands = (rows + first + 127) / 128;
  // a thread takes 8 blocks of a band at a time, whose rows are then long enough for the memory
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t band = 0; band < bands; band++) {
    for (int64_t group = 0; group < (blocks + 7) / 8; group++) {
      const int64_t begin = band ? 128 * band - first : 0;
      const int64_t end = std::min(rows, 128 * (band + 1) - first);
      for (int64_t b = 8 * group; b < std::min(blocks, 8 * group + 8); b++) {
        fp8_block(codes + begin * columns + 128 * b, out + begin * stride + 128 * b, end - begin,
                  std::min<int64_t>(columns - 128 * b, 128), columns, stride, scales[band * blocks + b]);
      }
    }
  }
}

}  // namespace

extern "C" {
#define DECODE(suffix, T)                                                                                         \
  void fp4_decode_##suffix(const uint8_t* packed, const uint8_t* scales, const uint8_t* tables, T* out,           \
                           int64_t rows, int64_t columns, int64_t stride) {                                       \
    fp4_decode(packed, scales, tables, out, rows, columns, stride);                                               \
  }                                                                                                               \
  void fp8_decode_##suffix(const uint8_t* codes, const float* scales, T* out,                                     \
                           int64_t rows, int64_t columns, int64_t first, int64_t stride) {                        \
    fp8_decode(codes, scales, out, rows, columns, first, stride);                                                 \
  }
DECODE(h, bf16)
DECODE(f, float)
}
