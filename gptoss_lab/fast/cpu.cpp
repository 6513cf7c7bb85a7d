// Two things that PyTorch's operations are slow at. Weights as they are stored, times float32: MXFP4 blocks and bfloat16
// rows are widened in registers. And few rows in float32, where calling an operation costs more than its arithmetic.
// Built by cpu.py at first use. Reference: gptoss_lab/mxfp4.py and model.py, against which every function is tested.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

// Twice the value of each code, and half of each scale: finite for all 256 scales, as in mxfp4.py.
alignas(64) static const float TWICE[16] = {0, 1, 2, 3, 4, 6, 8, 12, -0.f, -1, -2, -3, -4, -6, -8, -12};

struct Halves {
    float of[256];
    Halves() {
        for (int s = 0; s < 256; s++) {
            uint32_t bits = s >= 2 ? uint32_t(s - 1) << 23 : 1u << (21 + s);  // 2^(s-128); below 2^-126 subnormal
            std::memcpy(&of[s], &bits, 4);
        }
    }
};
static const Halves HALF;

static inline float widen(uint16_t x) {
    uint32_t bits = uint32_t(x) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

// One row of `groups` blocks, times x: its even numbers (16 a block), and its odd ones.
static inline float row_dot(const uint8_t* block, const uint8_t* scale, const float* even, const float* odd, int64_t groups) {
#if defined(__AVX512F__)
    const __m512 table = _mm512_load_ps(TWICE);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; g++) {
        __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(block + g * 16)));
        __m512 part = _mm512_mul_ps(_mm512_permutexvar_ps(codes, table), _mm512_loadu_ps(even + g * 16));
        __m512 high = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), table);
        part = _mm512_fmadd_ps(high, _mm512_loadu_ps(odd + g * 16), part);
        sum = _mm512_fmadd_ps(part, _mm512_set1_ps(HALF.of[scale[g]]), sum);
    }
    return _mm512_reduce_add_ps(sum);
#elif defined(__AVX2__)
    const __m256 table = _mm256_load_ps(TWICE);  // the permutation looks at three bits: the sign is put on after it
    const __m256i sign = _mm256_set1_epi32(8);
    __m256 sum = _mm256_setzero_ps();
    for (int64_t g = 0; g < groups; g++) {
        __m256 part = _mm256_setzero_ps();
        for (int h = 0; h < 16; h += 8) {
            __m256i low = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(block + g * 16 + h)));
            __m256i high = _mm256_srli_epi32(low, 4);
            __m256 a = _mm256_permutevar8x32_ps(table, low), b = _mm256_permutevar8x32_ps(table, high);
            a = _mm256_xor_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_and_si256(low, sign), 28)));
            b = _mm256_xor_ps(b, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_and_si256(high, sign), 28)));
            part = _mm256_add_ps(part, _mm256_mul_ps(a, _mm256_loadu_ps(even + g * 16 + h)));
            part = _mm256_add_ps(part, _mm256_mul_ps(b, _mm256_loadu_ps(odd + g * 16 + h)));
        }
        sum = _mm256_add_ps(sum, _mm256_mul_ps(part, _mm256_set1_ps(HALF.of[scale[g]])));
    }
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, sum);
    return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
#else
    float sum = 0;
    for (int64_t g = 0; g < groups; g++) {
        float part = 0;
        for (int i = 0; i < 16; i++) {
            uint8_t byte = block[g * 16 + i];
            part += TWICE[byte & 15] * even[g * 16 + i] + TWICE[byte >> 4] * odd[g * 16 + i];
        }
        sum += part * HALF.of[scale[g]];
    }
    return sum;
#endif
}

