// Softmax attention in float32 and bfloat16 (sums and softmax in float32), blocked for registers and the first
// two caches.
//
// Queries stand in the lanes of vectors. A panel is up to WIDTH queries of one head; its scores are kept
// transposed, [keys, WIDTH], so that the softmax over keys is arithmetic between whole vectors, and neither
// keys nor values have to be packed:
//   scores[key, query]   = sum_d  k[key, d] * q[query, d]      q packed as [features, WIDTH]
//   out[feature, query]  = sum_l  v[l, feature] * p[l, query]
// Both are the same product: rows that are broadcast element by element, times vectors of queries. Keys are
// taken in blocks with a running maximum and sum (Milakov and Gimelshein 2018, arXiv:1805.02867).
//
// Written with the vector extensions of GCC and Clang; must be compiled with contraction to FMA, and without
// reassociation (the exponential rounds by adding a large number).

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16, VECTORS = 4;
#elif defined(__AVX2__)
constexpr int LANES = 8, VECTORS = 2;
#else
constexpr int LANES = 4, VECTORS = 4;
#endif
constexpr int ROWS = 6;                 // ROWS x VECTORS accumulators fill the registers
constexpr int WIDTH = LANES * VECTORS;  // queries in a panel
constexpr int64_t KEYS = 128;           // keys in a block: their scores stay in the first cache

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef int32_t Integers __attribute__((vector_size(LANES * 4)));
typedef float Loose __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

constexpr float LOG2_E = 1.44269504088896341f;
constexpr float LOWEST = -INFINITY;

static inline Vector load(const float* from) { return *reinterpret_cast<const Loose*>(from); }
static inline void store(float* to, Vector x) { *reinterpret_cast<Loose*>(to) = x; }
static inline Vector all(float x) { return x - Vector{}; }

static inline Vector larger(Vector x, Vector y) { return x > y ? x : y; }

// 2^x for x <= 0; zero from -126 down. Degree 7 in the fraction: 1e-8 relative before rounding.
static inline Vector exp2_of(Vector x) {
  const float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const Vector shifted = x + MAGIC;
  const Vector f = x - (shifted - MAGIC);
  Vector y = f * 1.52527338e-5f + 1.54035304e-4f;
  y = y * f + 1.33335581e-3f;
  y = y * f + 9.61812911e-3f;
  y = y * f + 5.55041087e-2f;
  y = y * f + 2.40226507e-1f;
  y = y * f + 6.93147181e-1f;
  y = y * f + 1.0f;
  const Vector power = (Vector)((Integers)y + ((Integers)shifted << 23));
  return x < -126.0f ? Vector{} : power;
}

// ---------------------------------------------------------------------------------------------
// Transposing LANES x LANES numbers: Eklundh's butterflies, one for each power of two

template <int STEP, int... L>
static inline void exchange(Vector& a, Vector& b, std::integer_sequence<int, L...>) {
#if defined(__clang__)
  const Vector first = __builtin_shufflevector(a, b, ((L & STEP) ? LANES + L - STEP : L)...);
  const Vector second = __builtin_shufflevector(a, b, ((L & STEP) ? LANES + L : L + STEP)...);
#else
  const Vector first = __builtin_shuffle(a, b, Integers{((L & STEP) ? LANES + L - STEP : L)...});
  const Vector second = __builtin_shuffle(a, b, Integers{((L & STEP) ? LANES + L : L + STEP)...});
#endif
  a = first;
  b = second;
}

template <int STEP>
static inline void transpose(Vector (&x)[LANES]) {
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i)
    if (!(i & STEP)) exchange<STEP>(x[i], x[i | STEP], std::make_integer_sequence<int, LANES>());
  if constexpr (STEP > 1) transpose<STEP / 2>(x);
}

