// One work-item an element.

// y[ly] = x[lx], whatever the elements are.
#define COPY(NAME, T)                                                                                 \
    kernel void NAME(global const T *x, Layout lx, global T *y, Layout ly, uint n) {                  \
        uint i = get_global_id(0);                                                                    \
        if (i < n) y[place(&ly, i)] = x[place(&lx, i)];                                               \
    }
COPY(copy_16, ushort)
COPY(copy_32, uint)
COPY(copy_64, ulong)

// y[ly] = x[lx], widened.
#define WIDEN(NAME, T, FROM)                                                                          \
    kernel void NAME(global const T *x, Layout lx, global float *y, Layout ly, uint n) {              \
        uint i = get_global_id(0);                                                                    \
        if (i < n) y[place(&ly, i)] = FROM(x[place(&lx, i)]);                                         \
    }
WIDEN(widen_bf16, ushort, from_bf16)
WIDEN(widen_f16, ushort, from_f16)

kernel void fill(global float *y, float value, uint n) {
    uint i = get_global_id(0);
    if (i < n) y[i] = value;
}

// y = f(a, b), both broadcast to y's shape by strides of 0.
#define BINARY(NAME, F)                                                                               \
    kernel void NAME(global const float *a_in, Layout la, global const float *b_in, Layout lb,        \
                     global float *y, uint n) {                                                       \
        uint i = get_global_id(0);                                                                    \
        if (i >= n) return;                                                                           \
        float a = a_in[place(&la, i)], b = b_in[place(&lb, i)];                                       \
        y[i] = F;                                                                                     \
    }
BINARY(add, a + b)
BINARY(sub, a - b)
BINARY(mul, a * b)
BINARY(div, a / b)

// Shares of a maximum (see src/ops/reduce.rs).
BINARY(equal, a == b ? 1.0f : 0.0f)

// a += x, in place.
kernel void add_in_place(global float *a, uint a_at, global const float *x, Layout lx, uint n) {
    uint i = get_global_id(0);
    if (i < n) a[a_at + i] += x[place(&lx, i)];
}

kernel void scale_in_place(global float *a, uint a_at, float factor, uint n) {
    uint i = get_global_id(0);
    if (i < n) a[a_at + i] *= factor;
}

// y = f(x) and dx = dy·f'(v), where v is x, y, or nothing that is read: src/ops/pointwise.rs says which.
// c is the function's parameter.
#define POINTWISE(NAME, F, DF)                                                                        \
    kernel void NAME##_forward(global const float *x_in, Layout lx, float c, global float *y,         \
                               uint n) {                                                              \
        uint i = get_global_id(0);                                                                    \
        if (i >= n) return;                                                                           \
        float x = x_in[place(&lx, i)];                                                                \
        y[i] = F;                                                                                     \
    }                                                                                                 \
    kernel void NAME##_vjp(global const float *v_in, Layout lv, global const float *dy, Layout ldy,   \
                           float c, global float *dx, uint n) {                                       \
        uint i = get_global_id(0);                                                                    \
        if (i >= n) return;                                                                           \
        float v = v_in[place(&lv, i)]; (void)v;                                                       \
        dx[i] = dy[place(&ldy, i)] * (DF);                                                            \
    }

#define SQRT_HALF 0.70710678118654752440f
#define SLOPE 0.79788456080286535588f
#define CUBIC 0.044715f

float sigmoid_of(float x) {
    return 1.0f / (1.0f + exp(-x));
}

float gelu_slope(float x) {
    float cdf = 0.5f + 0.5f * erf(x * SQRT_HALF);
    return cdf + x * exp(-0.5f * x * x) * (0.5f * SLOPE);
}

float gelu_tanh_slope(float x) {
    float t = tanh(SLOPE * (x + CUBIC * x * x * x));
    float du = SLOPE + 3.0f * SLOPE * CUBIC * x * x;
    return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * du;
}

float silu_slope(float x) {
    float s = sigmoid_of(x);
    return s * (1.0f + x * (1.0f - s));
}

POINTWISE(scale, c * x, c)
POINTWISE(add_scalar, x + c, 1.0f)
POINTWISE(powf, pow(x, c), c * pow(v, c - 1.0f))
POINTWISE(exp, exp(x), v)
POINTWISE(ln, log(x), 1.0f / v)
POINTWISE(sqrt, sqrt(x), 0.5f / v)
POINTWISE(relu, larger(x, 0.0f), v <= 0.0f ? 0.0f : 1.0f)
POINTWISE(abs, fabs(x), v == 0.0f ? 0.0f : v / fabs(v))
POINTWISE(gelu, 0.5f * x * (1.0f + erf(x * SQRT_HALF)), gelu_slope(v))
POINTWISE(gelu_tanh, 0.5f * x * (1.0f + tanh(SLOPE * (x + CUBIC * x * x * x))), gelu_tanh_slope(v))
POINTWISE(silu, x * sigmoid_of(x), silu_slope(v))
POINTWISE(tanh, tanh(x), 1.0f - v * v)
POINTWISE(sigmoid, sigmoid_of(x), v * (1.0f - v))
