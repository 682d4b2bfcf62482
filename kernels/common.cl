// What all kernels share. OpenCL C 1.2 without extensions.

// Work-items of a group in kernels that sum: a constant on every device, as sums are cut by it.
#define GROUP 64

// Where the elements of a tensor lie; see src/shape.rs. Counts elements in order, the last dimension
// varying fastest.
typedef struct {
    uint rank;
    uint offset;
    uint sizes[8];
    uint strides[8];
} Layout;

// The place of element i.
uint place(const Layout *l, uint i) {
    uint at = l->offset;
    for (uint d = l->rank; d > 1; --d) {
        uint size = l->sizes[d - 1];
        at += i % size * l->strides[d - 1];
        i /= size;
    }
    return at + i * l->strides[0];
}

// The larger number, or NaN if either is.
float larger(float a, float b) {
    return a > b || isnan(a) ? a : b;
}

// The sum over all work-items of a group, in an order that only GROUP decides. All of them call it.
float group_sum(local float *part, float x) {
    uint l = get_local_id(0);
    part[l] = x;
    for (uint step = GROUP / 2; step > 0; step /= 2) {
        barrier(CLK_LOCAL_MEM_FENCE);
        if (l < step) part[l] += part[l + step];
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    float sum = part[0];
    barrier(CLK_LOCAL_MEM_FENCE);
    return sum;
}

float group_max(local float *part, float x) {
    uint l = get_local_id(0);
    part[l] = x;
    for (uint step = GROUP / 2; step > 0; step /= 2) {
        barrier(CLK_LOCAL_MEM_FENCE);
        if (l < step) part[l] = larger(part[l], part[l + step]);
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    float max = part[0];
    barrier(CLK_LOCAL_MEM_FENCE);
    return max;
}

// Narrow types widened, exactly.
float from_f32(float x) {
    return x;
}

float from_bf16(ushort x) {
    return as_float((uint)x << 16);
}

// As src/dtype.rs does it: vload_half would do, but not all drivers keep subnormal numbers.
float from_f16(ushort x) {
    uint magnitude = x & 0x7fff;
    uint sign = (uint)(x & 0x8000) << 16;
    if (magnitude < 0x0400) {
        float small = (float)magnitude * 5.9604644775390625e-8f; // 2^-24
        return sign ? -small : small;
    }
    uint wide = magnitude >= 0x7c00 ? 0x7f800000 | (magnitude & 0x03ff) << 13 : (magnitude << 13) + (112 << 23);
    return as_float(sign | wide);
}

// Word number `index` of the ChaCha stream (8 rounds) that src/random.rs draws from, 16 at a time: those
// of the block that it is in.
void chacha_block(ulong seed, ulong stream, ulong block, uint *out) {
    uint start[16] = {0x61707865, 0x3320646e, 0x79622d32, 0x6b206574,
                      (uint)seed, (uint)(seed >> 32), 0, 0, 0, 0, 0, 0,
                      (uint)block, (uint)(block >> 32), (uint)stream, (uint)(stream >> 32)};
    for (int i = 0; i < 16; ++i) out[i] = start[i];
#define QUARTER(a, b, c, d)                                          \
    out[a] += out[b]; out[d] = rotate(out[d] ^ out[a], 16u);         \
    out[c] += out[d]; out[b] = rotate(out[b] ^ out[c], 12u);         \
    out[a] += out[b]; out[d] = rotate(out[d] ^ out[a], 8u);          \
    out[c] += out[d]; out[b] = rotate(out[b] ^ out[c], 7u);
    for (int round = 0; round < 4; ++round) {
        QUARTER(0, 4, 8, 12) QUARTER(1, 5, 9, 13) QUARTER(2, 6, 10, 14) QUARTER(3, 7, 11, 15)
        QUARTER(0, 5, 10, 15) QUARTER(1, 6, 11, 12) QUARTER(2, 7, 8, 13) QUARTER(3, 4, 9, 14)
    }
#undef QUARTER
    for (int i = 0; i < 16; ++i) out[i] += start[i];
}
