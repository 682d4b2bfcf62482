// x times the mask of a key: the same words, and so the same mask, as src/ops/dropout.rs makes. One
// work-item makes a block of 16 words.

kernel void dropout(global const float *x, uint x_at, global float *y, ulong seed, ulong stream,
                    ulong threshold, float scale, uint n) {
    uint block = get_global_id(0);
    if (block >= (n + 15) / 16) return;
    uint words[16];
    chacha_block(seed, stream, block, words);
    for (uint i = 0; i < 16; ++i) {
        uint at = 16 * block + i;
        if (at < n) y[at] = x[x_at + at] * (words[i] >= threshold ? scale : 0.0f);
    }
}