extern "C" {

// n pairs of an expert and a vector: y[i] = W[expert[i]] x[from[i]].   x [* 2 groups*16]: evens, then odds; y [n rows]
void mxfp4_multiply(const uint8_t* blocks, const uint8_t* scales, const int64_t* expert, const int64_t* from,
                    const float* x, float* y, int64_t n, int64_t rows, int64_t groups, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
    for (int64_t i = 0; i < n; i++)
        for (int64_t r = 0; r < rows; r++) {
            const int64_t at = (expert[i] * rows + r) * groups;
            const float* mine = x + from[i] * groups * 32;
            y[i * rows + r] = row_dot(blocks + at * 16, scales + at, mine, mine + groups * 16, groups);
        }
}

// The numbers themselves, float32.   blocks [n 16], scales [n] -> out [n 32]
void mxfp4_unpack(const uint8_t* blocks, const uint8_t* scales, float* out, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t g = 0; g < n; g++) {
        const float half = HALF.of[scales[g]];
        float* to = out + g * 32;
#if defined(__AVX512F__)
        const __m512 table = _mm512_mul_ps(_mm512_load_ps(TWICE), _mm512_set1_ps(half));
        const __m128i bytes = _mm_loadu_si128((const __m128i*)(blocks + g * 16));
        const __m128i low = _mm_and_si128(bytes, _mm_set1_epi8(15)), high = _mm_and_si128(_mm_srli_epi16(bytes, 4), _mm_set1_epi8(15));
        _mm512_storeu_ps(to, _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(low, high)), table));
        _mm512_storeu_ps(to + 16, _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(_mm_unpackhi_epi8(low, high)), table));
#else
        for (int i = 0; i < 16; i++) {
            to[2 * i] = TWICE[blocks[g * 16 + i] & 15] * half;
            to[2 * i + 1] = TWICE[blocks[g * 16 + i] >> 4] * half;
        }
#endif
    }
}

// The same in bfloat16, which holds every number of MXFP4.
void mxfp4_unpack_bf16(const uint8_t* blocks, const uint8_t* scales, uint16_t* out, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t g = 0; g < n; g++) {
        const float half = HALF.of[scales[g]];
        uint16_t* to = out + g * 32;
#if defined(__AVX512F__)
        const __m512i table = _mm512_srli_epi32(_mm512_castps_si512(_mm512_mul_ps(_mm512_load_ps(TWICE), _mm512_set1_ps(half))), 16);
        const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(blocks + g * 16)));
        const __m512i low = _mm512_permutexvar_epi32(bytes, table), high = _mm512_permutexvar_epi32(_mm512_srli_epi32(bytes, 4), table);
        _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
#else
        for (int i = 0; i < 16; i++) {
            const float two[2] = {TWICE[blocks[g * 16 + i] & 15] * half, TWICE[blocks[g * 16 + i] >> 4] * half};
            uint32_t bits[2];
            std::memcpy(bits, two, 8);
            to[2 * i] = uint16_t(bits[0] >> 16);
            to[2 * i + 1] = uint16_t(bits[1] >> 16);
        }
#endif
    }
}

// Does the processor multiply bfloat16? Compiled with -march=native, this is known here.
int bf16_is_quick() {
#if defined(__AVX512BF16__) || defined(__AMX_BF16__)
    return 1;
#else
    return 0;
#endif
}

// y[m] = W x[m].   w [rows cols] bfloat16, x [n cols], y [n rows]
void bf16_multiply(const uint16_t* w, const float* x, float* y, int64_t n, int64_t rows, int64_t cols, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const uint16_t* row = w + r * cols;
        for (int64_t m = 0; m < n; m++) {
            const float* v = x + m * cols;
            int64_t c = 0;
            float sum = 0;
#if defined(__AVX512F__)
            __m512 a = _mm512_setzero_ps(), b = a;
            for (; c + 32 <= cols; c += 32) {
                __m512i bits = _mm512_loadu_si512(row + c);
                __m512i low = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(bits)), 16);
                __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(bits, 1)), 16);
                a = _mm512_fmadd_ps(_mm512_castsi512_ps(low), _mm512_loadu_ps(v + c), a);
                b = _mm512_fmadd_ps(_mm512_castsi512_ps(high), _mm512_loadu_ps(v + c + 16), b);
            }
            sum = _mm512_reduce_add_ps(_mm512_add_ps(a, b));
