// Weights as they are stored, times float32: MXFP4 blocks and bfloat16 rows are widened in registers, sums are float32.
// Built by cpu.py at first use. Reference: gptoss_lab/mxfp4.py; every function here is tested against it.
#include <cstdint>
#include <cstring>

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
