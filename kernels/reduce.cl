// One group an element of the result: element o of y is made of the elements o·len … (o + 1)·len of x in
// the order of its layout, whose last dimensions are those that are reduced.

kernel void sum(global const float *x, Layout lx, global float *y, uint len, float factor) {
    local float part[GROUP];
    uint o = get_group_id(0);
    float sum = 0.0f;
    for (uint j = get_local_id(0); j < len; j += GROUP) sum += x[place(&lx, o * len + j)];
    sum = group_sum(part, sum);
    if (get_local_id(0) == 0) y[o] = factor * sum;
}

kernel void max_of(global const float *x, Layout lx, global float *y, uint len) {
    local float part[GROUP];
    uint o = get_group_id(0);
    float max = -INFINITY;
    for (uint j = get_local_id(0); j < len; j += GROUP) max = larger(x[place(&lx, o * len + j)], max);
    max = group_max(part, max);
    if (get_local_id(0) == 0) y[o] = max;
}