#elif defined(__AVX2__)
            __m256 a = _mm256_setzero_ps();
            for (; c + 8 <= cols; c += 8) {
                __m256i bits = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(row + c))), 16);
                a = _mm256_add_ps(a, _mm256_mul_ps(_mm256_castsi256_ps(bits), _mm256_loadu_ps(v + c)));
            }
            alignas(32) float lanes[8];
            _mm256_store_ps(lanes, a);
            for (float lane : lanes) sum += lane;
#endif
            for (; c < cols; c++) sum += widen(row[c]) * v[c];
            y[m * rows + r] = sum;
        }
    }
}
}

// ------------------------------------------------------------------------------------------ few rows in float32
// Sizes as in model.py: b s t d H K h E k f. Vectors are the compiler's own, as wide as the processor's.

#if defined(__AVX512F__)
constexpr int LANES = 16, TILE = 4;
#elif defined(__AVX__)
constexpr int LANES = 8, TILE = 2;
#else
constexpr int LANES = 4, TILE = 2;
#endif
typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

static inline Vec load(const float* from) {
    Vec x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

static inline void store(float* to, Vec x) { std::memcpy(to, &x, sizeof x); }

// The first n < LANES numbers, zeros after them.
static inline Vec load(const float* from, int64_t n) {
    Vec x = {};
    std::memcpy(&x, from, 4 * n);
    return x;
}

// Each of four vectors added up.
static inline void sums(const Vec* x, float* to) {
    typedef float Four __attribute__((vector_size(16)));
    Four part[4];
    for (int r = 0; r < 4; r++) {
        Four quarter[LANES / 4];
        std::memcpy(quarter, &x[r], sizeof x[r]);
        for (int width = LANES / 8; width; width /= 2)
            for (int i = 0; i < width; i++) quarter[i] += quarter[i + width];
        part[r] = quarter[0];
    }
    for (int r = 0; r < 4; r++) to[r] = (part[r][0] + part[r][1]) + (part[r][2] + part[r][3]);
}

static inline float sum(Vec x) {
    float lanes[LANES], total = 0;
    store(lanes, x);
    for (float lane : lanes) total += lane;
    return total;
}

static inline float dot(const float* x, const float* y, int64_t n) {
    Vec total = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) total += load(x + i) * load(y + i);
    if (i < n) total += load(x + i, n - i) * load(y + i, n - i);
    return sum(total);
}

// e^x within 2 units of the last place (Cephes, expf.c); 0 below -87, where float32 becomes subnormal.
static inline Vec exp(Vec x) {
    const Vec low = Vec{} - 87.f, high = Vec{} + 88.f;
    const Vec inside = x < low ? low : x > high ? high : x;
    const Vec n = (inside * 1.44269504f + 12582912.f) - 12582912.f;  // rounded: 1.5 * 2^23 leaves no bit for a fraction
    const Vec r = inside - n * 0.693359375f + n * 2.12194440e-4f;
    Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
    const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
    Vec scale;
    std::memcpy(&scale, &power, sizeof scale);
    return x < low ? Vec{} : p * scale;  // what is not a number stays so
}

static inline float exp(float x) { return exp(Vec{} + x)[0]; }

// M rows of x times four rows of w, from o on. Meanwhile `step` rows of what comes later are brought nearer, from `ahead` on:
// the products read four rows at once, which the processor foresees less well than one after the other.
template <int M>
static inline void tile(const float* ahead, int step, const float* const* x, const float* w, int64_t stride, const float* bias,
                        float* const* y, int64_t o, int64_t in, int64_t out) {
    const float* row[4];
    for (int r = 0; r < 4; r++) row[r] = w + (o + r < out ? o + r : out - 1) * stride;
    Vec total[M][4] = {}, part[4];
    int64_t i = 0;
    for (; i + LANES <= in; i += LANES) {
        for (int r = 0; r < 4; r++) part[r] = load(row[r] + i);
        for (int r = 0; r < step; r++, ahead += LANES) __builtin_prefetch(ahead, 0, 2);
        for (int m = 0; m < M; m++) {
            const Vec mine = load(x[m] + i);
            for (int r = 0; r < 4; r++) total[m][r] += mine * part[r];
        }
    }
    for (int m = 0; m < M; m++) {
        float of[4];
        for (int r = 0; r < 4 && i < in; r++) total[m][r] += load(x[m] + i, in - i) * load(row[r] + i, in - i);
        sums(total[m], of);
        for (int64_t r = 0; r < 4 && o + r < out; r++) y[m][o + r] = of[r] + (bias ? bias[o + r] : 0.f);
    }
}

