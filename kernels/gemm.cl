// c = alpha·a·b + beta·c for matrices of any strides, in batches.
//
// A group makes a tile of c: it takes DEPTH columns of a and rows of b at a time into local memory, and each of
// its THREADS×THREADS work-items keeps sums in registers, for rows in blocks of four and columns in vectors of
// WIDTH. Every sum runs over k from first to last in one chain: no size here changes its bits.

// Devices choose THREADS and WIDTH, see src/opencl/runtime/quirks.rs.
#ifndef THREADS
#define THREADS 8
#define WIDTH 4
#endif
#if WIDTH == 16
#define VECTOR float16
#define VLOAD vload16
#define VSTORE vstore16
#else
#define VECTOR float4
#define VLOAD vload4
#define VSTORE vstore4
#endif

// Element i of what a matrix is stored as, and four from there on.
#define AT_F32(x, i) x[i]
#define FOUR_F32(x, i) vload4(0, x + (i))
#define AT_BF16(x, i) from_bf16(x[i])
#define FOUR_BF16(x, i) as_float4(convert_uint4(vload4(0, x + (i))) << 16)
#define AT_F16(x, i) from_f16(x[i])
#define FOUR_F16(x, i) (float4)(AT_F16(x, i), AT_F16(x, (i) + 1), AT_F16(x, (i) + 2), AT_F16(x, (i) + 3))

// -1, 0 and 1, sixteen in a word, two bits each: 0 for 0, 1 for 1, 3 for -1, a number with its sign.
float ternary(global const uint *x, uint i) {
    return (float)((int)(x[i / 16] << (30 - 2 * (i % 16))) >> 30);
}
#define AT_TERNARY(x, i) ternary(x, i)
#define FOUR_TERNARY(x, i) (float4)(ternary(x, i), ternary(x, (i) + 1), ternary(x, (i) + 2), ternary(x, (i) + 3))

// DEPTH columns from `from` on and SIDE rows from `first` on of a matrix, as tile[depth][row], 0 outside of it.
// Whole tiles are read four numbers at a time, whichever way the matrix lies.
#define LOAD(SIDE, DEPTH, tile, x, at, first, rows, row, col, AT, FOUR)                                       \
    if (first + (SIDE) <= rows && from + DEPTH <= k && col == 1) {                                            \
        for (uint e = id; e < (SIDE) * DEPTH / 4; e += THREADS * THREADS) {                                   \
            uint r = e / (DEPTH / 4), d = e % (DEPTH / 4) * 4;                                                \
            float4 four = FOUR(x, at + (first + r) * row + from + d);                                         \
            tile[d][r] = four.s0;                                                                             \
            tile[d + 1][r] = four.s1;                                                                         \
            tile[d + 2][r] = four.s2;                                                                         \
            tile[d + 3][r] = four.s3;                                                                         \
        }                                                                                                     \
    } else if (first + (SIDE) <= rows && from + DEPTH <= k && row == 1) {                                     \
        for (uint e = id; e < (SIDE) * DEPTH / 4; e += THREADS * THREADS) {                                   \
            uint d = e / ((SIDE) / 4), r = e % ((SIDE) / 4) * 4;                                              \
            vstore4(FOUR(x, at + first + r + (from + d) * col), 0, &tile[d][r]);                              \
        }                                                                                                     \
    } else {                                                                                                  \
        for (uint e = id; e < (SIDE) * DEPTH; e += THREADS * THREADS) {                                       \
            uint d = col == 1 ? e % DEPTH : e / (SIDE), r = col == 1 ? e / DEPTH : e % (SIDE);                \
            bool inside = first + r < rows && from + d < k;                                                   \
            tile[d][r] = inside ? AT(x, at + (first + r) * row + (from + d) * col) : 0.0f;                    \
        }                                                                                                     \
    }

