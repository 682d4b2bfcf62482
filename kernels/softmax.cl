// One group a line of len elements that lie one after another; src/ops/softmax.rs has the derivation.

// What to subtract before the exponential: the maximum, but 0 where all are -INFINITY.
float shift_of(local float *part, global const float *x, uint len) {
    float max = -INFINITY;
    for (uint j = get_local_id(0); j < len; j += GROUP) max = larger(x[j], max);
    max = group_max(part, max);
    return max == -INFINITY ? 0.0f : max;
}

float sum_of_exp(local float *part, global const float *x, uint len, float shift) {
    float sum = 0.0f;
    for (uint j = get_local_id(0); j < len; j += GROUP) sum += exp(x[j] - shift);
    return group_sum(part, sum);
}

kernel void softmax(global const float *x, uint x_at, global float *y, uint len) {
    local float part[GROUP];
    x += x_at + (size_t)get_group_id(0) * len;
    y += (size_t)get_group_id(0) * len;
    float shift = shift_of(part, x, len);
    float sum = sum_of_exp(part, x, len, shift);
    float scale = sum == 0.0f ? 0.0f : 1.0f / sum;
    for (uint j = get_local_id(0); j < len; j += GROUP) y[j] = exp(x[j] - shift) * scale;
}

kernel void log_softmax(global const float *x, uint x_at, global float *y, uint len) {
    local float part[GROUP];
    x += x_at + (size_t)get_group_id(0) * len;
    y += (size_t)get_group_id(0) * len;
    float shift = shift_of(part, x, len);
    float sum = sum_of_exp(part, x, len, shift);
    float log_sum = sum == 0.0f ? 0.0f : log(sum);
    for (uint j = get_local_id(0); j < len; j += GROUP) y[j] = (x[j] - shift) - log_sum;
}

kernel void softmax_vjp(global const float *y, uint y_at, global const float *dy, uint dy_at,
                        global float *dx, uint len) {
    local float part[GROUP];
    y += y_at + (size_t)get_group_id(0) * len;
    dy += dy_at + (size_t)get_group_id(0) * len;
    dx += (size_t)get_group_id(0) * len;
    float mean = 0.0f;
    for (uint j = get_local_id(0); j < len; j += GROUP) mean += y[j] * dy[j];
    mean = group_sum(part, mean);
    for (uint j = get_local_id(0); j < len; j += GROUP) dx[j] = y[j] * (dy[j] - mean);
}

kernel void log_softmax_vjp(global const float *y, uint y_at, global const float *dy, uint dy_at,
                            global float *dx, uint len) {
    local float part[GROUP];
    y += y_at + (size_t)get_group_id(0) * len;
    dy += dy_at + (size_t)get_group_id(0) * len;
    dx += (size_t)get_group_id(0) * len;
    float sum = 0.0f;
    for (uint j = get_local_id(0); j < len; j += GROUP) sum += dy[j];
    sum = group_sum(part, sum);
    for (uint j = get_local_id(0); j < len; j += GROUP) dx[j] = dy[j] - exp(y[j]) * sum;
}