// x times one row of w: in the order of the memory, which the processor foresees.
static inline Vec stream(const float* x, const float* w, int64_t in) {
    Vec total[4] = {};
    int64_t i = 0;
    for (; i + 4 * LANES <= in; i += 4 * LANES)
        for (int j = 0; j < 4; j++) total[j] += load(x + i + j * LANES) * load(w + i + j * LANES);
    for (; i + LANES <= in; i += LANES) total[0] += load(x + i) * load(w + i);
    if (i < in) total[1] += load(x + i, in - i) * load(w + i, in - i);
    return (total[0] + total[1]) + (total[2] + total[3]);
}

// Rows i of group g: y[i] = w[g] x[i / share] + bias[g].   x [n / share in], w [groups out in], bias [groups out] or null -> y [n out]
static void product(const std::vector<std::vector<int64_t>>& groups, const float* x, const float* w, const float* bias,
                    float* y, int64_t in, int64_t out, int64_t share, int64_t threads) {
    std::vector<int64_t> used;
    for (size_t g = 0; g < groups.size(); g++)
        if (!groups[g].empty()) used.push_back(g);
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2) if (threads > 1)
    for (size_t u = 0; u < used.size(); u++)
        for (int64_t o = 0; o < out; o += 4) {
            const int64_t g = used[u];
            const std::vector<int64_t>& rows = groups[g];
            const float *its = w + g * out * in, *add = bias ? bias + g * out : nullptr;
            if (rows.size() == 1) {
                const float* mine = x + rows[0] / share * in;
                Vec total[4] = {};
                for (int64_t r = 0; r < 4 && o + r < out; r++) total[r] = stream(mine, its + (o + r) * in, in);
                float of[4];
                sums(total, of);
                for (int64_t r = 0; r < 4 && o + r < out; r++) y[rows[0] * out + o + r] = of[r] + (add ? add[o + r] : 0.f);
                continue;
            }
            const int turns = (rows.size() + TILE - 1) / TILE;
            for (size_t at = 0; at < rows.size();) {
                const float* from[4];
                float* to[4];
                const int part = at / TILE, step = part < 4 ? (4 + turns - 1) / turns : 0;
                const float* ahead = its + (o + 8 + part * step) * in;
                const int m = rows.size() - at < TILE ? rows.size() - at : TILE;
                for (int i = 0; i < m; i++, at++) from[i] = x + rows[at] / share * in, to[i] = y + rows[at] * out;
                if (m == 1) tile<1>(ahead, step, from, its, in, add, to, o, in, out);
                else if (m == 2) tile<2>(ahead, step, from, its, in, add, to, o, in, out);
                else if (m == 3) tile<3>(ahead, step, from, its, in, add, to, o, in, out);
                else tile<4>(ahead, step, from, its, in, add, to, o, in, out);
            }
        }
}

