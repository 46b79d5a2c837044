// bf16 or fp32 values to FP4 and FP8 codes and scales: the inner loops of fp4.py and fp8.py, their only callers.
//
// The definitions are the torch functions there; these give the same bits. A block is read once into cache: its
// largest magnitude gives the rule's scale, the source's scale is tried first where there is one. Products are
// rounded before anything else is done with them, so this is compiled without fused multiply-add. Loops run over
// eight lanes, one AVX2 register or half an AVX-512 one. Values that are not finite give codes without meaning
// and a sum of squares that is not finite, which the caller refuses.

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

constexpr int L = 8, S = 32;  // lanes; columns of a segment, which is what is handled at a time
typedef float vf __attribute__((vector_size(32)));
typedef int32_t vi __attribute__((vector_size(32)));
typedef uint32_t vu __attribute__((vector_size(32)));
typedef uint16_t vh __attribute__((vector_size(16)));
typedef uint8_t vb __attribute__((vector_size(8)));
typedef double vd __attribute__((vector_size(64)));

struct bf16 { uint16_t bits; };
struct Segment { vf part[4]; };

template <class To, class From> inline To as(From value) {
  static_assert(sizeof(To) == sizeof(From), "");
  To result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

inline vf load(const float* from) { vf value; std::memcpy(&value, from, sizeof value); return value; }
inline vf load(const bf16* from) {
  vh half;
  std::memcpy(&half, from, sizeof half);
  return (vf)(__builtin_convertvector(half, vu) << 16);
}
// `count` values, zeros beyond.
template <class T> inline Segment read(const T* from, int64_t count) {
  Segment segment;
  if (count >= S) {
    for (int i = 0; i < 4; i++) segment.part[i] = load(from + L * i);
  } else {
    T padded[S] = {};
    std::memcpy(padded, from, count * sizeof(T));
    for (int i = 0; i < 4; i++) segment.part[i] = load(padded + L * i);
  }
  return segment;
}

// What a value of type T keeps of an fp32 one.
inline vf stored(vf value, const float*) { return value; }
inline vf stored(vf value, const bf16*) {
  const vu u = (vu)value;
  return (vf)((u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u);
}

inline vu absolute(vf value) { return (vu)value & 0x7fffffffu; }
inline vu larger(vu a, vu b) { return (vu)((vi)a > (vi)b ? (vi)a : (vi)b); }  // both below 2^31
inline uint32_t largest(vu value) {
  uint32_t found = 0;
  for (int i = 0; i < L; i++) found = std::max(found, uint32_t(value[i]));
  return found;
}
inline vu largest(const Segment& s) {
  return larger(larger(absolute(s.part[0]), absolute(s.part[1])), larger(absolute(s.part[2]), absolute(s.part[3])));
}

// Lane j: columns j, j + 8, j + 16, j + 24, squared in fp64, where that is exact.
inline vd squares(const Segment& s) {
  vd part[4];
  for (int i = 0; i < 4; i++) {
    const vd wide = __builtin_convertvector(s.part[i], vd);
    part[i] = wide * wide;
  }
  return (part[0] + part[2]) + (part[1] + part[3]);
}
inline double total(const vd& lanes) {
  double sum[L];
  std::memcpy(sum, &lanes, sizeof sum);
  for (int half = L / 2; half; half /= 2) {
    for (int i = 0; i < half; i++) sum[i] += sum[i + half];
  }
  return sum[0];
}

// A code is a sign above M mantissa bits and an exponent of bias B; the largest magnitude is `Largest` (fp32 bits).
template <int M, int B, uint32_t Largest, int Sign> struct Codes {
  static constexpr int shift = 23 - M;
  static constexpr uint32_t normal = (128u - B) << 23;            // the smallest with an exponent of its own
  static constexpr uint32_t unit = (128u - B - M) << 23;          // what codes below it count
  static constexpr uint32_t coarse = unit + (23u << 23);          // its neighbours in fp32 are a unit apart

  // Nearest code, ties to even, saturated.
  static inline vu of(vf scaled) {
    vu u = absolute(scaled);
    u = (vu)((vi)u < (vi)(vu{} + Largest) ? (vi)u : (vi)(vu{} + Largest));
    const vu rounded = ((u + ((1u << (shift - 1)) - 1u) + ((u >> shift) & 1u)) >> shift) - ((127u - B) << M);
    const vu small = (vu)((vf)u + as<float>(coarse)) - coarse;
    const vu magnitude = (vu)((vi)u < (vi)(vu{} + normal) ? (vi)small : (vi)rounded);
    return magnitude | ((vu)scaled >> 31) << Sign;
  }
  static inline vf value(vu code) {
    const vu magnitude = code & ((1u << Sign) - 1u);
    const vf small = __builtin_convertvector((vi)magnitude, vf) * as<float>(unit);
    const vu large = (magnitude << shift) + ((127u - B) << 23);
    const vu bits = (vu)((vi)magnitude < (1 << M) ? (vi)small : (vi)large);
    return (vf)(bits | (code >> Sign) << 31);
  }
};
typedef Codes<1, 1, 0x40c00000u, 3> E2M1;  // 6
typedef Codes<3, 7, 0x43e00000u, 7> E4M3;  // 448

inline float power_of_two(int byte) { return as<float>(byte ? uint32_t(byte) << 23 : 0x00400000u); }

// The byte of 2^ceil(log2(amax / largest code)), where the largest code's fp32 bits are given; amax as bits.
inline int rule_byte(uint32_t amax, uint32_t code) {
  const int exponent = int(amax >> 23) - int(code >> 23) + ((amax & 0x7fffffu) > (code & 0x7fffffu));
  return amax ? std::min(std::max(exponent, -126), 127) + 127 : 1;
}

// One scale: an E8M0 byte multiplies by its inverse, which is exact; a fp32 scale divides.
struct Power {
  typedef uint8_t Stored;
  float scale, inverse;
  explicit Power(uint8_t byte) : scale(power_of_two(byte)), inverse(power_of_two(254 - byte)) {}
  static uint8_t rule(uint32_t amax) { return uint8_t(rule_byte(amax, 0x43e00000u)); }
  inline vf scaled(vf value) const { return value * inverse; }
};
struct Factor {
  typedef float Stored;
  float scale;
  explicit Factor(float value) : scale(value) {}
  static float rule(uint32_t amax) {
    const float quotient = as<float>(amax) / 448.0f;
    return quotient > 0.0f ? quotient : 1.0f;
  }
  inline vf scaled(vf value) const {
    const vf quotient = value / scale;
    return (vf)(absolute(value) == 0u ? (vi)value : (vi)quotient);  // a zero scale over zeros
  }
};

// Codes of a segment; `decoded` takes what T keeps of their values.
template <class C, class T, class Scale>
inline void quantise(const Segment& s, const Scale& scale, vb codes[4], Segment& decoded) {
  for (int i = 0; i < 4; i++) {
    const vu code = C::of(scale.scaled(s.part[i]));
    codes[i] = __builtin_convertvector(code, vb);
    decoded.part[i] = stored(C::value(code) * scale.scale, (const T*)nullptr);
  }
}
inline bool same(const Segment& a, const Segment& b) {
  vu unequal = {};
  for (int i = 0; i < 4; i++) unequal |= (vu)a.part[i] ^ (vu)b.part[i];
  return largest((unequal >> 1) | (unequal & 1u)) == 0;
}
inline Segment difference(const Segment& a, const Segment& b) {
  Segment result;
  for (int i = 0; i < 4; i++) result.part[i] = a.part[i] - b.part[i];
  return result;
}

// A row's sums of squares (of values, of errors) by lanes, and its largest error as bits.
struct Sums {
  vd norm = {}, error = {};
  vu worst = {};
  inline void add_error(const Segment& found, const Segment& given) {
    const Segment wrong = difference(found, given);
    error += squares(wrong);
    worst = larger(worst, largest(wrong));
  }
  inline void write(double* row) const {
    row[0] = total(norm);
    row[1] = total(error);
    row[2] = as<float>(largest(worst));
  }
};

inline void pack(const vb codes[4], uint8_t* out, int64_t count) {
  uint16_t pairs[S / 2];
  uint8_t packed[S / 2];
  std::memcpy(pairs, codes, S);
  for (int i = 0; i < S / 2; i++) packed[i] = uint8_t(pairs[i] | pairs[i] >> 4);
  std::memcpy(out, packed, count / 2);
}

// values [rows, columns]; source [rows, blocks] or null; codes [rows, columns/2]; scales and kept [rows, blocks];
// sums [rows, 3].
template <class T>
void fp4_encode(const T* values, const uint8_t* source, uint8_t* codes, uint8_t* scales, uint8_t* kept,
                double* sums, int64_t rows, int64_t columns) {
  const int64_t blocks = (columns + S - 1) / S;
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    Sums found;
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t at = row * blocks + b, count = std::min<int64_t>(columns - S * b, S);
      const Segment given = read(values + row * columns + S * b, count);
      Segment decoded;
      vb code[4];
      found.norm += squares(given);
      kept[at] = 0;
      if (source) {
        quantise<E2M1, T>(given, Power(source[at]), code, decoded);
        kept[at] = same(decoded, given);
        scales[at] = source[at];
      }
      if (!kept[at]) {
        scales[at] = uint8_t(rule_byte(largest(largest(given)), 0x40c00000u));
        quantise<E2M1, T>(given, Power(scales[at]), code, decoded);
        found.add_error(decoded, given);
      }
      pack(code, codes + row * (columns / 2) + S / 2 * b, count);
    }
    found.write(sums + 3 * row);
  }
}