// to[column, row] = from[row, column] for at most LANES rows and columns; what is missing counts as zero,
// and with `pad` is written too as far as rows go.
static void transpose_tile(const float* from, int64_t from_stride, int rows, int columns, float* to,
                           int64_t to_stride, bool pad) {
  Vector x[LANES];
  if (columns == LANES) {
    for (int i = 0; i < LANES; ++i) x[i] = i < rows ? load(from + i * from_stride) : Vector{};
  } else {
    for (int i = 0; i < LANES; ++i) {
      float row[LANES] = {};
      if (i < rows) std::memcpy(row, from + i * from_stride, columns * sizeof(float));
      x[i] = load(row);
    }
  }
  transpose<LANES / 2>(x);
  for (int j = 0; j < columns; ++j) {
    if (pad || rows == LANES) {
      store(to + j * to_stride, x[j]);
    } else {
      float row[LANES];
      store(row, x[j]);
      std::memcpy(to + j * to_stride, row, rows * sizeof(float));
    }
  }
}

// ---------------------------------------------------------------------------------------------
// c[r, :] (+)= sum_d a[r, d] * b[d, :] over V vectors of a panel

// Left operands in float32, one for each step.
struct Singles {
  const float* a;
  int64_t row, depth;

  Singles from(int64_t r) const { return {a + r * row, row, depth}; }
  Vector at(int r, int64_t d) const { return all(a[r * row + d * depth]); }
  static Vector added(Vector sum, Vector x, Vector y) { return sum + x * y; }
};

#ifdef __AVX512BF16__
// Left operands in bfloat16, two neighbours for each step; strides in bytes.
struct Pairs {
  const char* a;
  int64_t row, depth;

  Pairs from(int64_t r) const { return {a + r * row, row, depth}; }
  Vector at(int r, int64_t d) const {
    int32_t pair;
    std::memcpy(&pair, a + r * row + d * depth, sizeof(pair));
    return (Vector)(Integers{} + pair);
  }
  static Vector added(Vector sum, Vector x, Vector y) {
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
  }
};
#endif

