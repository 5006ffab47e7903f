// What each instruction set implements. Plain C types only: the library needs neither torch's headers nor Python's.
//
// Legend: T tokens, D hidden, F FFN width, E experts, K top-k, H heads, G KV groups, h head dimension, M rows, N outputs.
#pragma once

#include <cstdint>

namespace moeforge {

using bf16 = uint16_t;

constexpr int64_t kPanel = 16;  // outputs that are computed together: one vector of float

// A weight [outputs, inputs] in pairs of panels of 16 outputs, filled up with zeros.
//   bf16: [pair][inputs / 2][2 panels][16 outputs][2 inputs];  e4m3: [pair][inputs / 4][2 panels][16 outputs][4 inputs]
// e4m3 has scales [pair][blocks][2 panels][scale_width], the width being 16 or, where a panel shares one, 1. The first block
// has `first_block` inputs, each other one 128, the last one the rest.
struct Weight {
    const uint8_t* data;
    const float* scales;  // null for bf16
    int64_t outputs, inputs, blocks, first_block, scale_width;
};

struct Gate {
    const float* weight;  // [E, D]
    const float* bias;    // [E] or null
    int64_t experts, hidden, top_k;
    float scale;          // lambda; NaN for no normalisation
    int32_t renormalize;
};

struct Attention {
    const void *keys, *values;  // pages [P, S, G, h]
    int64_t page_size, groups, heads_per_group, head_dim, table_width, window;  // window 0: none
    float scale;
    int32_t e4m3;               // pages hold bytes of that kind, not bf16
};

// A layer of a model whose feed-forward is dense (no gate) or a mixture. w13 and w2: one matrix, or those of the experts.
struct Layer {
    const bf16 *attention_norm, *ffn_norm;  // [D]
    const Weight *qkv, *o;
    const bf16* qkv_bias;  // or null
    const Gate* gate;
    const Weight *w13, *w2;
    Attention attention;  // but for table_width, which is a step's
};

// One new token of each of T sequences.
struct Step {
    const bf16 *cos, *sin;  // [T, h / 2]
    const int64_t *slots;   // [T]: where its key and value go
    const int64_t *table, *lengths;  // [T, table_width], [T]
    int64_t table_width, tokens;
};

struct Kernels {
    const char* name;
    void (*linear)(const Weight&, const bf16* x, int64_t rows, const bf16* bias, bf16* out, int threads);
    void (*experts)(const Weight* w13, const Weight* w2, int64_t experts, const bf16* x, int64_t tokens, int64_t top_k,
                    const int64_t* chosen, const float* weights, bf16* out, int threads);
    void (*choose)(const Gate&, const bf16* x, int64_t tokens, float* weights, int64_t* chosen, int threads);
    void (*rms_norm)(const bf16* x, const bf16* weight, int64_t rows, int64_t width, float eps, bf16* out, int threads);
    void (*swiglu)(const bf16* h, int64_t rows, int64_t width, bf16* out, int threads);
    void (*swiglu_backward)(const bf16* h, const bf16* grad, int64_t rows, int64_t width, bf16* out, bf16* grad_h,
                            int threads);
    void (*split_qkv)(const bf16* qkv, const bf16* cos, const bf16* sin, int64_t tokens, int64_t groups,
                      int64_t heads_per_group, int64_t head_dim, bf16* q, bf16* k, bf16* v, int threads);
    void (*add)(const bf16* x, bf16* to, int64_t count, int threads);
    void (*attend)(const Attention&, const bf16* q, const int64_t* table, const int64_t* lengths, int64_t sequences,
                   bf16* out, int threads);
};

const Kernels* portable_kernels();
const Kernels* avx2_kernels();    // null where this build has none
const Kernels* avx512_kernels();

}  // namespace moeforge