// M query heads that share a key head, over keys 0 to t - 1.   q and z [M h], sinks and mass one a head `s` apart; scores and
// pattern, where they are handed out, rows of `apart` numbers, one a head
template <int M>
static void attend_heads(const float* q, const float* k, const float* v, const float* sinks, const uint8_t* seen, float* z,
                         float* mass, float* scores, float* pattern, int64_t apart, int64_t s, int64_t t, int64_t h, int64_t k_t,
                         int64_t v_t, std::vector<float>& room) {
    const int64_t wide = (t + LANES - 1) / LANES * LANES;
    room.resize(M * (wide + h));
    const float* query[M];
    float* p[M];
    for (int m = 0; m < M; m++) {
        p[m] = &room[m * wide], query[m] = &room[M * wide + m * h];
        for (int64_t i = 0; i < h; i++) room[M * wide + m * h + i] = q[m * h + i] / std::sqrt(float(h));
    }
    for (int64_t c = 0; c < t; c += 4) tile<M>(nullptr, 0, query, k, k_t, nullptr, p, c, h, t);
    for (int m = 0; m < M; m++) {
        for (int64_t c = 0; c < wide; c++) p[m][c] = c < t && seen[c] ? p[m][c] : -INFINITY;
        const float sink = sinks[m * s];
        if (scores) std::memcpy(scores + m * apart, p[m], 4 * t);
        float largest = sink;
        for (int64_t c = 0; c < t; c++) largest = p[m][c] > largest ? p[m][c] : largest;
        Vec part = {};
        for (int64_t c = 0; c < wide; c += LANES) {
            const Vec e = exp(load(p[m] + c) - largest);
            store(p[m] + c, e);
            part += e;
        }
        const float total = sum(part) + exp(sink - largest);
        for (int64_t c = 0; c < t; c++) p[m][c] /= total;
        if (pattern) std::memcpy(pattern + m * apart, p[m], 4 * t);
        mass[m * s] = exp(sink - largest) / total;
    }
    for (int64_t i = 0; i < h; i += LANES) {
        const int64_t n = h - i < LANES ? h - i : LANES;
        Vec total[M] = {};
        for (int64_t c = 0; c < t; c++) {
            const Vec mine = n == LANES ? load(v + c * v_t + i) : load(v + c * v_t + i, n);
            for (int m = 0; m < M; m++) total[m] += p[m][c] * mine;
        }
        for (int m = 0; m < M; m++) std::memcpy(z + m * h + i, &total[m], 4 * n);
    }
}

extern "C" {

// y = x w' + bias.   x [n in], w [out in], bias [out] or null -> y [n out]
void linear(const float* x, const float* w, const float* bias, float* y, int64_t n, int64_t in, int64_t out, int64_t threads) {
    std::vector<std::vector<int64_t>> rows(1);
    for (int64_t i = 0; i < n; i++) rows[0].push_back(i);
    product(rows, x, w, bias, y, in, out, 1, threads);
}

// x / rms(x) * weight.   x [n d], weight [d] -> y [n d]; the rms [n] and x / rms [n d], or null
void norm(const float* x, const float* weight, float* y, float* rms, float* normalized, int64_t n, int64_t d, float eps, int64_t) {
    for (int64_t i = 0; i < n * d; i += d) {
        const float scale = std::sqrt(dot(x + i, x + i, d) / d + eps);
        if (rms) rms[i / d] = scale;
        for (int64_t c = i; c < i + d; c++) {
            const float part = x[c] / scale;
            if (normalized) normalized[c] = part;
            y[c] = part * weight[c - i];
        }
    }
}

// Pairs (x[i], x[i + h/2]) turned.   x [b s H h] with strides for b and s, cos and sin [s h/2] with one for b -> y [b s H h]
void rotate(const float* x, const float* cos, const float* sin, float* y, int64_t b, int64_t s, int64_t H, int64_t h,
            int64_t x_b, int64_t x_s, int64_t table_b, int64_t threads) {
    const int64_t half = h / 2;
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2) if (threads > 1)
    for (int64_t row = 0; row < b; row++)
        for (int64_t at = 0; at < s; at++) {
            const float *c = cos + row * table_b + at * half, *n = sin + row * table_b + at * half;
            for (int64_t head = 0; head < H; head++) {
                const float* from = x + row * x_b + at * x_s + head * h;
                float* to = y + ((row * s + at) * H + head) * h;
                for (int64_t i = 0; i < half; i++) {
                    to[i] = from[i] * c[i] - from[i + half] * n[i];
                    to[i + half] = from[i + half] * c[i] + from[i] * n[i];
                }
            }
        }
}

