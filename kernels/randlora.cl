// RandLoRA; src/ops/randlora/layer.rs has the algebra. D and m are the larger and the smaller side of the
// weight, n bases of rank r, c = n·r columns. lambda: r×n, gamma: n×m, A: r×m with rows of a_row.

// The basis (x) and the rank within it (y) of column q of B: as written, or as PEFT pairs them.
uint2 basis_and_rank(uint q, uint bases, uint rank, uint peft) {
    return peft ? (uint2)(q % bases, q / bases) : (uint2)(q / rank, q % rank);
}

// C[:, J] for the columns J from `from` on, |J| = width: c·width work-items.
kernel void fill_c(global const float *a, uint a_row, global const float *lambda, uint lambda_at,
                   global const float *gamma, uint gamma_at, global float *c, uint from, uint width,
                   uint small, uint bases, uint rank, uint peft, uint n) {
    uint i = get_global_id(0);
    if (i >= n) return;
    uint2 q = basis_and_rank(i / width, bases, rank, peft);
    uint j = from + i % width;
    c[i] = lambda[lambda_at + q.y * bases + q.x] * a[q.y * a_row + j] * gamma[gamma_at + q.x * small + j];
}

// w[d, j] += s·sum over k of B[d, k]·lambda[k, i]·A[k, j]·gamma[i, j] with the basis i of row d: a panel of
// the weight with block bases, whose B is D×r. D·width work-items.
kernel void add_blocks(global const float *a, uint a_row, global const float *lambda, uint lambda_at,
                       global const float *gamma, uint gamma_at, global const float *b, global float *w,
                       float scale, uint from, uint width, uint small, uint bases, uint rank, uint n) {
    uint i = get_global_id(0);
    if (i >= n) return;
    uint d = i / width, j = from + i % width, basis = d / rank % bases;
    float sum = 0.0f;
    for (uint k = 0; k < rank; ++k) sum += b[d * rank + k] * lambda[lambda_at + k * bases + basis] * a[k * a_row + j];
    w[i] += scale * sum * gamma[gamma_at + basis * small + j];
}

// M[q, j] = s·sum over the rows d of q's basis of B[d, k]·G[d, j], of block bases. c·width work-items.
kernel void pull_blocks(global const float *b, global const float *g, global float *m, float scale,
                        uint large, uint width, uint bases, uint rank, uint n) {
    uint i = get_global_id(0);
    if (i >= n) return;
    uint q = i / width, j = i % width, basis = q / rank, k = q % rank;
    float sum = 0.0f;
    for (uint block = basis * rank; block < large; block += bases * rank)
        for (uint d = block; d < min(block + rank, large); ++d) sum += b[d * rank + k] * g[d * width + j];
    m[i] = scale * sum;
}

// dgamma[i, j] = sum over k of M[q, j]·lambda[k, i]·A[k, j] for the columns J: bases·width work-items.
kernel void pull_gamma(global const float *m, global const float *a, uint a_row,
                       global const float *lambda, uint lambda_at, global float *dgamma, uint from,
                       uint width, uint small, uint bases, uint rank, uint peft, uint n) {
    uint at = get_global_id(0);
    if (at >= n) return;
    uint i = at / width, j = at % width;
    float sum = 0.0f;
    for (uint k = 0; k < rank; ++k) {
        uint q = peft ? k * bases + i : i * rank + k;
        sum += m[q * width + j] * lambda[lambda_at + k * bases + i] * a[k * a_row + from + j];
    }
    dgamma[i * small + from + j] = sum;
}

// dlambda[k, i] += sum over J of M[q, j]·A[k, j]·gamma[i, j]: one group a column q of B.
kernel void pull_lambda(global const float *m, global const float *a, uint a_row,
                        global const float *gamma, uint gamma_at, global float *dlambda, uint from,
                        uint width, uint small, uint bases, uint rank, uint peft) {
    local float part[GROUP];
    uint q = get_group_id(0);
    uint2 at = basis_and_rank(q, bases, rank, peft);
    float sum = 0.0f;
    for (uint j = get_local_id(0); j < width; j += GROUP)
        sum += m[q * width + j] * a[at.y * a_row + from + j] * gamma[gamma_at + at.x * small + from + j];
    sum = group_sum(part, sum);
    if (get_local_id(0) == 0) dlambda[at.y * bases + at.x] += sum;
}
