// Attention; src/ops/attention/mod.rs has the derivation. No matrix of probabilities exists: a group has
// a tile of it in local memory, and goes along its rows or columns from tile to tile, however many there are.
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

// A tile has ROWS rows, those that a group works for, and GROUP columns, one for each work-item.
#define ROWS 16
// Element (row i, column j), by columns; one more than needed, so that columns fall on different banks.
#define AT(j, i) ((j) * (ROWS + 1) + (i))
#define TILE (GROUP * (ROWS + 1))
// Work-items that share the sum over a row.
#define SHARE (GROUP / ROWS)
// Dimensions of q, k, v or dy that are in local memory at a time.
#define STEP 16

// Row i of head (b, h) of a tensor of four dimensions.
#define ROW(x, l, b, h, i) (x + l.offset + (b) * l.strides[0] + (h) * l.strides[1] + (i) * l.strides[2])

bool visible(const Sizes *s, global const uchar *keys, uint b, uint i, uint j) {
    if (s->causal && j + s->t > i + s->tk) return false;
    return !s->has_keys || keys[b * s->tk + j];
}

// The keys that any of the queries before `end` sees, padding among them.
uint seen_before(const Sizes *s, uint end) {
    if (!s->causal) return s->tk;
    return end + s->tk > s->t ? min(end + s->tk - s->t, s->tk) : 0;
}

// Some rows that lie `row` apart, with elements `step` apart.
typedef struct {
    global const float *x;
    uint row;
    uint step;
    uint count;
} Lines;

// `count` rows from row i of head (b, h) on.
#define LINES(x, l, b, h, i, count) ((Lines){ROW(x, l, b, h, i), l.strides[2], l.strides[3], count})

