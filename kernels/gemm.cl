// c = alpha·a·b + beta·c for matrices of any strides, in batches.
//
// A group makes a tile of TILE×TILE elements of c: it takes DEPTH columns of a and rows of b at a time
// into local memory, and each of its THREADS×THREADS work-items keeps EACH×EACH sums in registers. Every
// sum runs over k from first to last in one chain: neither TILE nor DEPTH changes its bits.

#ifndef THREADS
#define THREADS 8
#endif
#define EACH 4
#define TILE (THREADS * EACH)
#define DEPTH 16

// The layouts place the first element of the matrix of each batch. B may be stored in a narrow type.
#define GEMM(NAME, B, FROM)                                                                           \
    kernel __attribute__((reqd_work_group_size(THREADS, THREADS, 1))) void NAME(                      \
        global const float *a, Layout la, uint a_row, uint a_col, global const B *b, Layout lb,       \
        uint b_row, uint b_col, global float *c, Layout lc, uint c_row, uint c_col, uint m, uint n,   \
        uint k, float alpha, float beta) {                                                            \
        /* One column more than needed, so that columns do not fall on one bank of the memory. */     \
        local float a_tile[DEPTH][TILE + 1], b_tile[DEPTH][TILE + 1];                                 \
        uint tx = get_local_id(0), ty = get_local_id(1), id = ty * THREADS + tx;                      \
        uint row = get_group_id(1) * TILE, col = get_group_id(0) * TILE;                              \
        a += place(&la, get_group_id(2));                                                             \
        b += place(&lb, get_group_id(2));                                                             \
        c += place(&lc, get_group_id(2));                                                             \
        float sum[EACH][EACH] = {{0.0f}};                                                             \
        for (uint from = 0; from < k; from += DEPTH) {                                                \
            for (uint e = id; e < TILE * DEPTH; e += THREADS * THREADS) {                             \
                /* Neighbours read neighbours in memory, whichever way the matrix lies. */            \
                uint d = a_col == 1 ? e % DEPTH : e / TILE, r = a_col == 1 ? e / DEPTH : e % TILE;    \
                bool inside = row + r < m && from + d < k;                                            \
                a_tile[d][r] = inside ? a[(row + r) * a_row + (from + d) * a_col] : 0.0f;             \
                d = b_row == 1 ? e % DEPTH : e / TILE;                                                \
                r = b_row == 1 ? e / DEPTH : e % TILE;                                                \
                inside = col + r < n && from + d < k;                                                 \
                b_tile[d][r] = inside ? FROM(b[(from + d) * b_row + (col + r) * b_col]) : 0.0f;       \
            }                                                                                         \
            barrier(CLK_LOCAL_MEM_FENCE);                                                             \
            for (uint d = 0; d < DEPTH; ++d) {                                                        \
                float left[EACH], right[EACH];                                                        \
                for (uint i = 0; i < EACH; ++i) left[i] = a_tile[d][ty + i * THREADS];                \
                for (uint j = 0; j < EACH; ++j) right[j] = b_tile[d][tx + j * THREADS];               \
                for (uint i = 0; i < EACH; ++i)                                                       \
                    for (uint j = 0; j < EACH; ++j) sum[i][j] = fma(left[i], right[j], sum[i][j]);    \
            }                                                                                         \
            barrier(CLK_LOCAL_MEM_FENCE);                                                             \
        }                                                                                             \
        for (uint i = 0; i < EACH; ++i)                                                               \
            for (uint j = 0; j < EACH; ++j) {                                                         \
                uint r = row + ty + i * THREADS, s = col + tx + j * THREADS;                          \
                if (r >= m || s >= n) continue;                                                       \
                global float *to = c + r * c_row + s * c_col;                                         \
                /* What c holds where beta is 0 may be anything, NaN too. */                          \
                *to = beta == 0.0f ? alpha * sum[i][j] : alpha * sum[i][j] + beta * *to;              \
            }                                                                                         \
    }

GEMM(gemm_f32, float, from_f32)
GEMM(gemm_bf16, ushort, from_bf16)
GEMM(gemm_f16, ushort, from_f16)