constexpr int64_t B = 128, G = 8;  // side of a block; blocks of a band that are handled together

// One segment of a row under its block's scale.
template <class T, class Scale>
inline void fp8_segment(const T* values, uint8_t* codes, int64_t count, const Scale& scale, Segment& given,
                        Segment& decoded) {
  given = read(values, count);
  vb code[4];
  quantise<E4M3, T>(given, scale, code, decoded);
  std::memcpy(codes, code, count);
}

// values, codes [rows, columns]; source, scales, kept [ceil(rows/128), ceil(columns/128)]; sums [rows, 3].
template <class T, class Scale>
void fp8_encode(const T* values, const typename Scale::Stored* source, uint8_t* codes,
                typename Scale::Stored* scales, uint8_t* kept, double* sums, int64_t rows, int64_t columns) {
  const int64_t blocks = (columns + B - 1) / B, bands = (rows + B - 1) / B;
#pragma omp parallel for schedule(static)
  for (int64_t band = 0; band < bands; band++) {
    const int64_t begin = B * band, end = std::min(rows, begin + B);
    Sums found[B];
    for (int64_t first = 0; first < blocks; first += G) {  // few enough to be in cache for the second reading
      const int64_t left = first * B, right = std::min(columns, (first + G) * B);
      const int64_t at = band * blocks + first, count = std::min(G, blocks - first);
      vu amax[G] = {};
      for (int64_t row = begin; row < end; row++) {
        for (int64_t j = left; j < right; j += S) {
          const Segment given = read(values + row * columns + j, right - j);
          found[row - begin].norm += squares(given);
          amax[(j - left) / B] = larger(amax[(j - left) / B], largest(given));
        }
      }
      for (int64_t b = 0; b < count; b++) {
        const int64_t from = left + B * b, to = std::min(right, from + B);
        kept[at + b] = source != nullptr;
        for (int64_t row = begin; row < end && kept[at + b]; row++) {
          const Scale scale(source[at + b]);
          for (int64_t j = from; j < to && kept[at + b]; j += S) {
            Segment given, decoded;
            const int64_t place = row * columns + j;
            fp8_segment(values + place, codes + place, std::min<int64_t>(to - j, S), scale, given, decoded);
            kept[at + b] = same(decoded, given);
          }
        }
        scales[at + b] = kept[at + b] ? source[at + b] : Scale::rule(largest(amax[b]));
      }
      for (int64_t row = begin; row < end; row++) {
        for (int64_t b = 0; b < count; b++) {
          if (kept[at + b]) continue;
          const Scale scale(scales[at + b]);
          for (int64_t j = left + B * b; j < std::min(right, left + B * (b + 1)); j += S) {
            Segment given, decoded;
            const int64_t place = row * columns + j;
            fp8_segment(values + place, codes + place, std::min<int64_t>(right - j, S), scale, given, decoded);
            found[row - begin].add_error(decoded, given);
          }
        }
      }
    }
    for (int64_t row = begin; row < end; row++) found[row - begin].write(sums + 3 * row);
  }
}

}  // namespace

extern "C" {
#define ENCODE(suffix, T)                                                                                         \
  void fp4_encode_##suffix(const T* values, const uint8_t* source, uint8_t* codes, uint8_t* scales,               \
                           uint8_t* kept, double* sums, int64_t rows, int64_t columns) {                          \
    fp4_encode(values, source, codes, scales, kept, sums, rows, columns);                                         \
  }                                                                                                               \
  void fp8_encode_##suffix(const T* values, const uint8_t* source, uint8_t* codes, uint8_t* scales,               \
                           uint8_t* kept, double* sums, int64_t rows, int64_t columns) {                          \
    fp8_encode<T, Power>(values, source, codes, scales, kept, sums, rows, columns);                               \
  }                                                                                                               \
  void fp8_wide_encode_##suffix(const T* values, const float* source, uint8_t* codes, float* scales,              \
                                uint8_t* kept, double* sums, int64_t rows, int64_t columns) {                     \
    fp8_encode<T, Factor>(values, source, codes, scales, kept, sums, rows, columns);                              \
  }
ENCODE(h, bf16)
ENCODE(f, float)
}
