// RandLoRA; src/ops/randlora/layer.rs has the algebra. D and m are the larger and the smaller side of the
// weight, n bases of rank r, c = n·r columns. lambda: r×n, gamma: n×m, A: r×m with rows of a_row.

// A part of C or M: `rows` of them from `first` on, `width` columns from `from` on.
typedef struct {
    uint first;
    uint rows;
    uint from;
    uint width;
    uint small;
    uint bases;
    uint rank;
    uint peft;
} Part;

// The basis (x) and the rank within it (y) of column q of B: as written, or as PEFT pairs them.
uint2 basis_and_rank(uint q, const Part *p) {
    return p->peft ? (uint2)(q % p->bases, q / p->bases) : (uint2)(q / p->rank, q % p->rank);
}

// A part of C: rows·width work-items.
kernel void fill_c(global const float *a, uint a_row, global const float *lambda, uint lambda_at,
                   global const float *gamma, uint gamma_at, global float *c, Part p, uint n) {
    uint i = get_global_id(0);
    if (i >= n) return;
    uint2 q = basis_and_rank(p.first + i / p.width, &p);
    uint j = p.from + i % p.width;
    c[i] = lambda[lambda_at + q.y * p.bases + q.x] * a[q.y * a_row + j] * gamma[gamma_at + q.x * p.small + j];
}

// dgamma[i, j] += sum over the part's ranks k of M[q, j]·lambda[k, i]·A[k, j]: bases·width work-items.
kernel void pull_gamma(global const float *m, global const float *a, uint a_row,
                       global const float *lambda, uint lambda_at, global float *dgamma, Part p, uint n) {
    uint at = get_global_id(0);
    if (at >= n) return;
    uint i = at / p.width, j = at % p.width;
    float sum = 0.0f;
    for (uint k = 0; k < p.rank; ++k) {
        uint q = p.peft ? k * p.bases + i : i * p.rank + k;
        if (q < p.first || q >= p.first + p.rows) continue;
        sum += m[(q - p.first) * p.width + j] * lambda[lambda_at + k * p.bases + i] * a[k * a_row + p.from + j];
    }
    dgamma[i * p.small + p.from + j] += sum;
}

// dlambda[k, i] += sum over the part's columns j of M[q, j]·A[k, j]·gamma[i, j]: one group a row q.
kernel void pull_lambda(global const float *m, global const float *a, uint a_row,
                        global const float *gamma, uint gamma_at, global float *dlambda, Part p) {
    local float part[GROUP];
    uint q = get_group_id(0);
    uint2 at = basis_and_rank(p.first + q, &p);
    float sum = 0.0f;
    for (uint j = get_local_id(0); j < p.width; j += GROUP)
        sum += m[q * p.width + j] * a[at.y * a_row + p.from + j] * gamma[gamma_at + at.x * p.small + p.from + j];
    sum = group_sum(part, sum);
    if (get_local_id(0) == 0) dlambda[at.y * p.bases + at.x] += sum;
}

// Block bases: row d of B (D×r) is that of basis d / r mod n in the columns of that basis, zero in the others.

// w[d, j] += s·sum over k of B[d, k]·lambda[k, i]·A[k, j]·gamma[i, j]: a panel of the weight. D·width work-items.
kernel void add_blocks(global const float *a, uint a_row, global const float *lambda, uint lambda_at,
                       global const float *gamma, uint gamma_at, global const float *b, global float *w,
                       float scale, Part p, uint n) {
    uint i = get_global_id(0);
    if (i >= n) return;
    uint d = i / p.width, j = p.from + i % p.width, basis = d / p.rank % p.bases;
    float sum = 0.0f;
    for (uint k = 0; k < p.rank; ++k)
        sum += b[d * p.rank + k] * lambda[lambda_at + k * p.bases + basis] * a[k * a_row + j];
    w[i] += scale * sum * gamma[gamma_at + basis * p.small + j];
}

// h[t, q] = sum over the rows d of q's basis of v[t, d]·B[d, k], for `count` columns q from `first` on. One
// work-item an element of h.
kernel void collect_blocks(global const float *v, Layout lv, global const float *b, global float *h, Layout lh,
                           uint first, uint count, uint large, uint bases, uint rank, uint n) {
    uint at = get_global_id(0);
    if (at >= n) return;
    uint t = at / count, q = first + at % count, k = q % rank;
    global const float *row = v + lv.offset + t * lv.strides[0];
    float sum = 0.0f;
    for (uint block = q / rank * rank; block < large; block += bases * rank)
        for (uint d = block; d < min(block + rank, large); ++d) sum += row[d * lv.strides[1]] * b[d * rank + k];
    h[lh.offset + t * lh.strides[0] + at % count * lh.strides[1]] = sum;
}

// v[t, d] += s·sum over d's columns q of z[t, q]·B[d, k], as above. One work-item an element of v.
kernel void spread_blocks(global const float *z, Layout lz, global const float *b, float scale, global float *v,
                          Layout lv, uint first, uint count, uint large, uint bases, uint rank, uint n) {
    uint at = get_global_id(0);
    if (at >= n) return;
    uint t = at / large, d = at % large, of = d / rank % bases * rank;
    uint end = min(of + rank, first + count);
    global const float *row = z + lz.offset + t * lz.strides[0];
    float sum = 0.0f;
    for (uint q = max(of, first); q < end; ++q) sum += row[(q - first) * lz.strides[1]] * b[d * rank + q - of];
    v[lv.offset + t * lv.strides[0] + d * lv.strides[1]] += scale * sum;
}