// With EACH rows and VECTORS vectors of columns a work-item. The layouts place the first element of the matrix of
// each batch. B may be stored in a narrow type.
#define GEMM(NAME, EACH, VECTORS, DEPTH, B, AT, FOUR)                                                         \
    kernel __attribute__((reqd_work_group_size(THREADS, THREADS, 1))) void NAME(                              \
        global const float *a, Layout la, uint a_row, uint a_col, global const B *b, Layout lb,               \
        uint b_row, uint b_col, global float *c, Layout lc, uint c_row, uint c_col, uint m, uint n,           \
        uint k, float alpha, float beta) {                                                                    \
        /* Four columns more than needed, so that columns do not fall on one bank of the memory. */           \
        local float a_tile[DEPTH][THREADS * EACH + 4], b_tile[DEPTH][THREADS * WIDTH * VECTORS + 4];          \
        const uint high = THREADS * EACH, wide = THREADS * WIDTH * VECTORS;                                   \
        uint tx = get_local_id(0), ty = get_local_id(1), id = ty * THREADS + tx;                              \
        uint across = (n + wide - 1) / wide, down = (m + high - 1) / high;                                    \
        uint batch = get_group_id(0) / (across * down);                                                       \
        uint row = get_group_id(0) / across % down * high, col = get_group_id(0) % across * wide;             \
        uint a_at = place(&la, batch), b_at = place(&lb, batch);                                              \
        c += place(&lc, batch);                                                                               \
        VECTOR sum[EACH][VECTORS];                                                                            \
        for (uint i = 0; i < EACH; ++i)                                                                       \
            for (uint j = 0; j < VECTORS; ++j) sum[i][j] = 0.0f;                                              \
        for (uint from = 0; from < k; from += DEPTH) {                                                        \
            LOAD(THREADS * EACH, DEPTH, a_tile, a, a_at, row, m, a_row, a_col, AT_F32, FOUR_F32)              \
            LOAD(THREADS * WIDTH * VECTORS, DEPTH, b_tile, b, b_at, col, n, b_col, b_row, AT, FOUR)           \
            barrier(CLK_LOCAL_MEM_FENCE);                                                                     \
            for (uint d = 0; d < DEPTH; ++d) {                                                                \
                VECTOR right[VECTORS];                                                                        \
                for (uint j = 0; j < VECTORS; ++j) right[j] = VLOAD(tx + j * THREADS, b_tile[d]);             \
                for (uint i = 0; i < EACH; ++i) {                                                             \
                    float left = a_tile[d][4 * ty + i / 4 * 4 * THREADS + i % 4];                             \
                    for (uint j = 0; j < VECTORS; ++j)                                                        \
                        sum[i][j] = fma((VECTOR)left, right[j], sum[i][j]);                                   \
                }                                                                                             \
            }                                                                                                 \
            barrier(CLK_LOCAL_MEM_FENCE);                                                                     \
        }                                                                                                     \
        for (uint i = 0; i < EACH; ++i)                                                                       \
            for (uint j = 0; j < VECTORS; ++j) {                                                              \
                uint r = row + 4 * ty + i / 4 * 4 * THREADS + i % 4;                                          \
                uint s = col + WIDTH * (tx + j * THREADS);                                                    \
                if (r >= m || s >= n) continue;                                                               \
                global float *to = c + r * c_row + s * c_col;                                                 \
                VECTOR made = alpha * sum[i][j];                                                              \
                /* What c holds where beta is 0 may be anything, NaN too. */                                  \
                if (c_col == 1 && s + WIDTH <= n) {                                                           \
                    VSTORE(beta == 0.0f ? made : fma((VECTOR)beta, VLOAD(0, to), made), 0, to);                          \
                    continue;                                                                                 \
                }                                                                                             \
                float each[WIDTH];                                                                            \
                VSTORE(made, 0, each);                                                                        \
                for (uint e = 0; e < WIDTH && s + e < n; ++e)                                                 \
                    to[e * c_col] = beta == 0.0f ? each[e] : fma(beta, to[e * c_col], each[e]);                  \
            }                                                                                                 \
    }

// Tiles for most sizes, and larger ones for large matrices, where a number in a register is used twice as often.
#if WIDTH == 16
#define BOTH(NAME, B, AT, FOUR)                                                                               \
    GEMM(NAME, 4, 1, 16, B, AT, FOUR)                                                                         \
    GEMM(NAME##_large, 8, 1, 16, B, AT, FOUR)
#else
#define BOTH(NAME, B, AT, FOUR)                                                                               \
    GEMM(NAME, 4, 1, 16, B, AT, FOUR)                                                                         \
    GEMM(NAME##_large, 8, 2, 8, B, AT, FOUR)
#endif

BOTH(gemm_f32, float, AT_F32, FOUR_F32)
BOTH(gemm_bf16, ushort, AT_BF16, FOUR_BF16)
BOTH(gemm_f16, ushort, AT_F16, FOUR_F16)
BOTH(gemm_ternary, uint, AT_TERNARY, FOUR_TERNARY)