template <int R, int V, class Left>
static inline void tile(const Left& a, const float* b, float* c, int64_t depth, bool add) {
  Vector sums[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sums[r][v] = add ? load(c + r * WIDTH + v * LANES) : Vector{};
  for (int64_t d = 0; d < depth; ++d) {
    Vector columns[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) columns[v] = load(b + d * WIDTH + v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vector row = a.at(r, d);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[r][v] = Left::added(sums[r][v], row, columns[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(c + r * WIDTH + v * LANES, sums[r][v]);
}

template <int V, class Left>
static void product(Left a, const float* b, float* c, int64_t rows, int64_t depth, bool add) {
  int64_t r = 0;
  for (; r + ROWS <= rows; r += ROWS) tile<ROWS, V>(a.from(r), b, c + r * WIDTH, depth, add);
  a = a.from(r);
  c += r * WIDTH;
  switch (rows - r) {
    case 1: return tile<1, V>(a, b, c, depth, add);
    case 2: return tile<2, V>(a, b, c, depth, add);
    case 3: return tile<3, V>(a, b, c, depth, add);
    case 4: return tile<4, V>(a, b, c, depth, add);
    case 5: return tile<5, V>(a, b, c, depth, add);
  }
}

// ---------------------------------------------------------------------------------------------
// bfloat16: its products in pairs where the CPU has them, else widened

typedef uint16_t Half;  // the upper half of a float32
typedef Half Halves __attribute__((vector_size(LANES * 2)));

static inline Integers widened(const Half* from) {
  Halves x;
  std::memcpy(&x, from, sizeof(x));
  return __builtin_convertvector(x, Integers);
}

// Rounded to the nearest bfloat16, ties to even, in the upper half of each lane. NaN stays NaN.
static inline Integers rounded(Vector x) {
  const Integers bits = (Integers)x;
  const Integers near = bits + 0x7fff + ((bits >> 16) & 1);
  return (x == x ? near : bits | 0x400000) & (Integers{} + (int32_t)0xffff0000);
}

[[maybe_unused]] static void widen(const Half* from, int64_t stride, int64_t rows, int64_t columns, float* to) {
  for (int64_t r = 0; r < rows; ++r, from += stride, to += columns) {
    int64_t c = 0;
    for (; c + LANES <= columns; c += LANES) store(to + c, (Vector)(widened(from + c) << 16));
    for (; c < columns; ++c) {
      const uint32_t bits = (uint32_t)from[c] << 16;
      std::memcpy(to + c, &bits, sizeof(bits));
    }
  }
}

// to[l / 2, c] = (from[l, c], from[l + 1, c]); an odd last row is paired with zeros.
[[maybe_unused]] static void pair_rows(const Half* from, int64_t stride, int64_t rows, int64_t columns, float* to) {
  for (int64_t l = 0; l < rows; l += 2, from += 2 * stride, to += columns) {
    const bool both = l + 1 < rows;
    int64_t c = 0;
    for (; c + LANES <= columns; c += LANES)
      store(to + c, (Vector)(widened(from + c) | (both ? widened(from + stride + c) << 16 : Integers{})));
    for (; c < columns; ++c) {
      const uint32_t bits = from[c] | (both ? (uint32_t)from[stride + c] << 16 : 0);
      std::memcpy(to + c, &bits, sizeof(bits));
    }
  }
}

// ---------------------------------------------------------------------------------------------
// One panel of queries

enum MaskKind : int64_t { NO_MASK, FLAGS, ADDED };

struct Strides {
  int64_t batch, head, row;
};

// In the order of the integers that the caller hands over.
struct Problem {
  int64_t batch, heads, key_heads, queries, keys, features, value_features, causal, mask_kind;
  Strides q, k, v, out;
  int64_t mask_batch, mask_head, mask_row, mask_key;
};

struct Memory {
  float *packed, *scores, *sums, *wide;
};

static inline float bias_of(const Problem& p, const void* mask, int64_t offset) {
  if (p.mask_kind == FLAGS) return static_cast<const uint8_t*>(mask)[offset] ? 0.0f : LOWEST;
  const float bias = static_cast<const float*>(mask)[offset], scaled = bias * LOG2_E;
  // Models write the lowest finite number for "masked": scaled it must stay finite.
  return std::isinf(scaled) && !std::isinf(bias) ? std::copysign(FLT_MAX, bias) : scaled;
}

// Add the bias of up to LANES queries from `first` on, and as many keys, to scores[key, query].
static void add_bias(const Problem& p, const void* mask, int64_t offset, int first, int width, int keys,
                     float* scores) {
  if (p.mask_kind == FLAGS && p.mask_key == 1 && keys == LANES) {
    typedef uint8_t Bytes __attribute__((vector_size(LANES)));
    Vector x[LANES];
    for (int i = 0; i < LANES; ++i) {
      Bytes flags;
      const int64_t row = offset + std::min(first + i, width - 1) * p.mask_row;
      std::memcpy(&flags, static_cast<const uint8_t*>(mask) + row, LANES);
      x[i] = __builtin_convertvector(flags, Integers) != 0 ? Vector{} : all(LOWEST);
    }
    transpose<LANES / 2>(x);
    for (int l = 0; l < LANES; ++l) store(scores + l * WIDTH, load(scores + l * WIDTH) + x[l]);
    return;
  }
  for (int i = 0; i < LANES; ++i) {
    const int64_t row = offset + std::min(first + i, width - 1) * p.mask_row;
    for (int l = 0; l < keys; ++l) scores[l * WIDTH + i] += bias_of(p, mask, row + l * p.mask_key);
  }
}

// Whether the panel's queries have one and the same mask over `count` keys: that of a padded batch, also where
// it was written out for each query.
static bool same_for_all(const Problem& p, const void* mask, int64_t offset, int width, int64_t count) {
  if (p.mask_row == 0) return true;
  if (p.mask_key != 1) return false;
  const int64_t bytes = p.mask_kind == FLAGS ? 1 : sizeof(float);
  const char* first = static_cast<const char*>(mask) + offset * bytes;
  for (int i = 1; i < width; ++i)
    if (std::memcmp(first, first + i * p.mask_row * bytes, count * bytes)) return false;
  return true;
}

// Add the mask and causality to the scores [count, WIDTH] of the keys from `first` on.
template <int V>
static void apply_mask(const Problem& p, const void* mask, int64_t mask_offset, int64_t first_query, int width,
                       int64_t first, int64_t count, const Memory& m) {
  const int64_t offset = mask_offset + first_query * p.mask_row + first * p.mask_key;
  if (p.mask_kind != NO_MASK && same_for_all(p, mask, offset, width, count)) {
    for (int64_t l = 0; l < count; ++l) {
      const float bias = bias_of(p, mask, offset + l * p.mask_key);
      if (bias == 0.0f) continue;
      for (int v = 0; v < V; ++v) {
        float* at = m.scores + l * WIDTH + v * LANES;
        store(at, load(at) + bias);
      }
    }
  } else if (p.mask_kind != NO_MASK) {
    for (int i = 0; i < V * LANES; i += LANES)
      for (int64_t l = 0; l < count; l += LANES)
        add_bias(p, mask, offset + l * p.mask_key, i, width, (int)std::min<int64_t>(count - l, LANES),
                 m.scores + l * WIDTH + i);
  }
  if (p.causal) {
    for (int64_t l = std::max<int64_t>(first_query + 1 - first, 0); l < count; ++l) {
      float* row = m.scores + l * WIDTH;
      std::fill(row, row + std::min<int64_t>(first + l - first_query, V * LANES), LOWEST);
    }
  }
}

#ifdef __AVX512BF16__
constexpr bool PAIRED = true;
#else
constexpr bool PAIRED = false;
#endif

// Queries [width, features] as [features, WIDTH], or as [features / 2, WIDTH] pairs.
template <int V, class T>
static void pack_queries(const Problem& p, const T* q, int width, const Memory& m) {
  constexpr bool half = sizeof(T) == 2;
  const float* from = reinterpret_cast<const float*>(q);
  int64_t stride = p.q.row, features = p.features;
  if constexpr (half && PAIRED) {
    features /= 2;
    // Pairs move as they are, as if they were float32. Rows may begin between two of them.
    for (int i = 0; i < width; ++i) std::memcpy(m.wide + i * features, q + i * stride, features * sizeof(float));
  } else if constexpr (half) {
    widen(q, stride, width, features, m.wide);
  }
  if constexpr (half) from = m.wide, stride = features;
  for (int i = 0; i < V * LANES; i += LANES)
    for (int64_t d = 0; d < features; d += LANES)
      transpose_tile(from + i * stride + d, stride, std::min(width - i, LANES),
                     (int)std::min<int64_t>(features - d, LANES), m.packed + d * WIDTH + i, WIDTH, true);
}

template <int V, class T>
static void attend(const Problem& p, const T* q, const T* k, const T* v, const void* mask, int64_t mask_offset,
                   T* out, int64_t first_query, int width, float scale, const Memory& m) {
  constexpr bool half = sizeof(T) == 2;
  pack_queries<V>(p, q + first_query * p.q.row, width, m);
  Vector largest[V], total[V];
  for (int i = 0; i < V; ++i) largest[i] = all(LOWEST), total[i] = Vector{};
  const int64_t seen = p.causal ? std::min(p.keys, first_query + width) : p.keys;
  for (int64_t first = 0; first < seen; first += KEYS) {
    const int64_t count = std::min(seen - first, KEYS);
    const T* keys = k + first * p.k.row;
    if constexpr (!half) {
      product<V>(Singles{keys, p.k.row, 1}, m.packed, m.scores, count, p.features, false);
#ifdef __AVX512BF16__
    } else {
      const char* bytes = reinterpret_cast<const char*>(keys);
      product<V>(Pairs{bytes, p.k.row * 2, 4}, m.packed, m.scores, count, p.features / 2, false);
#else
    } else {
      widen(keys, p.k.row, count, p.features, m.wide);
      product<V>(Singles{m.wide, p.features, 1}, m.packed, m.scores, count, p.features, false);
#endif
    }
    Vector before[V], shift[V];
    for (int i = 0; i < V; ++i) before[i] = largest[i];
    const bool masked = p.mask_kind != NO_MASK || (p.causal && first + count > first_query + 1);
    for (int64_t l = 0; l < count; ++l)
      for (int i = 0; i < V; ++i) {
        float* at = m.scores + l * WIDTH + i * LANES;
        const Vector x = load(at) * (scale * LOG2_E);
        if (!masked) largest[i] = larger(largest[i], x);
        store(at, x);
      }
    if (masked) {
      apply_mask<V>(p, mask, mask_offset, first_query, width, first, count, m);
      for (int64_t l = 0; l < count; ++l)
        for (int i = 0; i < V; ++i) largest[i] = larger(largest[i], load(m.scores + l * WIDTH + i * LANES));
    }
    for (int i = 0; i < V; ++i) {
      shift[i] = largest[i] == LOWEST ? Vector{} : largest[i];  // no key so far: all stays zero
      const Vector kept = exp2_of(before[i] - shift[i]);
      total[i] *= kept;
      if (first)
        for (int64_t d = 0; d < p.value_features; ++d) {
          float* at = m.sums + d * WIDTH + i * LANES;
          store(at, load(at) * kept);
        }
    }
    const T* values = v + first * p.v.row;
    if constexpr (half && PAIRED) {
      for (int64_t l = 0; l < count; l += 2)
        for (int i = 0; i < V; ++i) {
          const float* at = m.scores + l * WIDTH + i * LANES;
          const Vector one = exp2_of(load(at) - shift[i]);
          const Vector other = l + 1 < count ? exp2_of(load(at + WIDTH) - shift[i]) : Vector{};
          total[i] += one + other;
          const Integers low = (rounded(one) >> 16) & 0xffff;
          store(m.scores + l / 2 * WIDTH + i * LANES, (Vector)(low | rounded(other)));
        }
      pair_rows(values, p.v.row, count, p.value_features, m.wide);
#ifdef __AVX512BF16__
      const Pairs left{reinterpret_cast<const char*>(m.wide), 4, p.value_features * 4};
      product<V>(left, m.scores, m.sums, p.value_features, (count + 1) / 2, first > 0);
#endif
    } else {
      for (int64_t l = 0; l < count; ++l)
        for (int i = 0; i < V; ++i) {
          float* at = m.scores + l * WIDTH + i * LANES;
          const Vector weight = exp2_of(load(at) - shift[i]);
          total[i] += weight;
          store(at, weight);
        }
      Singles left{reinterpret_cast<const float*>(values), 1, p.v.row};
      if constexpr (half) {
        widen(values, p.v.row, count, p.value_features, m.wide);
        left = {m.wide, 1, p.value_features};
      }
      product<V>(left, m.scores, m.sums, p.value_features, count, first > 0);
    }
  }
  for (int i = 0; i < V; ++i) {
    const Vector factor = total[i] == 0.0f ? Vector{} : 1.0f / total[i];
    for (int64_t d = 0; d < p.value_features; ++d) {
      float* at = m.sums + d * WIDTH + i * LANES;
      store(at, load(at) * factor);
    }
  }
  for (int i = 0; i < width; i += LANES)
    for (int64_t d = 0; d < p.value_features; d += LANES) {
      const int rows = (int)std::min<int64_t>(p.value_features - d, LANES), columns = std::min(width - i, LANES);
      T* to = out + (first_query + i) * p.out.row + d;
      if constexpr (!half) {
        transpose_tile(m.sums + d * WIDTH + i, WIDTH, rows, columns, to, p.out.row, false);
      } else {
        float square[LANES * LANES];
        transpose_tile(m.sums + d * WIDTH + i, WIDTH, rows, columns, square, LANES, true);
        for (int r = 0; r < columns; ++r, to += p.out.row) {
          const Halves x = __builtin_convertvector((rounded(load(square + r * LANES)) >> 16) & 0xffff, Halves);
          std::memcpy(to, &x, rows * sizeof(T));
        }
      }
    }
}

template <class T>
static void attend_panel(const Problem& p, const T* q, const T* k, const T* v, const void* mask,
                         int64_t mask_offset, T* out, int64_t first_query, float scale, const Memory& m) {
  const int width = (int)std::min<int64_t>(p.queries - first_query, WIDTH);
#define KPT_ATTEND(V) attend<V>(p, q, k, v, mask, mask_offset, out, first_query, width, scale, m)
  switch ((width + LANES - 1) / LANES) {
    case 1: KPT_ATTEND(1); break;
    case 2: KPT_ATTEND(2); break;
    case 3: KPT_ATTEND(std::min(3, VECTORS)); break;
    default: KPT_ATTEND(VECTORS);
  }
#undef KPT_ATTEND
}

static Memory memory_for(const Problem& p, bool half) {
  static thread_local std::unique_ptr<char, void (*)(void*)> held(nullptr, std::free);
  static thread_local size_t size = 0;
  const size_t features = (p.features + LANES - 1) / LANES * LANES;
  const size_t value_features = (p.value_features + LANES - 1) / LANES * LANES;
  const size_t wide = half ? KEYS * std::max(features, value_features) : 0;
  const size_t needed = ((features + value_features + KEYS) * WIDTH + wide) * sizeof(float);
  if (needed > size) {
    held.reset(static_cast<char*>(std::aligned_alloc(64, needed)));
    size = held ? needed : 0;
    if (!held) std::abort();
    std::memset(held.get(), 0, needed);
  }
  float* base = reinterpret_cast<float*>(held.get());
  float* scores = base + features * WIDTH;
  float* sums = scores + KEYS * WIDTH;
  return {base, scores, sums, sums + value_features * WIDTH};
}

template <class T>
static void attend_all(const T* q, const T* k, const T* v, const void* mask, T* out, const int64_t* integers,
                       double scale, int threads) {
  Problem p;
  static_assert(sizeof(Problem) == 25 * sizeof(int64_t), "the caller hands over 25 integers");
  std::memcpy(&p, integers, sizeof(p));
  const int64_t panels = (p.queries + WIDTH - 1) / WIDTH, groups = p.heads / p.key_heads;
  const int64_t tasks = p.batch * p.heads * panels;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && tasks > 1)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t panel = task % panels, head = task / panels % p.heads, batch = task / panels / p.heads;
    attend_panel(p, q + batch * p.q.batch + head * p.q.head, k + batch * p.k.batch + head / groups * p.k.head,
                 v + batch * p.v.batch + head / groups * p.v.head, mask,
                 batch * p.mask_batch + head * p.mask_head, out + batch * p.out.batch + head * p.out.head,
                 panel * WIDTH, (float)scale, memory_for(p, sizeof(T) == 2));
  }
}

extern "C" void kpt_attention_float32(const float* q, const float* k, const float* v, const void* mask, float* out,
                                      const int64_t* integers, double scale, int threads) {
  attend_all(q, k, v, mask, out, integers, scale, threads);
}

extern "C" void kpt_attention_bfloat16(const Half* q, const Half* k, const Half* v, const void* mask, Half* out,
                                       const int64_t* integers, double scale, int threads) {
  attend_all(q, k, v, mask, out, integers, scale, threads);
}