// Attention with a sink: a query reads keys at most `window` - 1 positions before its own. Padding has position -1 as a key, and
// reads itself.   q [b s H h], k and v [b t K h] with strides for b and t, sinks [b H s], positions query [b or 1, s] and
// key [b or 1, t] with strides for b -> z [b s H h], mass [b H s]; scores and pattern [b H s t], or null
void attend(const float* q, const float* k, const float* v, const float* sinks, const int64_t* query, const int64_t* key, float* z,
            float* mass, float* scores, float* pattern, int64_t b, int64_t s, int64_t t, int64_t H, int64_t K, int64_t h, int64_t k_b,
            int64_t k_t, int64_t v_b, int64_t v_t, int64_t query_b, int64_t key_b, int64_t window, int64_t threads) {
    const int64_t group = H / K;
#pragma omp parallel for num_threads(threads) schedule(static) collapse(3) if (threads > 1)
    for (int64_t row = 0; row < b; row++)
        for (int64_t kv = 0; kv < K; kv++)
            for (int64_t at = 0; at < s; at++) {
                const int64_t own = t - s + at, mine = query[row * query_b + at];
                const int64_t* its = key + row * key_b;
                std::vector<uint8_t> seen(t);
                for (int64_t c = 0; c < t; c++) seen[c] = its[c] >= 0 && its[c] <= mine && mine - its[c] < window;
                seen[own] = 1;
                int64_t first = 0, end = t;
                while (!seen[first]) first++;
                while (!seen[end - 1]) end--;
                std::vector<float> room;
                for (int64_t g = 0; g < group;) {
                    const int64_t heads = group - g >= 4 ? 4 : group - g >= 2 ? 2 : 1, head = kv * group + g;
                    const int64_t vector = ((row * s + at) * H + head) * h, number = (row * H + head) * s + at;
                    float *score = scores ? scores + number * t : nullptr, *probability = pattern ? pattern + number * t : nullptr;
                    for (int64_t m = 0; m < heads; m++) {  // what is not seen stays so
                        if (scores) std::fill_n(score + m * s * t, t, -INFINITY);
                        if (pattern) std::fill_n(probability + m * s * t, t, 0.f);
                    }
                    const auto some = heads == 4 ? attend_heads<4> : heads == 2 ? attend_heads<2> : attend_heads<1>;
                    some(q + vector, k + row * k_b + first * k_t + kv * h, v + row * v_b + first * v_t + kv * h, sinks + number,
                         seen.data() + first, z + vector, mass + number, scores ? score + first : nullptr,
                         pattern ? probability + first : nullptr, s * t, s, end - first, h, k_t, v_t, room);
                    g += heads;
                }
            }
}

// The k largest of E numbers, falling, of equal ones the first; what is not a number counts as the largest.   x [n E] -> place [n k]
void top(const float* x, int64_t* place, int64_t n, int64_t E, int64_t k, int64_t) {
    for (int64_t row = 0; row < n; row++, x += E, place += k)
        for (int64_t filled = 0, e = 0; e < E; e++) {
            int64_t at = filled;  // it goes before those that are smaller
            while (at > 0 && (x[e] > x[place[at - 1]] || (x[e] != x[e] && x[place[at - 1]] == x[place[at - 1]]))) at--;
            if (filled < k) filled++;
            for (int64_t i = filled - 1; i > at; i--) place[i] = place[i - 1];
            if (at < filled) place[at] = e;
        }
}

