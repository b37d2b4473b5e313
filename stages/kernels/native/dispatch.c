/* Which kernels this processor can run, what packs weights for them, and numbers that are made once. */
#include "kernels.h"
#include "lanes.h"

#include <sys/mman.h>
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#define EXPORT __attribute__((visibility("default")))

extern const struct kernels pipeinfer_kernels_portable;
#if defined(HAVE_avx2)
extern const struct kernels pipeinfer_kernels_avx2;
#endif
#if defined(HAVE_avx512)
extern const struct kernels pipeinfer_kernels_avx512;
#endif
#if defined(HAVE_avx512vnni)
extern const struct kernels pipeinfer_kernels_avx512vnni;
#endif
#if defined(HAVE_avx512bf16)
extern const struct kernels pipeinfer_kernels_avx512bf16;
#endif

/* Of kernels.h. It grows with each change there: a library of another version would read wrong memory. */
EXPORT int pipeinfer_version(void) { return 3; }

#if defined(__x86_64__)
#include <cpuid.h>

enum { EAX, EBX, ECX };

/* Bits of cpuid and of the register states that the system saves; compilers' own tests need a run-time library. */
static int has(unsigned leaf, unsigned part, int word, unsigned bits) {
    unsigned out[4] = {0};
    return __get_cpuid_count(leaf, part, &out[0], &out[1], &out[2], &out[3]) && (out[word] & bits) == bits;
}

static int has_saved(unsigned bits) {
    unsigned low, high;
    if (!has(1, 0, ECX, 1u << 27)) return 0;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & bits) == bits;
}

static int has_avx2(void) { return has_saved(0x6) && has(1, 0, ECX, 1u << 12 | 1u << 29) && has(7, 0, EBX, 1u << 5); }
static int has_avx512(void) { /* F, DQ, BW, VL */
    return has_avx2() && has_saved(0xe6) && has(7, 0, EBX, 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31);
}
static int has_vnni(void) { return has_avx512() && has(7, 0, ECX, 1u << 11); }
static int has_bf16(void) { return has_vnni() && has(7, 1, EAX, 1u << 5); }
#endif

/* Kernels from the best on that this processor runs; NULL from a number on. */
EXPORT const struct kernels *pipeinfer_kernels(int index) {
    const struct kernels *found[5] = {0};
    int count = 0;
#if defined(HAVE_avx512bf16)
    if (has_bf16()) found[count++] = &pipeinfer_kernels_avx512bf16;
#endif
#if defined(HAVE_avx512vnni)
    if (has_vnni()) found[count++] = &pipeinfer_kernels_avx512vnni;
#endif
#if defined(HAVE_avx512)
    if (has_avx512()) found[count++] = &pipeinfer_kernels_avx512;
#endif
#if defined(HAVE_avx2)
    if (has_avx2()) found[count++] = &pipeinfer_kernels_avx2;
#endif
    found[count++] = &pipeinfer_kernels_portable;
    return index >= 0 && index < count ? found[index] : 0;
}

/* Whether the portable kernels have fused multiply-add, hence the same bits as the others. */
EXPORT int pipeinfer_portable_is_fused(void) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__aarch64__)
    return 1;
#else
    return 0;
#endif
}

/* Ask for large pages for memory that has not been written yet: reading weights then misses few translations. */
EXPORT void pipeinfer_huge(void *memory, int64_t nbytes) {
    const int64_t PAGE = 2 << 20;
    int64_t begin = ((int64_t)memory + 4095) / 4096 * 4096, end = ((int64_t)memory + nbytes) / 4096 * 4096;
    if (nbytes >= PAGE && end > begin) madvise((void *)begin, (size_t)(end - begin), MADV_HUGEPAGE);
}

/* A block: 64 bytes of each of the 16 rows that become a panel's lanes, whole cache lines. */
enum { BLOCK = 64 };

/* `nbytes` of the panel's rows from byte `from` of each on, zeros where a row or its end is missing. */
static void gather(const char *rows, int64_t row, int there, int64_t from, int64_t nbytes, char block[PANEL][BLOCK]) {
    if (nbytes < BLOCK || there < PANEL) memset(block, 0, PANEL * BLOCK);
    for (int lane = 0; lane < there; lane++)
        if (nbytes >= BLOCK)
            memcpy(block[lane], rows + lane * row + from, BLOCK);
        else
            memcpy(block[lane], rows + lane * row + from, (size_t)nbytes);
}

