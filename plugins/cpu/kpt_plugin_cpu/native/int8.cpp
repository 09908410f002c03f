// The two ends of an int8 product: rows of activations rounded to bytes around 128, and the integer product
// scaled back. Each row is read once from memory and once from the first cache.

#include <cstdint>
#include <cstring>

// Inductor's code has its vectors written out, and its flags forbid the compiler to make any. Here it has to.
#if defined(__clang__)
#define IN_VECTORS _Pragma("clang loop vectorize(enable)")
#else
#define IN_VECTORS
#pragma GCC optimize("tree-loop-vectorize")
#endif

constexpr float LEAST = 1e-30f;  // a row of zeros has this scale

typedef uint16_t Half;  // bfloat16

static inline float wide(float x) { return x; }
static inline float wide(Half x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

static inline void narrow(float x, float* to) { *to = x; }
static inline void narrow(float x, Half* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  // To the nearest, ties to even; the payload of a NaN is cut, and its quiet bit set.
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  *to = static_cast<Half>(is_nan ? (bits >> 16) | 0x40u : rounded);
}

static inline bool finite_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return (bits & 0x7f800000u) != 0x7f800000u;
}

// largest |x * inverse| of each row / 127 -> scales; round(x * inverse / scale) + 128 -> codes. A row that holds a
// NaN or an infinity has NaN for its scale, so that all of its products are NaN.
template <typename T>
static void quantize(const T* x, const float* inverse, uint8_t* codes, float* scales, int64_t rows, int64_t width,
                     int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && rows > 1)
  for (int64_t row = 0; row < rows; ++row) {
    const T* __restrict from = x + row * width;
    uint8_t* __restrict to = codes + row * width;
    uint32_t most = 0;  // of the bits of absolute values, which order as these do, NaN and infinity above all
    IN_VECTORS
    for (int64_t k = 0; k < width; ++k) {
      const float value = inverse ? wide(from[k]) * inverse[k] : wide(from[k]);
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      bits &= 0x7fffffffu;
      most = bits > most ? bits : most;
    }
    float largest;
    std::memcpy(&largest, &most, 4);
    if (!finite_bits(largest)) {
      const uint32_t nan = 0x7fc00000u;
      std::memcpy(&scales[row], &nan, 4);
      std::memset(to, 128, static_cast<size_t>(width));
      continue;
    }
    largest = largest < LEAST ? LEAST : largest;
    scales[row] = largest / 127.0f;
    const float factor = 127.0f / largest;
    IN_VECTORS
    for (int64_t k = 0; k < width; ++k) {
      const float value = inverse ? wide(from[k]) * inverse[k] : wide(from[k]);
      // At most 127 and a rounding error in magnitude: positive after the sum, where cutting off rounds.
      to[k] = static_cast<uint8_t>(static_cast<int32_t>(value * factor + 128.5f));
    }
  }
}

template <typename T>
static void rescale(const T* product, const float* scales, const float* bias, T* out, int64_t rows,
                    int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && rows > 1)
  for (int64_t row = 0; row < rows; ++row) {
    const T* __restrict from = product + row * width;
    T* __restrict to = out + row * width;
    const float scale = scales[row];
    if (bias) {
      IN_VECTORS
      for (int64_t n = 0; n < width; ++n) narrow(wide(from[n]) * scale + bias[n], to + n);
    } else {
      IN_VECTORS
      for (int64_t n = 0; n < width; ++n) narrow(wide(from[n]) * scale, to + n);
    }
  }
}

#define KPT_INT8(NAME, T)                                                                                           \
  extern "C" void kpt_quantize_##NAME(const T* x, const float* inverse, uint8_t* codes, float* scales,              \
                                      int64_t rows, int64_t width, int threads) {                                   \
    quantize(x, inverse, codes, scales, rows, width, threads);                                                      \
  }                                                                                                                 \
  extern "C" void kpt_rescale_##NAME(const T* product, const float* scales, const float* bias, T* out,              \
                                     int64_t rows, int64_t width, int threads) {                                    \
    rescale(product, scales, bias, out, rows, width, threads);                                                      \
  }

KPT_INT8(float32, float)
KPT_INT8(bfloat16, Half)