// gate * sigmoid(alpha gate) * (linear + 1), clamped.   x [n 2f]: gate 0, linear 0, gate 1, ... -> y [n f]. Of what else is not null,
// row place[i] (or i, without places) gets what row i came from, and what it is.
void swiglu(const float* x, float* y, const int64_t* place, float* gates, float* linears, float* clamped_gates,
            float* clamped_linears, float* out, int64_t n, int64_t f, float limit, float alpha, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t row = 0; row < n; row++)
        for (int64_t at = 0; at < f; at += LANES) {
            const int64_t m = f - at < LANES ? f - at : LANES, to = (place ? place[row] : row) * f + at;
            const float* pairs = x + (row * f + at) * 2;
            float two[2][LANES] = {};
            if (m == LANES) for (int i = 0; i < LANES; i++) two[0][i] = pairs[2 * i], two[1][i] = pairs[2 * i + 1];
            else for (int i = 0; i < m; i++) two[0][i] = pairs[2 * i], two[1][i] = pairs[2 * i + 1];
            const Vec gate = load(two[0]), linear = load(two[1]), low = gate > limit ? Vec{} + limit : gate;
            const Vec held = linear > limit ? Vec{} + limit : linear < -limit ? Vec{} - limit : linear;
            const Vec post = low / (1 + exp(-alpha * low)) * (held + 1);
            if (m == LANES) {
                store(y + row * f + at, post);
                if (gates) store(gates + to, gate);
                if (linears) store(linears + to, linear);
                if (clamped_gates) store(clamped_gates + to, low);
                if (clamped_linears) store(clamped_linears + to, held);
                if (out) store(out + to, post);
                continue;
            }
            std::memcpy(y + row * f + at, &post, 4 * m);
            if (gates) std::memcpy(gates + to, &gate, 4 * m);
            if (linears) std::memcpy(linears + to, &linear, 4 * m);
            if (clamped_gates) std::memcpy(clamped_gates + to, &low, 4 * m);
            if (clamped_linears) std::memcpy(clamped_linears + to, &held, 4 * m);
            if (out) std::memcpy(out + to, &post, 4 * m);
        }
}

// Expert outputs, slot place[i] of n k slots each: added to their tokens by their weights, and handed out.
// y [m d], weights [n k] -> added to out [n d]; outs [n k d], or null
void add_rows(const float* y, const int64_t* place, const float* weights, float* out, float* outs, int64_t m, int64_t k, int64_t d, int64_t) {
    for (int64_t i = 0; i < m; i++, y += d) {
        const float weight = weights[place[i]];
        float* to = out + place[i] / k * d;
        for (int64_t c = 0; c < d; c++) to[c] += weight * y[c];
        if (outs) std::memcpy(outs + place[i] * d, y, 4 * d);
    }
}

// The chosen experts of a few tokens, weighted and added.   x [n d], experts and weights [n k], w_up [E 2f d], b_up [E 2f],
// w_down [E d f], b_down [E d] -> y [n d]; what `swiglu` hands out [n k f], and each expert's output [n k d], or null.
// 0: there is no such expert
int64_t mix(const float* x, const int64_t* experts, const float* weights, const float* w_up, const float* b_up, const float* w_down,
            const float* b_down, float* y, float* gates, float* linears, float* clamped_gates, float* clamped_linears, float* post,
            float* outs, int64_t n, int64_t k, int64_t E, int64_t d, int64_t f, float limit, float alpha, int64_t threads) {
    std::vector<std::vector<int64_t>> rows(E);
    for (int64_t i = 0; i < n * k; i++) {
        if (experts[i] < 0 || experts[i] >= E) return 0;
        rows[experts[i]].push_back(i);
    }
    const std::unique_ptr<float[]> room(new float[n * k * (3 * f + d)]);
    float *up = room.get(), *active = up + n * k * 2 * f, *down = outs ? outs : active + n * k * f;
    product(rows, x, w_up, b_up, up, d, 2 * f, k, threads);
    swiglu(up, active, nullptr, gates, linears, clamped_gates, clamped_linears, post, n * k, f, limit, alpha, threads);
    product(rows, active, w_down, b_down, down, f, d, 1, threads);
    for (int64_t token = 0; token < n; token++)
        for (int64_t at = 0; at < d; at++) {
            float total = 0;
            for (int64_t i = token * k; i < (token + 1) * k; i++) total += weights[i] * down[i * d + at];
            y[token * d + at] = total;
        }
    return 1;
}
}