// products[i] = the product of row i and the column of this work-item, both of `width` dimensions.
void multiply(local float *a, local float *b, Lines rows, Lines columns, uint width, float *products) {
    uint l = get_local_id(0);
    for (uint i = 0; i < ROWS; ++i) products[i] = 0.0f;
    for (uint from = 0; from < width; from += STEP) {
        uint n = min((uint)STEP, width - from);
        for (uint at = l; at < ROWS * STEP; at += GROUP) {
            uint i = at / STEP, c = at % STEP;
            bool inside = i < rows.count && c < n;
            a[c * ROWS + i] = inside ? rows.x[i * rows.row + (from + c) * rows.step] : 0.0f;
        }
        for (uint at = l; at < GROUP * STEP; at += GROUP) {
            uint j = at / STEP, c = at % STEP;
            bool inside = j < columns.count && c < n;
            b[c * (GROUP + 1) + j] = inside ? columns.x[j * columns.row + (from + c) * columns.step] : 0.0f;
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        for (uint c = 0; c < n; ++c) {
            float x = b[c * (GROUP + 1) + l];
            for (uint i = 0; i < ROWS; ++i) products[i] = fma(a[c * ROWS + i], x, products[i]);
        }
        barrier(CLK_LOCAL_MEM_FENCE);
    }
}

// sums[i] = the sum over the tile's columns j of tile(i, j) times dimension c of line j.
void weigh(local const float *tile, Lines lines, uint c, float *sums) {
    for (uint i = 0; i < ROWS; ++i) sums[i] = 0.0f;
    for (uint j = 0; j < lines.count; ++j) {
        float x = lines.x[j * lines.row + c * lines.step];
        for (uint i = 0; i < ROWS; ++i) sums[i] = fma(tile[AT(j, i)], x, sums[i]);
    }
}

// The dropout mask over (B·H, T, Tk): words of a stream, those below the threshold drop.
typedef struct {
    ulong seed;
    ulong stream;
    ulong threshold;
    float keep;
} Mask;

// A tile for the queries from `first` on times their mask at the keys from `from` on, `n` of them.
void mask_tile(const Sizes *s, Mask mask, uint head, uint first, uint from, uint n, local float *tile) {
    if (!s->drops) return;
    // A row's columns lie in so many blocks of words at most.
    const uint blocks = GROUP / 16 + 1;
    uint words[16];
    for (uint task = get_local_id(0); task < ROWS * blocks; task += GROUP) {
        uint i = task / blocks;
        ulong start = ((ulong)head * s->t + first + i) * s->tk + from;
        ulong block = start / 16 + task % blocks;
        if (16 * block >= start + n) continue;
        chacha_block(mask.seed, mask.stream, block, words);
        for (uint w = 0; w < 16; ++w) {
            ulong at = 16 * block + w;
            if (at >= start && at < start + n) tile[AT(at - start, i)] *= words[w] >= mask.threshold ? mask.keep : 0.0f;
        }
    }
}

// The mask of one query at the keys from `from` on, ROWS of them.
void mask_keys(const Sizes *s, Mask mask, uint head, uint query, uint from, float *out) {
    for (uint i = 0; i < ROWS; ++i) out[i] = 1.0f;
    if (!s->drops) return;
    uint words[16];
    ulong start = ((ulong)head * s->t + query) * s->tk + from;
    for (ulong block = start / 16; 16 * block < start + ROWS; ++block) {
        chacha_block(mask.seed, mask.stream, block, words);
        for (uint w = 0; w < 16; ++w) {
            ulong at = 16 * block + w;
            if (at >= start && at < start + ROWS) out[at - start] = words[w] >= mask.threshold ? mask.keep : 0.0f;
        }
    }
}

// y and the log-sum-exp of ROWS queries: a group for each of (B·H, blocks of T). As it goes along the keys it
// holds the largest score so far and sums relative to that, which shrink when there is a larger one.
kernel void attention(global const float *q, Layout lq, global const float *k, Layout lk,
                      global const float *v, Layout lv, global const uchar *keys, Sizes s, ulong seed,
                      ulong stream, ulong threshold, float keep, global float *y, Layout ly, global float *lse) {
    local float a[STEP * ROWS], b_part[STEP * (GROUP + 1)], p[TILE];
    local float part[GROUP], max[ROWS], sum[ROWS], shrink[ROWS];
    Mask mask = {seed, stream, threshold, keep};
    uint blocks = (s.t + ROWS - 1) / ROWS, head = get_group_id(0) / blocks;
    uint first = get_group_id(0) % blocks * ROWS, count = min((uint)ROWS, s.t - first);
    uint b = head / s.heads, h = head % s.heads, h_kv = h / s.group;
    uint l = get_local_id(0), row = l / SHARE;
    global float *to = y + ly.offset + b * ly.strides[0] + h * ly.strides[1] + first * ly.strides[2];
    if (l < ROWS) {
        max[l] = -INFINITY;
        sum[l] = 0.0f;
    }
    // A work-item sums the same dimensions all along.
    for (uint c = l; c < s.e; c += GROUP)
        for (uint i = 0; i < count; ++i) to[i * ly.strides[2] + c * ly.strides[3]] = 0.0f;
    uint seen = seen_before(&s, first + count);
    for (uint from = 0; from < seen; from += GROUP) {
        uint n = min((uint)GROUP, seen - from);
        float scores[ROWS];
        multiply(a, b_part, LINES(q, lq, b, h, first, count), LINES(k, lk, b, h_kv, from, n), s.d, scores);
        for (uint i = 0; i < ROWS; ++i) {
            bool seen_here = i < count && l < n && visible(&s, keys, b, first + i, from + l);
            p[AT(l, i)] = seen_here ? s.scale * scores[i] : -INFINITY;
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        float top = -INFINITY, total = 0.0f;
        for (uint j = l % SHARE; j < GROUP; j += SHARE) top = larger(p[AT(j, row)], top);
        part[l] = top;
        barrier(CLK_LOCAL_MEM_FENCE);
        top = max[row];
        for (uint i = 0; i < SHARE; ++i) top = larger(part[row * SHARE + i], top);
        for (uint j = l % SHARE; j < GROUP; j += SHARE) {
            float x = top == -INFINITY ? 0.0f : exp(p[AT(j, row)] - top);
            p[AT(j, row)] = x;
            total += x;
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        part[l] = total;
        barrier(CLK_LOCAL_MEM_FENCE);
        if (l % SHARE == 0) {
            shrink[row] = top == -INFINITY ? 1.0f : exp(max[row] - top);
            total = 0.0f;
            for (uint i = 0; i < SHARE; ++i) total += part[l + i];
            sum[row] = sum[row] * shrink[row] + total;
            max[row] = top;
        }
        mask_tile(&s, mask, head, first, from, n, p);
        barrier(CLK_LOCAL_MEM_FENCE);
        for (uint c = l; c < s.e; c += GROUP) {
            float means[ROWS];
            weigh(p, LINES(v, lv, b, h_kv, from, n), c, means);
            for (uint i = 0; i < count; ++i) {
                global float *at = to + i * ly.strides[2] + c * ly.strides[3];
                *at = fma(*at, shrink[i], means[i]);
            }
        }
        barrier(CLK_LOCAL_MEM_FENCE);
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    for (uint c = l; c < s.e; c += GROUP)
        for (uint i = 0; i < count; ++i)
            to[i * ly.strides[2] + c * ly.strides[3]] *= max[i] == -INFINITY ? 0.0f : 1.0f / sum[i];
    if (l < count) lse[head * s.t + first + l] = max[l] == -INFINITY ? -INFINITY : max[l] + log(sum[l]);
}

// P at (i, j), from the log-sum-exp of query i.
float probability(const Sizes *s, global const uchar *keys, uint b, uint i, uint j, float score, float lse) {
    return lse == -INFINITY || !visible(s, keys, b, i, j) ? 0.0f : exp(s->scale * score - lse);
}

// delta = dy·y and dq of ROWS queries: a group for each of (B·H, blocks of T).
kernel void attention_dq(global const float *q, Layout lq, global const float *k, Layout lk,
                         global const float *v, Layout lv, global const uchar *keys, Sizes s, ulong seed,
                         ulong stream, ulong threshold, float keep, global const float *y, Layout ly,
                         global const float *dy, Layout ldy, global const float *lse, global float *delta,
                         global float *dq, Layout ldq) {
    local float a[STEP * ROWS], b_part[STEP * (GROUP + 1)], ds[TILE], part[GROUP], deltas[ROWS];
    Mask mask = {seed, stream, threshold, keep};
    uint blocks = (s.t + ROWS - 1) / ROWS, head = get_group_id(0) / blocks;
    uint first = get_group_id(0) % blocks * ROWS, count = min((uint)ROWS, s.t - first);
    uint b = head / s.heads, h = head % s.heads, h_kv = h / s.group;
    uint l = get_local_id(0), row = l / SHARE;
    float d = 0.0f;
    for (uint c = l % SHARE; row < count && c < s.e; c += SHARE)
        d += ROW(dy, ldy, b, h, first + row)[c * ldy.strides[3]] * ROW(y, ly, b, h, first + row)[c * ly.strides[3]];
    part[l] = d;
    barrier(CLK_LOCAL_MEM_FENCE);
    if (l < ROWS) {
        d = 0.0f;
        for (uint i = 0; i < SHARE; ++i) d += part[l * SHARE + i];
        deltas[l] = d;
        if (l < count) delta[head * s.t + first + l] = d;
    }
    global float *to = dq + ldq.offset + b * ldq.strides[0] + h * ldq.strides[1] + first * ldq.strides[2];
    for (uint c = l; c < s.d; c += GROUP)
        for (uint i = 0; i < count; ++i) to[i * ldq.strides[2] + c * ldq.strides[3]] = 0.0f;
    uint seen = seen_before(&s, first + count);
    for (uint from = 0; from < seen; from += GROUP) {
        uint n = min((uint)GROUP, seen - from);
        Lines of_keys = LINES(k, lk, b, h_kv, from, n);
        float scores[ROWS], dp[ROWS];
        multiply(a, b_part, LINES(q, lq, b, h, first, count), of_keys, s.d, scores);
        multiply(a, b_part, LINES(dy, ldy, b, h, first, count), LINES(v, lv, b, h_kv, from, n), s.e, dp);
        // Until the scores are there, ds holds the mask.
        for (uint i = 0; i < ROWS; ++i) ds[AT(l, i)] = 1.0f;
        barrier(CLK_LOCAL_MEM_FENCE);
        mask_tile(&s, mask, head, first, from, n, ds);
        barrier(CLK_LOCAL_MEM_FENCE);
        for (uint i = 0; i < ROWS; ++i) {
            float p = 0.0f;
            if (i < count && l < n)
                p = probability(&s, keys, b, first + i, from + l, scores[i], lse[head * s.t + first + i]);
            ds[AT(l, i)] = p == 0.0f ? 0.0f : p * (ds[AT(l, i)] * dp[i] - deltas[i]);
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        for (uint c = l; c < s.d; c += GROUP) {
            float sums[ROWS];
            weigh(ds, of_keys, c, sums);
            for (uint i = 0; i < count; ++i) to[i * ldq.strides[2] + c * ldq.strides[3]] += s.scale * sums[i];
        }
        barrier(CLK_LOCAL_MEM_FENCE);
    }
}

// dk and dv of ROWS keys, over all heads that they serve and all queries: a group for each of (B·Hkv, blocks
// of Tk). The columns of its tiles are queries.
kernel void attention_dkv(global const float *q, Layout lq, global const float *k, Layout lk,
                          global const float *v, Layout lv, global const uchar *keys, Sizes s, ulong seed,
                          ulong stream, ulong threshold, float keep, global const float *dy, Layout ldy,
                          global const float *lse, global const float *delta, global float *dk, Layout ldk,
                          global float *dv, Layout ldv) {
    local float a[STEP * ROWS], b_part[STEP * (GROUP + 1)], p[TILE], ds[TILE];
    Mask mask = {seed, stream, threshold, keep};
    uint blocks = (s.tk + ROWS - 1) / ROWS, head_kv = get_group_id(0) / blocks;
    uint first = get_group_id(0) % blocks * ROWS, count = min((uint)ROWS, s.tk - first);
    uint b = head_kv / s.heads_kv, h_kv = head_kv % s.heads_kv, l = get_local_id(0);
    global float *to_k = dk + ldk.offset + b * ldk.strides[0] + h_kv * ldk.strides[1] + first * ldk.strides[2];
    global float *to_v = dv + ldv.offset + b * ldv.strides[0] + h_kv * ldv.strides[1] + first * ldv.strides[2];
    // A work-item sums the same dimensions all along.
    for (uint i = 0; i < count; ++i) {
        for (uint c = l; c < s.d; c += GROUP) to_k[i * ldk.strides[2] + c * ldk.strides[3]] = 0.0f;
        for (uint c = l; c < s.e; c += GROUP) to_v[i * ldv.strides[2] + c * ldv.strides[3]] = 0.0f;
    }
    // The first query that sees any of the keys.
    uint start = s.causal && first + s.t > s.tk ? first + s.t - s.tk : 0;
    for (uint g = 0; g < s.group; ++g) {
        uint h = h_kv * s.group + g, head = b * s.heads + h;
        for (uint from = start; from < s.t; from += GROUP) {
            uint n = min((uint)GROUP, s.t - from), at = from + l;
            Lines queries = LINES(q, lq, b, h, from, n), grads = LINES(dy, ldy, b, h, from, n);
            float scores[ROWS], dp[ROWS], kept[ROWS];
            multiply(a, b_part, LINES(k, lk, b, h_kv, first, count), queries, s.d, scores);
            multiply(a, b_part, LINES(v, lv, b, h_kv, first, count), grads, s.e, dp);
            if (l < n) mask_keys(&s, mask, head, at, first, kept);
            for (uint i = 0; i < ROWS; ++i) {
                float prob = 0.0f;
                if (i < count && l < n)
                    prob = probability(&s, keys, b, at, first + i, scores[i], lse[head * s.t + at]);
                p[AT(l, i)] = prob == 0.0f ? 0.0f : prob * kept[i];
                ds[AT(l, i)] = prob == 0.0f ? 0.0f : prob * (kept[i] * dp[i] - delta[head * s.t + at]);
            }
            barrier(CLK_LOCAL_MEM_FENCE);
            float sums[ROWS];
            for (uint c = l; c < s.d; c += GROUP) {
                weigh(ds, queries, c, sums);
                for (uint i = 0; i < count; ++i) to_k[i * ldk.strides[2] + c * ldk.strides[3]] += s.scale * sums[i];
            }
            for (uint c = l; c < s.e; c += GROUP) {
                weigh(p, grads, c, sums);
                for (uint i = 0; i < count; ++i) to_v[i * ldv.strides[2] + c * ldv.strides[3]] += sums[i];
            }
            barrier(CLK_LOCAL_MEM_FENCE);
        }
    }
}
