// Optimiser steps and the size of gradients. One work-item an element, in place.

// As src/optim/adamw.rs writes it: keep = 1 - rate·decay, rate and root with their bias corrections.
kernel void adamw(global float *p, uint p_at, global float *m, uint m_at, global float *v, uint v_at,
                  global const float *g, uint g_at, float beta1, float rest1, float beta2, float rest2,
                  float keep, float rate, float root, float eps, uint n) {
    uint i = get_global_id(0);
    if (i >= n) return;
    float gradient = g[g_at + i];
    float first = beta1 * m[m_at + i] + rest1 * gradient;
    float second = beta2 * v[v_at + i] + rest2 * gradient * gradient;
    m[m_at + i] = first;
    v[v_at + i] = second;
    p[p_at + i] = keep * p[p_at + i] - rate * first / (sqrt(second) * root + eps);
}

kernel void sgd(global float *p, uint p_at, global float *v, uint v_at, global const float *g, uint g_at,
                float momentum, float decay, float rate, uint n) {
    uint i = get_global_id(0);
    if (i >= n) return;
    float velocity = momentum * v[v_at + i] + (g[g_at + i] + decay * p[p_at + i]);
    v[v_at + i] = velocity;
    p[p_at + i] -= rate * velocity;
}

// The largest magnitude m of all elements, NaN if one is, and the sum of (x/m)^2: squares that neither
// overflow nor vanish. Two numbers from place 2·slot of out on. One group.
kernel void squares(global const float *x, uint x_at, global float *out, uint slot, uint n) {
    local float part[GROUP];
    float most = 0.0f;
    for (uint i = get_local_id(0); i < n; i += GROUP) most = larger(fabs(x[x_at + i]), most);
    most = group_max(part, most);
    float unit = most > 0.0f && !isinf(most) ? most : 1.0f, sum = 0.0f;
    for (uint i = get_local_id(0); i < n; i += GROUP) {
        float share = x[x_at + i] / unit;
        sum += share * share;
    }
    sum = group_sum(part, sum);
    if (get_local_id(0) == 0) {
        out[2 * slot] = most;
        out[2 * slot + 1] = sum;
    }
}