/* A block as lines of 16 dwords: a transposition. */
static void transpose(const char block[PANEL][BLOCK], uint32_t lines[PANEL][PANEL]) {
    uint32_t dwords[PANEL][PANEL];
    memcpy(dwords, block, sizeof dwords);
#if defined(__SSE2__)
    for (int lane = 0; lane < PANEL; lane += 4)
        for (int line = 0; line < PANEL; line += 4) {
            __m128 a = _mm_loadu_ps((const float *)&dwords[lane][line]);
            __m128 b = _mm_loadu_ps((const float *)&dwords[lane + 1][line]);
            __m128 c = _mm_loadu_ps((const float *)&dwords[lane + 2][line]);
            __m128 d = _mm_loadu_ps((const float *)&dwords[lane + 3][line]);
            _MM_TRANSPOSE4_PS(a, b, c, d);
            _mm_storeu_ps((float *)&lines[line][lane], a);
            _mm_storeu_ps((float *)&lines[line + 1][lane], b);
            _mm_storeu_ps((float *)&lines[line + 2][lane], c);
            _mm_storeu_ps((float *)&lines[line + 3][lane], d);
        }
#else
    for (int line = 0; line < PANEL; line++)
        for (int lane = 0; lane < PANEL; lane++) lines[line][lane] = dwords[lane][line];
#endif
}

/* Panels from `first` on, every `turn`-th, get the rows of w [columns][k]. See struct linear. */
EXPORT void pipeinfer_pack(const void *w, int format, int columns, int k, int first, int turn, void *panels) {
    int64_t size = format == FLOAT ? 4 : 2, row = k * size, line = 2 * PANEL * size, pairs = (k + 1) / 2;
    char block[PANEL][BLOCK];
    uint32_t lines[PANEL][PANEL];
    for (int64_t begin = 0; begin < columns; begin += PANEL) {
        char *to = (char *)panels + (first + begin / PANEL * turn) * pairs * line, *end = to + pairs * line;
        int there = columns - begin < PANEL ? (int)(columns - begin) : PANEL;
        for (int64_t from = 0; from < row; from += BLOCK, to += PANEL * BLOCK) {
            gather((const char *)w + begin * row, row, there, from, row - from, block);
            transpose(block, lines);
            if (format == HALF)
                for (int i = 0; i < PANEL; i++) {
                    uint16_t parted[2 * PANEL];
                    for (int lane = 0; lane < PANEL; lane++) {
                        parted[lane] = (uint16_t)lines[i][lane];
                        parted[PANEL + lane] = (uint16_t)(lines[i][lane] >> 16);
                    }
                    memcpy(lines[i], parted, sizeof parted);
                }
            memcpy(to, lines, (size_t)(end - to < (int64_t)sizeof lines ? end - to : (int64_t)sizeof lines));
        }
    }
}

/* Sine and cosine within a unit in the last place of float, of 0 <= angle < 1e8, in double precision. */
static void sine_cosine(double angle, float *sine, float *cosine) {
    const double TURNS = 0.63661977236758134308, ROUND = 6755399441055744.0; /* 2 / pi; 1.5 2^52 rounds */
    double quarters = (angle * TURNS + ROUND) - ROUND;
    double r = angle - quarters * 1.57079632673412561417; /* pi / 2 in parts of 33 bits: these products are exact */
    r = r - quarters * 6.07710050630396597660e-11;
    r = r - quarters * 2.02226624879595063154e-21;
    double z = r * r;
    double s = 1.58969099521155010221e-10;
    s = s * z - 2.50507602534068634195e-8, s = s * z + 2.75573137070700676789e-6, s = s * z - 1.98412698298579493134e-4;
    s = s * z + 8.33333333332248946124e-3, s = s * z - 1.66666666666666324348e-1, s = r + r * z * s;
    double c = -1.13596475577881948265e-11;
    c = c * z + 2.08757232129817482790e-9, c = c * z - 2.75573143513906633035e-7, c = c * z + 2.48015872894767294178e-5;
    c = c * z - 1.38888888888741095749e-3, c = c * z + 4.16666666666666019037e-2, c = 1.0 - 0.5 * z + z * z * c;
    int quarter = (int)((int64_t)quarters & 3);
    double found[2] = {quarter & 1 ? c : s, quarter & 1 ? s : c};
    *sine = (float)(quarter & 2 ? -found[0] : found[0]);
    *cosine = (float)((quarter + 1) & 2 ? -found[1] : found[1]);
}

/* rotations[position][2 * half]: cosines, then sines, of position * frequency in float, times `factor`. */
EXPORT void pipeinfer_rotations(const float *frequencies, int half, float factor, int positions, float *rotations) {
    for (int position = 0; position < positions; position++)
        for (int i = 0; i < half; i++) {
            float angle = (float)position * frequencies[i], sine, cosine;
            sine_cosine((double)angle, &sine, &cosine);
            rotations[(int64_t)position * 2 * half + i] = cosine * factor;
            rotations[(int64_t)position * 2 * half + half + i] = sine * factor;
        }
}
