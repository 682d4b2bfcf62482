// Rows of a table by index.

// y = the rows of the table (any layout, any stored type) that ids name. One work-item an element.
#define LOOK_UP(NAME, T, FROM)                                                                        \
    kernel void NAME(global const T *table, Layout lt, global const uint *ids, global float *y,       \
                     uint width, uint n) {                                                            \
        uint i = get_global_id(0);                                                                    \
        if (i >= n) return;                                                                           \
        y[i] = FROM(table[lt.offset + ids[i / width] * lt.strides[0] + i % width * lt.strides[1]]);   \
    }
LOOK_UP(look_up_f32, float, from_f32)
LOOK_UP(look_up_bf16, ushort, from_bf16)
LOOK_UP(look_up_f16, ushort, from_f16)

// Row v of dtable is the sum of the rows of dy at places[starts[v]] … places[starts[v + 1]], in that
// order. One work-item an element of dtable: no two write to one place.
kernel void add_rows(global const float *dy, uint dy_at, global const uint *starts,
                     global const uint *places, global float *table, uint width, uint n) {
    uint i = get_global_id(0);
    if (i >= n) return;
    uint v = i / width, j = i % width;
    float sum = 0.0f;
    for (uint u = starts[v]; u < starts[v + 1]; ++u) sum += dy[dy_at + places[u] * width + j];
    table[i] = sum;
}

// y_ojk = x_o,id(o,j,k),k for x: o d k, ids and y: o j k. One work-item an element of y.
kernel void gather(global const float *x, uint x_at, global const uint *ids, global float *y, uint d,
                   uint j, uint k, uint n) {
    uint i = get_global_id(0);
    if (i < n) y[i] = x[x_at + (i / (j * k) * d + ids[i]) * k + i % k];
}

// dx_oik = the sum of dy_ojk over the j with id(o,j,k) = i, in their order. One work-item an element of dx.
kernel void gather_vjp(global const float *dy, uint dy_at, global const uint *ids, global float *dx, uint d,
                       uint j, uint k, uint n) {
    uint at = get_global_id(0);
    if (at >= n) return;
    uint o = at / (d * k), i = at / k % d, col = at % k;
    float sum = 0.0f;
    for (uint row = o * j; row < (o + 1) * j; ++row)
        if (ids[row * k + col] == i) sum += dy[dy_at + row * k + col];
    dx[at] = sum;
}
