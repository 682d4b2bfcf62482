// c = alpha·a·b + beta·c for matrices of any strides, in batches.
//
// A group makes a tile of TILE×TILE elements of c: it takes DEPTH columns of a and rows of b at a time
// into local memory, and each of its THREADS×THREADS work-items keeps EACH×EACH sums in registers, in blocks
// of four rows and columns that lie side by side. Every sum runs over k from first to last in one chain: neither
// TILE nor DEPTH nor the loads of four change its bits.

#ifndef THREADS
#define THREADS 8
#endif
#define DEPTH 16

// Element i of what a matrix is stored as, and four from there on.
#define AT_F32(x, i) x[i]
#define FOUR_F32(x, i) vload4(0, x + (i))
#define AT_BF16(x, i) from_bf16(x[i])
#define FOUR_BF16(x, i) as_float4(convert_uint4(vload4(0, x + (i))) << 16)
#define AT_F16(x, i) from_f16(x[i])
#define FOUR_F16(x, i) (float4)(AT_F16(x, i), AT_F16(x, (i) + 1), AT_F16(x, (i) + 2), AT_F16(x, (i) + 3))

// Columns `from` … of DEPTH and rows `first` … of TILE of a matrix, as tile[depth][row], 0 outside of it. Whole
// tiles are read four numbers at a time, whichever way the matrix lies.
#define LOAD(TILE, tile, x, at, first, rows, row, col, AT, FOUR)                                      \
    if (first + (TILE) <= rows && from + DEPTH <= k && col == 1) {                                    \
        for (uint e = id; e < (TILE) * DEPTH / 4; e += THREADS * THREADS) {                           \
            uint r = e / (DEPTH / 4), d = e % (DEPTH / 4) * 4;                                        \
            float4 four = FOUR(x, at + (first + r) * row + from + d);                                 \
            tile[d][r] = four.s0;                                                                     \
            tile[d + 1][r] = four.s1;                                                                 \
            tile[d + 2][r] = four.s2;                                                                 \
            tile[d + 3][r] = four.s3;                                                                 \
        }                                                                                             \
    } else if (first + (TILE) <= rows && from + DEPTH <= k && row == 1) {                             \
        for (uint e = id; e < (TILE) * DEPTH / 4; e += THREADS * THREADS) {                           \
            uint d = e / ((TILE) / 4), r = e % ((TILE) / 4) * 4;                                      \
            vstore4(FOUR(x, at + first + r + (from + d) * col), 0, &tile[d][r]);                      \
        }                                                                                             \
    } else {                                                                                          \
        for (uint e = id; e < (TILE) * DEPTH; e += THREADS * THREADS) {                               \
            uint d = col == 1 ? e % DEPTH : e / (TILE), r = col == 1 ? e / DEPTH : e % (TILE);        \
            bool inside = first + r < rows && from + d < k;                                           \
            tile[d][r] = inside ? AT(x, at + (first + r) * row + (from + d) * col) : 0.0f;            \
        }                                                                                             \
    }

// The layouts place the first element of the matrix of each batch. B may be stored in a narrow type.
#define GEMM(NAME, EACH, B, AT, FOUR)                                                                 \
    kernel __attribute__((reqd_work_group_size(THREADS, THREADS, 1))) void NAME(                      \
        global const float *a, Layout la, uint a_row, uint a_col, global const B *b, Layout lb,       \
        uint b_row, uint b_col, global float *c, Layout lc, uint c_row, uint c_col, uint m, uint n,   \
        uint k, float alpha, float beta) {                                                            \
        /* Four columns more than needed, so that columns do not fall on one bank of the memory. */   \
        local float a_tile[DEPTH][THREADS * EACH + 4], b_tile[DEPTH][THREADS * EACH + 4];             \
        uint tx = get_local_id(0), ty = get_local_id(1), id = ty * THREADS + tx;                      \
        uint across = (n + THREADS * EACH - 1) / (THREADS * EACH);                                    \
        uint down = (m + THREADS * EACH - 1) / (THREADS * EACH);                                      \
        uint batch = get_group_id(0) / (across * down);                                               \
        uint row = get_group_id(0) / across % down * (THREADS * EACH);                                \
        uint col = get_group_id(0) % across * (THREADS * EACH);                                       \
        uint a_at = place(&la, batch), b_at = place(&lb, batch);                                      \
        c += place(&lc, batch);                                                                       \
        float4 sum[EACH][EACH / 4];                                                                   \
        for (uint i = 0; i < EACH; ++i)                                                               \
            for (uint j = 0; j < EACH / 4; ++j) sum[i][j] = 0.0f;                                     \
        for (uint from = 0; from < k; from += DEPTH) {                                                \
            LOAD(THREADS * EACH, a_tile, a, a_at, row, m, a_row, a_col, AT_F32, FOUR_F32)             \
            LOAD(THREADS * EACH, b_tile, b, b_at, col, n, b_col, b_row, AT, FOUR)                     \
            barrier(CLK_LOCAL_MEM_FENCE);                                                             \
            for (uint d = 0; d < DEPTH; ++d) {                                                        \
                float4 right[EACH / 4];                                                               \
                for (uint j = 0; j < EACH / 4; ++j)                                                   \
                    right[j] = vload4(tx + j * THREADS, b_tile[d]);                                   \
                for (uint i = 0; i < EACH; ++i) {                                                     \
                    float left = a_tile[d][4 * ty + i / 4 * 4 * THREADS + i % 4];                     \
                    for (uint j = 0; j < EACH / 4; ++j)                                               \
                        sum[i][j] = fma((float4)left, right[j], sum[i][j]);                           \
                }                                                                                     \
            }                                                                                         \
            barrier(CLK_LOCAL_MEM_FENCE);                                                             \
        }                                                                                             \
        for (uint i = 0; i < EACH; ++i)                                                               \
            for (uint j = 0; j < EACH / 4; ++j) {                                                     \
                uint r = row + 4 * ty + i / 4 * 4 * THREADS + i % 4;                                  \
                uint s = col + 4 * (tx + j * THREADS);                                                \
                if (r >= m || s >= n) continue;                                                       \
                global float *to = c + r * c_row + s * c_col;                                         \
                float4 four = alpha * sum[i][j];                                                      \
                /* What c holds where beta is 0 may be anything, NaN too. */                          \
                if (c_col == 1 && s + 4 <= n) {                                                       \
                    vstore4(beta == 0.0f ? four : four + beta * vload4(0, to), 0, to);                \
                    continue;                                                                         \
                }                                                                                     \
                float each[4] = {four.x, four.y, four.z, four.w};                                     \
                for (uint e = 0; e < min(4u, n - s); ++e)                                             \
                    to[e * c_col] = beta == 0.0f ? each[e] : each[e] + beta * to[e * c_col];          \
            }                                                                                         \
    }

// Tiles for most sizes, and larger ones for large matrices, where a number in a register is used twice as often.
#define BOTH(NAME, B, AT, FOUR)                                                                       \
    GEMM(NAME, 4, B, AT, FOUR)                                                                        \
    GEMM(NAME##_large, 8, B, AT, FOUR)

BOTH(gemm_f32, float, AT_F32, FOUR_F32)
BOTH(gemm_bf16, ushort, AT_BF16, FOUR_BF16)
BOTH(gemm_f16, ushort, AT_F16, FOUR_F16)
