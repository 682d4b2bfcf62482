// Cross entropy; src/ops/loss.rs has the derivation. Rows of `classes` logits; targets below `classes`,
// or at least that for a row that does not count.

// max, sum of exp(x - max) and sum of each row. One group a row.
kernel void row_sums(global const float *x, uint x_at, global const uint *targets, global float *sums,
                     uint classes) {
    local float part[GROUP];
    uint row = get_group_id(0), l = get_local_id(0);
    x += x_at + (size_t)row * classes;
    float max = -INFINITY, sum = 0.0f, total = 0.0f;
    for (uint j = l; j < classes; j += GROUP) max = larger(x[j], max);
    max = group_max(part, max);
    for (uint j = l; j < classes; j += GROUP) {
        sum += exp(x[j] - max);
        total += x[j];
    }
    sum = group_sum(part, sum);
    total = group_sum(part, total);
    if (l < 3) sums[3 * row + l] = targets[row] >= classes ? 0.0f : l == 0 ? max : l == 1 ? sum : total;
}

// The mean over the rows that count. One group.
kernel void cross_entropy(global const float *x, uint x_at, global const uint *targets,
                          global const float *sums, global float *y, uint rows, uint classes,
                          float smoothing, float count) {
    local float part[GROUP];
    float loss = 0.0f;
    for (uint row = get_local_id(0); row < rows; row += GROUP) {
        uint target = targets[row];
        if (target >= classes) continue;
        float max = sums[3 * row], log_sum = log(sums[3 * row + 1]);
        float of_target = max - x[x_at + (size_t)row * classes + target] + log_sum;
        // Apart, because 0·INFINITY is NaN and a logit may be -INFINITY.
        loss += smoothing == 0.0f ? of_target
                                  : (1.0f - smoothing) * of_target +
                                        smoothing * (max - sums[3 * row + 2] / classes + log_sum);
    }
    loss = group_sum(part, loss);
    if (get_local_id(0) == 0) y[0] = loss / count;
}

// dx = dy/count·(softmax(x) - q). One work-item an element.
kernel void cross_entropy_vjp(global const float *x, uint x_at, global const uint *targets,
                              global const float *sums, global const float *dy, uint dy_at,
                              global float *dx, uint classes, float smoothing, float count, uint n) {
    uint i = get_global_id(0);
    if (i >= n) return;
    uint row = i / classes, target = targets[row];
    if (target >= classes) {
        dx[i] = 0.0f;
        return;
    }
    float p = exp(x[x_at + i] - sums[3 * row]) / sums[3 * row + 1];
    float q = (i % classes == target ? 1.0f - smoothing : 0.0f) + smoothing / classes;
    dx[i] = dy[dy_at] / count * (p - q);
}
