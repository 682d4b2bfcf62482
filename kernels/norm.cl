// Layer norm and RMS norm, one group a row of len elements; src/ops/norm.rs has the derivation.

// The mean (0 unless centred) and 1/sigma of a row, in two passes.
float2 statistics(local float *part, global const float *x, uint len, uint centred, float eps) {
    float mean = 0.0f, variance = 0.0f;
    if (centred) {
        for (uint j = get_local_id(0); j < len; j += GROUP) mean += x[j];
        mean = group_sum(part, mean) / len;
    }
    for (uint j = get_local_id(0); j < len; j += GROUP) variance += (x[j] - mean) * (x[j] - mean);
    variance = group_sum(part, variance) / len;
    return (float2)(mean, 1.0f / sqrt(variance + eps));
}

// y = (x - mean)/sigma·w + b.
kernel void norm(global const float *x, uint x_at, global const float *w, Layout lw,
                 global const float *b, Layout lb, global float *y, uint len, uint centred, float eps) {
    local float part[GROUP];
    x += x_at + (size_t)get_group_id(0) * len;
    y += (size_t)get_group_id(0) * len;
    float2 s = statistics(part, x, len, centred, eps);
    for (uint j = get_local_id(0); j < len; j += GROUP)
        y[j] = (x[j] - s.x) * s.y * w[place(&lw, j)] + b[place(&lb, j)];
}

// dx = (g - <g> - x^·<g·x^>)/sigma with g = dy·w.
kernel void norm_dx(global const float *x, uint x_at, global const float *w, Layout lw,
                    global const float *dy, uint dy_at, global float *dx, uint len, uint centred,
                    float eps) {
    local float part[GROUP];
    x += x_at + (size_t)get_group_id(0) * len;
    dy += dy_at + (size_t)get_group_id(0) * len;
    dx += (size_t)get_group_id(0) * len;
    float2 s = statistics(part, x, len, centred, eps);
    float mean_g = 0.0f, mean_gx = 0.0f;
    for (uint j = get_local_id(0); j < len; j += GROUP) {
        float g = dy[j] * w[place(&lw, j)];
        mean_g += g;
        mean_gx += g * ((x[j] - s.x) * s.y);
    }
    mean_g = group_sum(part, mean_g) / len;
    mean_gx = group_sum(part, mean_gx) / len;
    if (!centred) mean_g = 0.0f;
    for (uint j = get_local_id(0); j < len; j += GROUP)
        dx[j] = s.y * (dy[j] * w[place(&lw, j)] - mean_g - (x[j] - s.x) * s.y * mean_gx);
}

// dy·x^ for every row: the engine sums it over the rows to dw.
kernel void norm_dw(global const float *x, uint x_at, global const float *dy, uint dy_at,
                    global float *dw, uint len, uint centred, float eps) {
    local float part[GROUP];
    x += x_at + (size_t)get_group_id(0) * len;
    dy += dy_at + (size_t)get_group_id(0) * len;
    dw += (size_t)get_group_id(0) * len;
    float2 s = statistics(part, x, len, centred, eps);
    for (uint j = get_local_id(0); j < len; j += GROUP) dw[j] = dy[j] * ((x[j] - s.x) * s.y);
}
