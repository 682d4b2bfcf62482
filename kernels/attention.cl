// Attention; src/ops/attention/mod.rs has the derivation. No matrix of probabilities exists: a group keeps
// one row of it, or a part of a column, in local memory.
//
// q: (B, H, T, d), k: (B, Hkv, Tk, d), v: (B, Hkv, Tk, e), y and dy: (B, H, T, e), by their layouts.
// keys[b·Tk + j] is 0 where key j must not be attended to.

typedef struct {
    uint heads;
    uint heads_kv;
    uint group; // heads of q to a head of k
    uint t;
    uint tk;
    uint d;
    uint e;
    uint causal;
    uint has_keys;
    uint drops;
    float scale;
} Sizes;

// Row i of head (b, h) of a tensor of four dimensions.
#define ROW(x, l, b, h, i) (x + l.offset + (b) * l.strides[0] + (h) * l.strides[1] + (i) * l.strides[2])

bool visible(const Sizes *s, global const uchar *keys, uint b, uint i, uint j) {
    if (s->causal && j + s->t > i + s->tk) return false;
    return !s->has_keys || keys[b * s->tk + j];
}

float dot_of(global const float *a, uint a_step, global const float *b, uint b_step, uint n) {
    float sum = 0.0f;
    for (uint c = 0; c < n; ++c) sum += a[c * a_step] * b[c * b_step];
    return sum;
}

// The dropout mask at place (head, i, j), where it has (B·H, T, Tk).
float mask_at(const Sizes *s, ulong seed, ulong stream, ulong threshold, float keep, ulong head, uint i,
              uint j) {
    if (!s->drops) return 1.0f;
    uint words[16];
    ulong at = (head * s->t + i) * s->tk + j;
    chacha_block(seed, stream, at / 16, words);
    return words[at % 16] >= threshold ? keep : 0.0f;
}

// A row of n places times the dropout mask from place `first` on. A work-item makes a block of 16 words.
void mask_row(const Sizes *s, ulong seed, ulong stream, ulong threshold, float keep, ulong first,
              local float *row, uint n) {
    if (!s->drops || n == 0) return;
    uint words[16];
    for (ulong block = first / 16 + get_local_id(0); block <= (first + n - 1) / 16; block += GROUP) {
        chacha_block(seed, stream, block, words);
        for (uint w = 0; w < 16; ++w) {
            ulong at = 16 * block + w;
            if (at >= first && at < first + n) row[at - first] *= words[w] >= threshold ? keep : 0.0f;
        }
    }
}

// y and the log-sum-exp of one query: a group for each of (T, B·H).
kernel void attention(global const float *q, Layout lq, global const float *k, Layout lk,
                      global const float *v, Layout lv, global const uchar *keys, Sizes s, ulong seed,
                      ulong stream, ulong threshold, float keep, global float *y, Layout ly, global float *lse, local float *p) {
    local float part[GROUP];
    uint l = get_local_id(0), i = get_group_id(0), head = get_group_id(1);
    uint b = head / s.heads, h = head % s.heads, h_kv = h / s.group;
    global const float *query = ROW(q, lq, b, h, i);
    float max = -INFINITY;
    for (uint j = l; j < s.tk; j += GROUP) {
        float score = -INFINITY;
        if (visible(&s, keys, b, i, j))
            score = s.scale * dot_of(query, lq.strides[3], ROW(k, lk, b, h_kv, j), lk.strides[3], s.d);
        p[j] = score;
        max = larger(score, max);
    }
    max = group_max(part, max);
    float sum = 0.0f;
    for (uint j = l; j < s.tk; j += GROUP) {
        p[j] = max == -INFINITY ? 0.0f : exp(p[j] - max);
        sum += p[j];
    }
    sum = group_sum(part, sum);
    float factor = max == -INFINITY ? 0.0f : 1.0f / sum;
    for (uint j = l; j < s.tk; j += GROUP) p[j] *= factor;
    barrier(CLK_LOCAL_MEM_FENCE);
    mask_row(&s, seed, stream, threshold, keep, ((ulong)head * s.t + i) * s.tk, p, s.tk);
    barrier(CLK_LOCAL_MEM_FENCE);
    for (uint c = l; c < s.e; c += GROUP) {
        float mean = 0.0f;
        for (uint j = 0; j < s.tk; ++j) mean += p[j] * ROW(v, lv, b, h_kv, j)[c * lv.strides[3]];
        ROW(y, ly, b, h, i)[c * ly.strides[3]] = mean;
    }
    if (l == 0) lse[head * s.t + i] = max == -INFINITY ? -INFINITY : max + log(sum);
}

// P at (i, j), from the log-sum-exp of query i.
float probability(const Sizes *s, global const uchar *keys, uint b, uint i, uint j, float score, float lse) {
    return lse == -INFINITY || !visible(s, keys, b, i, j) ? 0.0f : exp(score - lse);
}

// delta = dy·y and dq of one query: a group for each of (T, B·H).
kernel void attention_dq(global const float *q, Layout lq, global const float *k, Layout lk,
                         global const float *v, Layout lv, global const uchar *keys, Sizes s, ulong seed,
                         ulong stream, ulong threshold, float keep, global const float *y, Layout ly, global const float *dy, Layout ldy,
                         global const float *lse, global float *delta, global float *dq, Layout ldq,
                         local float *ds) {
    local float part[GROUP];
    uint l = get_local_id(0), i = get_group_id(0), head = get_group_id(1);
    uint b = head / s.heads, h = head % s.heads, h_kv = h / s.group;
    global const float *query = ROW(q, lq, b, h, i), *grad = ROW(dy, ldy, b, h, i);
    float d = 0.0f;
    for (uint c = l; c < s.e; c += GROUP)
        d += grad[c * ldy.strides[3]] * ROW(y, ly, b, h, i)[c * ly.strides[3]];
    d = group_sum(part, d);
    if (l == 0) delta[head * s.t + i] = d;
    // Until the scores are there, ds holds the mask.
    for (uint j = l; j < s.tk; j += GROUP) ds[j] = 1.0f;
    barrier(CLK_LOCAL_MEM_FENCE);
    mask_row(&s, seed, stream, threshold, keep, ((ulong)head * s.t + i) * s.tk, ds, s.tk);
    barrier(CLK_LOCAL_MEM_FENCE);
    for (uint j = l; j < s.tk; j += GROUP) {
        float score = s.scale * dot_of(query, lq.strides[3], ROW(k, lk, b, h_kv, j), lk.strides[3], s.d);
        float p = probability(&s, keys, b, i, j, score, lse[head * s.t + i]);
        float dp = dot_of(grad, ldy.strides[3], ROW(v, lv, b, h_kv, j), lv.strides[3], s.e);
        ds[j] = p == 0.0f ? 0.0f : p * (ds[j] * dp - d);
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    for (uint c = l; c < s.d; c += GROUP) {
        float sum = 0.0f;
        for (uint j = 0; j < s.tk; ++j) sum += ds[j] * ROW(k, lk, b, h_kv, j)[c * lk.strides[3]];
        ROW(dq, ldq, b, h, i)[c * ldq.strides[3]] = s.scale * sum;
    }
}

// Queries that a group of the kernel below looks at in one go.
#define QUERIES 256

// dk and dv of one key, over all heads that it serves and all queries: a group for each of (Tk, B·Hkv).
kernel void attention_dkv(global const float *q, Layout lq, global const float *k, Layout lk,
                          global const float *v, Layout lv, global const uchar *keys, Sizes s, ulong seed,
                          ulong stream, ulong threshold, float keep, global const float *dy, Layout ldy, global const float *lse,
                          global const float *delta, global float *dk, Layout ldk, global float *dv,
                          Layout ldv) {
    local float p[QUERIES], ds[QUERIES];
    uint l = get_local_id(0), j = get_group_id(0), h_all = s.heads_kv;
    uint b = get_group_id(1) / h_all, h_kv = get_group_id(1) % h_all;
    global const float *key = ROW(k, lk, b, h_kv, j), *value = ROW(v, lv, b, h_kv, j);
    // A work-item sums the same places all along.
    for (uint c = l; c < s.d; c += GROUP) ROW(dk, ldk, b, h_kv, j)[c * ldk.strides[3]] = 0.0f;
    for (uint c = l; c < s.e; c += GROUP) ROW(dv, ldv, b, h_kv, j)[c * ldv.strides[3]] = 0.0f;
    for (uint g = 0; g < s.group; ++g) {
        uint h = h_kv * s.group + g, head = b * s.heads + h;
        for (uint from = 0; from < s.t; from += QUERIES) {
            uint n = min((uint)QUERIES, s.t - from);
            for (uint i = l; i < n; i += GROUP) {
                uint at = from + i;
                global const float *grad = ROW(dy, ldy, b, h, at);
                float score = s.scale * dot_of(ROW(q, lq, b, h, at), lq.strides[3], key, lk.strides[3], s.d);
                float prob = probability(&s, keys, b, at, j, score, lse[head * s.t + at]);
                float mask = prob == 0.0f ? 0.0f : mask_at(&s, seed, stream, threshold, keep, head, at, j);
                float dp = dot_of(grad, ldy.strides[3], value, lv.strides[3], s.e);
                p[i] = prob * mask;
                ds[i] = prob == 0.0f ? 0.0f : prob * (mask * dp - delta[head * s.t + at]);
            }
            barrier(CLK_LOCAL_MEM_FENCE);
            for (uint c = l; c < s.d; c += GROUP) {
                float sum = 0.0f;
                for (uint i = 0; i < n; ++i) sum += ds[i] * ROW(q, lq, b, h, from + i)[c * lq.strides[3]];
                ROW(dk, ldk, b, h_kv, j)[c * ldk.strides[3]] += s.scale * sum;
            }
            for (uint c = l; c < s.e; c += GROUP) {
                float sum = 0.0f;
                for (uint i = 0; i < n; ++i) sum += p[i] * ROW(dy, ldy, b, h, from + i)[c * ldy.strides[3]];
                ROW(dv, ldv, b, h_kv, j)[c * ldv.strides[3]] += sum;
            }
            barrier(CLK_LOCAL_MEM_FENCE);
        }
    }
}
